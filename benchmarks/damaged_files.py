"""What becomes of a file with one flipped bit, or of one that is cut short? One line, or the right network.

    python benchmarks/damaged_files.py [--flips 300] [--truncations 200] [--seed 0] [--out FILE.json]

Every kind of file that `mrla` reads is written once, damaged in one place after another, and read again, in a process
of its own. Counted are: `refused` in one line, `right` (what is read equals what was written), `changed` (it is read
and differs: only where a format has no sums, so that nobody can know), and what must not be: `raised` (another error,
or more than one line) and `died` (the process ended, or took more than a minute for a file). Exits with 1 if there is
one.
"""

import argparse
import json
import multiprocessing
import pickle
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from result_file import write_result

MINUTE = 60


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        write: Writes one, with what it needs beside it, into a folder and gives its path.
        read: What is read from such a path, as something to compare.
        has_sums: Whether a changed number can be noticed. A PNG has sums, at which Pillow does not look.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    has_sums: bool


def _network() -> Any:
    import timm

    import mrla

    torch.manual_seed(0)
    return mrla.attach(timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=3), init="released").eval()


def _saved(folder: Path) -> Path:
    import mrla

    return mrla.save(_network(), folder / "net", class_names=["a", "b", "c"])


def _loaded(folder: Path) -> Any:
    import mrla

    return dict(mrla.load(folder).state_dict())


def _state(path: Path) -> Any:
    from mrla.models.checkpoints.tensor_files import read_state_dict

    return read_state_dict(path)


def _torch_file(folder: Path, *, zipped: bool) -> Path:
    path = folder / "net.pth"
    torch.save({"epoch": 1, "state_dict": _network().state_dict()}, path, _use_new_zipfile_serialization=zipped)
    return path


def _safetensors(folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file(_network().state_dict(), folder / "net.safetensors")
    return folder / "net.safetensors"


def _paddle(folder: Path) -> Path:
    path = folder / "net.pdparams"
    arrays = {name: tensor.numpy() for name, tensor in _network().state_dict().items()}
    path.write_bytes(pickle.dumps(arrays, protocol=4))
    return path


def _annotations(folder: Path) -> Path:
    from mrla.data.sources import Shapes, write_coco

    write_coco(Shapes(images=2, val_images=2, image_size=32), folder / "coco")
    return folder / "coco" / "annotations" / "instances_val2017.json"


def _targets(path: Path) -> Any:
    from mrla.data.sampling import SampleKey
    from mrla.data.sources import Coco

    samples = Coco(root=str(path.parent.parent), workers=0).open("val", augment=False)
    return {str(index): samples[SampleKey(index, 0)][0] for index in range(len(samples))}


def _photo(folder: Path, kind: str) -> Path:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"photo.{kind}")
    return folder / f"photo.{kind}"


def _pixels(path: Path) -> Any:
    from mrla.data.images import read_image

    return {"pixels": torch.from_numpy(np.array(read_image(path)))}


KINDS: dict[str, Kind] = {
    "config.json": Kind(lambda folder: _saved(folder) / "config.json", lambda path: _loaded(path.parent), False),
    "model.safetensors": Kind(
        lambda folder: _saved(folder) / "model.safetensors", lambda path: _loaded(path.parent), True
    ),
    ".pth": Kind(lambda folder: _torch_file(folder, zipped=True), _state, True),
    ".pth, older form": Kind(lambda folder: _torch_file(folder, zipped=False), _state, False),
    ".safetensors": Kind(_safetensors, _state, False),
    ".pdparams": Kind(_paddle, _state, False),
    "COCO's annotations": Kind(_annotations, _targets, False),
    ".png": Kind(lambda folder: _photo(folder, "png"), _pixels, False),
    ".jpg": Kind(lambda folder: _photo(folder, "jpg"), _pixels, False),
    ".bmp": Kind(lambda folder: _photo(folder, "bmp"), _pixels, False),
}


def damaged(content: bytes, generator: np.random.Generator, *, cut: bool) -> bytes:
    """Content with one bit flipped, or cut short; half of the flips in its first 4096 bytes."""
    if cut:
        return content[: generator.integers(0, len(content))]
    most = min(len(content), 4096) if generator.random() < 0.5 else len(content)
    changed = bytearray(content)
    changed[generator.integers(0, most)] ^= 1 << generator.integers(0, 8)
    return bytes(changed)


def outcome(kind: Kind, path: Path, expected: Any) -> str:
    """What becomes of a file, and the error where there should be none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = kind.read(path)
        except ValueError as error:
            return "refused" if str(error) and "\n" not in str(error) else f"raised {str(error)[:300]!r}"
        except Exception as error:
            return f"raised {type(error).__name__}: {str(error)[:300]}"
    alike = found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    return "right" if alike else "changed"


def _trials(name: str, seeds: list[tuple[int, bool]], sending: Any) -> None:
    kind = KINDS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = kind.write(Path(folder))
        content = path.read_bytes()
        expected = {name: tensor.clone() for name, tensor in kind.read(path).items()}  # not the file's own memory
        for seed, cut in seeds:
            path.write_bytes(damaged(content, np.random.default_rng((seed, cut)), cut=cut))
            sending.send(outcome(kind, path, expected))


def count(name: str, seeds: list[tuple[int, bool]]) -> tuple[Counter[str], list[str]]:
    """Outcomes of damages, and what must not be of them; a process that ends is started again behind the damage."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    context = multiprocessing.get_context("spawn")
    while seeds:
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_trials, args=(name, seeds, sending))
        process.start()
        sending.close()
        done = 0
        try:
            while done < len(seeds):
                found = receiving.recv() if receiving.poll(MINUTE) else "died: no answer in a minute"
                done += 1
                bad = found not in ("refused", "right", "changed") or (found == "changed" and KINDS[name].has_sums)
                counts[found.partition(" ")[0].rstrip(":")] += 1
                if bad:
                    wrong.append(f"{name}, seed {seeds[done - 1]}: {found}")
                if found.startswith("died"):
                    break
        except EOFError:
            process.join()
            counts["died"] += 1
            wrong.append(f"{name}, seed {seeds[done]}: died with {process.exitcode}")
            done += 1
        process.kill()
        process.join()
        seeds = seeds[done:]
    return counts, wrong


def main() -> int:
    """Damages, prints the counts and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--truncations", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=tuple(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="the first of the damages' seeds")
    parser.add_argument("--out", type=Path, default=None, help="JSON (results/damaged_files_HARDWARE_DATE.json)")
    options = parser.parse_args()
    started = datetime.now(UTC)
    counts, wrong = {}, []
    for name in options.kinds:
        seeds = [(options.seed + number, False) for number in range(options.flips)]
        seeds += [(options.seed + number, True) for number in range(options.truncations)]
        found, bad = count(name, seeds)
        counts[name] = dict(sorted(found.items()))
        wrong += bad
        print(f"{name}: {json.dumps(counts[name])}", flush=True)
    print("\n".join(wrong))
    write_result("damaged_files", started, options, torch.get_num_threads(), counts=counts, wrong=wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
