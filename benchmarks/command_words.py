"""What do the commands make of values that no flag can mean? One line and exit code 2, or the value is one.

    python benchmarks/command_words.py [--commands train eval ...] [--share 1.0] [--seed 0] [--out FILE.json]

Every flag that a command's `--help` lists is given each of twelve values, in a fork of a process that has imported all.
Counted are: `refused` (exit code 2 and one line), `taken` (exit code 0; which flags and values those are stands in the
JSON, to be looked at: a text is a fine `--out`), and what must not be: `traceback`, `other` (another exit code, or more
lines) and `hang` (three minutes). Exits with 1 if there is one of the last three.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from result_file import write_result

LONGEST = 180
VALUES = ("", "x", "-1", "0.5", "nan", "1e400", "9" * 401, "[", "{}", "null", "../x", "[/x]\udcff")
TINY = (
    *("--epochs", "1", "--model_args.channels", "[4,4,4,4]", "--model_args.layers", "[1,2,1,1]"),
    *("--batch_size", "256", "--machine.accelerator", "cpu", "--machine.threads", "1", "--progress", "false"),
)
CPU = ("--machine.accelerator", "cpu", "--machine.threads", "1")
AGAIN = ("--overwrite", "true", "--progress", "false")
"""Else all but the first are refused because of what the first has written."""
SHORT = ("--rounds", "1", "--batch_size", "2", "--image_size", "32", "--device", "cpu")
COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", *TINY),
    "compare": ("compare", *TINY, "--seeds", "2", "--jobs", "2"),
    "eval": ("eval", "run", *CPU),
    "bench": ("bench", "--arms", "plain", "--quantities", "inference", *SHORT),
    "predict": ("predict", "net", "photo.png", *CPU),
    "explain": ("explain", "run", "--cuts", "mixers", "--max_images", "20", *CPU, *AGAIN),
    "prune": ("prune", "run", "--max_images", "20", *CPU, *AGAIN),
    "models": ("models",),
    "chains": ("chains", "resnet18"),
    "export": ("export", "net", "--overwrite", "true"),
    "convert": ("convert", "net.pth", "ours", "--arch", "paddle_resnet18"),
}


def prepare(folder: Path) -> None:
    """What the commands read, in the current folder."""
    import timm

    import mrla

    model = mrla.attach(timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=3), "light")
    mrla.save(model, "net", class_names=["a", "b", "c"])
    torch.save(model.state_dict(), "net.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    # In a fork too: a process that has run a backward pass has threads, which its forks lack.
    outcome, text = run([*COMMANDS["train"], "--out", "run", "--arm", "light"], folder)
    assert outcome == "taken", text


def run(words: list[str], folder: Path) -> tuple[str, str]:
    """The outcome of a command in a fork, and what it wrote to standard error."""
    errors = folder / "errors.txt"
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        code = 70
        with contextlib.suppress(BaseException):
            from mrla.cli import main

            code = _code(main, words)
        os._exit(code)
    deadline = time.monotonic() + LONGEST
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return "hang", ""
        time.sleep(0.01)
    _, status = os.waitpid(process, 0)
    code, text = os.waitstatus_to_exitcode(status), errors.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.startswith("mrla: error:")]
    if "Traceback" in text:
        return "traceback", text
    if code == 2 and len(lines) == 1 and text.rstrip().endswith(lines[0]):
        return "refused", text
    return ("taken" if code == 0 else "other"), f"exit code {code}: {text}"


def _code(main: Callable[[list[str]], int], words: list[str]) -> int:
    try:
        return main(words)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 70


def flags_of(words: tuple[str, ...]) -> list[str]:
    """The flags that a command's help lists."""
    import io

    from mrla.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        main([*words[:1], "--help"])
    found = re.findall(r"(?<![\w-])--[a-z_][\w.]*", said.getvalue())
    return [flag for flag in dict.fromkeys(found) if flag not in ("--help", "--print_config")]


def main() -> int:
    """Tries, prints the counts and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", nargs="+", choices=tuple(COMMANDS), default=tuple(COMMANDS))
    parser.add_argument("--share", type=float, default=1.0, help="which part of all words is tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="JSON (results/command_words_HARDWARE_DATE.json)")
    options = parser.parse_args()
    started, generator = datetime.now(UTC), random.Random(options.seed)
    torch.set_num_threads(1)  # a fork has none of the others
    out = options.out.absolute() if options.out else None
    counts: dict[str, dict[str, int]] = {}
    taken: dict[str, list[str]] = {}
    wrong: list[str] = []
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        here = Path(place) / "in" / "here"  # "../x" stays in the place
        here.mkdir(parents=True)
        os.chdir(here)
        try:
            prepare(Path(place))
            for name in options.commands:
                found: Counter[str] = Counter()
                for flag in flags_of(COMMANDS[name]):
                    for value in VALUES:
                        if generator.random() >= options.share:
                            continue
                        outcome, text = run([*COMMANDS[name], flag, value], Path(place))
                        found[outcome] += 1
                        if outcome == "taken":
                            taken.setdefault(f"{name} {flag}", []).append(ascii(value[:20]))
                        elif outcome != "refused":
                            wrong.append(f"{name} {flag} {value[:20]!a}: {outcome}: {text[-300:]!a}")
                            print(wrong[-1], flush=True)
                counts[name] = dict(sorted(found.items()))
                print(f"{name}: {json.dumps(counts[name])}", flush=True)
        finally:
            os.chdir(before)
    options.out = out
    write_result("command_words", started, options, torch.get_num_threads(), counts=counts, taken=taken, wrong=wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
