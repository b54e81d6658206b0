"""What becomes of work whose process is killed (signal 9) at a random moment, and is started again?

    python benchmarks/killed_runs.py [--train 120] [--compare 20] [--save 60] [--seed 0] [--out FILE.json]

`train` and `compare`: a tiny run, started, killed after a random part of the time that a whole one takes, at times
twice, and started again; all that it leaves must equal, to the last bit, what an undisturbed one leaves, but for what a
clock says. `save`: a network saved over another one, again and again; the folder must give one of the two, whole.
Counted are `equal`, `lost` (something else, or an error) and the kills; one that comes after the end of the work is not
among the number wanted. Exits with 1 if something was lost.

Each try is a fork of a process that has imported all, so that the kill falls into the work and not into the imports;
the runs of a comparison are processes of their own, as always.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from result_file import write_result

import mrla
from mrla.train.recipes import get_recipe

TIMED = ("seconds", "images_per_second", "train_seconds", "date", "log.txt")


class Work(NamedTuple):
    """Something that can be killed and started again.

    Attributes:
        prepare: Makes what there is before it begins, in a folder.
        start: Does it; called again after a kill.
        left: What it leaves, to compare; of a folder whose work was killed too, where `again` is false.
        again: Whether it is started again after the kill.
    """

    prepare: Callable[[Path], None]
    start: Callable[[Path], Any]
    left: Callable[[Path], Any]
    again: bool


def _recipe() -> Any:
    from dataclasses import replace

    recipe = get_recipe("digits_resnet18")
    model_args = {"channels": (4, 4, 4, 4), "layers": (1, 2, 1, 1)}
    optim = replace(recipe.optim, warmup_epochs=0)
    machine = replace(recipe.machine, accelerator="cpu", threads=1)
    return replace(recipe, epochs=3, model_args=model_args, optim=optim, machine=machine)


def _train(folder: Path) -> None:
    from mrla.train.fitting import train

    train(_recipe(), folder / "run", progress=False)


def _compare(folder: Path) -> None:
    mrla.compare(_recipe(), arms=["plain", "light"], seeds=2, out=folder / "run", jobs=2)


def _untimed(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _untimed(value) for key, value in content.items() if key not in TIMED}
    return [_untimed(value) for value in content] if isinstance(content, list) else content


def _files(folder: Path) -> dict[str, Any]:
    """Each file of a run or comparison by its content; checkpoints hold times, and pictures are drawn of the rest."""
    found: dict[str, Any] = {}
    for path in sorted((folder / "run").rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = _untimed(json.loads(path.read_text()))
        elif path.suffix in (".safetensors", ".csv") and path.name != "table.csv":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_file() and path.name.startswith(".") and ".mrla-" in path.name:
            found[name] = "left behind"
    return found


def _networks() -> list[Any]:
    import timm

    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=3)
        networks.append(mrla.attach(model, init="released").eval())
    return networks


_NAMES = (["a", "b", "c"], ["d", "e", "f"])


def _save_once(folder: Path) -> None:
    mrla.save(_networks()[0], folder / "net", class_names=_NAMES[0])


def _save_often(folder: Path) -> None:
    networks = _networks()
    for turn in range(1, 12):
        mrla.save(networks[turn % 2], folder / "net", class_names=_NAMES[turn % 2])


def _which(folder: Path) -> str:
    """Whether the folder gives one of the two networks, with its own names."""
    model: Any = mrla.load(folder / "net")
    for network, names in zip(_networks(), _NAMES, strict=True):
        own = network.state_dict()
        alike = all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
        if alike and model.pretrained_cfg["label_names"] == names:
            return "one of the two"
    return "neither"


WORK = {
    "train": Work(lambda folder: None, _train, _files, again=True),
    "compare": Work(lambda folder: None, _compare, _files, again=True),
    "save": Work(_save_once, _save_often, _which, again=False),
}


def forked(work: Callable[[Path], Any], folder: Path, kill_after: float | None = None) -> float | None:
    """Does some work in a fork; the seconds it took to its end, None where it was killed before that.

    Raises:
        RuntimeError: If it ended with an error.
    """
    began = time.monotonic()
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        try:
            # What is printed is not looked at, but for errors.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(folder / "errors.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            work(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        deadline = time.monotonic() + kill_after
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
            time.sleep(0.002)
        os.kill(process, signal.SIGKILL)  # this process alone: the workers of a comparison must notice by themselves
    _, status = os.waitpid(process, 0)
    if os.waitstatus_to_exitcode(status) == 1:
        raise RuntimeError((folder / "errors.txt").read_text()[-2000:])
    return time.monotonic() - began if os.waitstatus_to_exitcode(status) == 0 else None


def count(name: str, kills: int, generator: random.Random) -> tuple[dict[str, int], list[str]]:
    """Outcomes of so many kills of some work, and what was lost."""
    work = WORK[name]
    counts: Counter[str] = Counter()
    lost: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        whole.mkdir()
        work.prepare(whole)
        took = forked(work.start, whole)
        assert took is not None
        expected = work.left(whole)
        while counts["before the end"] < kills:
            folder = Path(place) / f"try{counts['tries']}"
            folder.mkdir()
            work.prepare(folder)
            counts["tries"] += 1
            moments = [generator.uniform(0, took) for _ in range(generator.choice((1, 1, 2)) if work.again else 1)]
            try:
                for moment in moments:
                    counts["kills"] += 1
                    ended = forked(work.start, folder, moment)
                    counts["before the end"] += ended is None
                    if ended is not None and moment is moments[0]:
                        # The whole run was slower than this one: later moments are drawn from less, to fall into work.
                        took = min(took, ended)
                if work.again:
                    forked(work.start, folder)
                found = work.left(folder)
                problem = None if found == expected else f"differs: {_difference(expected, found)}"
            except (RuntimeError, ValueError, OSError) as error:
                problem = " ".join(str(error).split())[-500:]
            counts["lost" if problem else "equal"] += 1
            if problem:
                lost.append(f"{name}, killed after {', '.join(f'{moment:.3f} s' for moment in moments)}: {problem}")
    return dict(counts), lost


def _difference(expected: Any, found: Any) -> str:
    if not isinstance(expected, dict) or not isinstance(found, dict):
        return f"{found} in the place of {expected}"
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return ", ".join(names[:5])


def main() -> int:
    """Kills, prints the counts and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kills in (("train", 120), ("compare", 20), ("save", 60)):
        parser.add_argument(f"--{name}", type=int, default=kills, help=f"kills of {name} before its end ({kills})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="JSON (results/killed_runs_HARDWARE_DATE.json)")
    options = parser.parse_args()
    started = datetime.now(UTC)
    torch.set_num_threads(1)  # a fork has none of the others
    import mrla.analysis.comparison.comparing
    import mrla.train.fitting  # noqa: F401

    counts, lost = {}, []
    for name in WORK:
        if kills := getattr(options, name):
            counts[name], bad = count(name, kills, random.Random(options.seed))
            lost += bad
            print(f"{name}: {json.dumps(counts[name])}", flush=True)
    print("\n".join(lost))
    write_result("killed_runs", started, options, torch.get_num_threads(), counts=counts, lost=lost)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
