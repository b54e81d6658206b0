"""What the training loop adds to the bare step on ``digits_resnet18``: ``python benchmarks/training_loop.py``.

Bare is a plain Python loop over the same batches: forward, loss, backward, optimizer, schedule. Loop is
`mrla.train.fitting.train` itself (Lightning, scores, history, finiteness). Both train the same network from the same
weights and must see the same losses; a bare epoch is timed right before every epoch of the loop, in the same process,
so that drift hits both alike. The processor's own time is taken beside the clock's: it hardly sees what else the
machine does.
"""

import argparse
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import lightning as L
import numpy as np
from torch.nn.functional import cross_entropy

from mrla.data.randomness import derive_seed
from mrla.data.samples import loader
from mrla.files.atomic_write import write_json
from mrla.train import Recipe, fitting, get_recipe
from mrla.train.history import History
from mrla.train.recipe import as_dict
from mrla.train.recipe_tasks import build_network
from mrla.train.schedule import make_optimizer, make_schedule

ARMS = ("plain", "light")
PARTS = ("bare", "loop", "whole")
CLOCKS = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}

Times = dict[str, dict[str, list[float]]]
"""By clock and part, one number for each epoch."""


def no_times() -> Times:
    """Nothing timed yet."""
    return {clock: {part: [] for part in PARTS} for clock in CLOCKS}


def read_clocks() -> dict[str, float]:
    """What the clocks say."""
    return {name: clock() for name, clock in CLOCKS.items()}


def note(times: Times, part: str, start: dict[str, float]) -> None:
    """Notes how long a part of an epoch took."""
    for name, now in read_clocks().items():
        times[name][part].append(now - start[name])


class Bare:
    """The steps of a recipe in a plain Python loop."""

    def __init__(self, recipe: Recipe):
        self.smoothing, self.epoch = recipe.label_smoothing, 0
        self.batches: Any = loader(
            recipe.data.open("train", seed=recipe.seed),
            batch_size=recipe.batch_size,
            seed=derive_seed(recipe.seed, "train"),
            shuffle=True,
            drop_last=True,
            workers=recipe.data.workers,
        )
        self.model = build_network(recipe).train()
        self.optimizer = make_optimizer(self.model, recipe.optim)
        self.schedule = make_schedule(
            self.optimizer, recipe.optim, epochs=recipe.epochs, steps_per_epoch=len(self.batches)
        )

    def run_epoch(self, times: Times) -> float:
        """The next epoch's mean loss."""
        self.batches.sampler.set_epoch(self.epoch)
        self.epoch += 1
        losses = []
        start = read_clocks()
        for images, labels in self.batches:
            loss = cross_entropy(self.model(images), labels, label_smoothing=self.smoothing)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.detach())
        note(times, "bare", start)
        return float(sum(losses)) / len(losses)


class Timed(History):
    """The run's history, which times the loop's epochs and runs a bare one before each."""

    def __init__(self, folder: Path, bare: Bare):
        super().__init__(folder)
        self.bare, self.times = bare, no_times()
        self.losses: list[float] = []
        self._start: dict[str, float] | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_epoch()
        self.losses.append(self.bare.run_epoch(self.times))
        self._start = read_clocks()
        super().on_train_epoch_start(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The first thing that happens after the last training batch, its schedule's step and its checks.
        assert self._start is not None
        note(self.times, "loop", self._start)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_epoch()

    def _end_epoch(self) -> None:
        if self._start is not None:
            note(self.times, "whole", self._start)


def time_round(recipe: Recipe) -> Times:
    """Times of each epoch but the first, which warms up: bare, loop, and whole (validation and files too)."""
    with tempfile.TemporaryDirectory() as folder:
        timed = Timed(Path(folder), Bare(recipe))
        with patch.object(fitting, "History", lambda _: timed):
            run = fitting.train(recipe, folder, progress=False)
    losses = [row["train_loss"] for row in run.epochs]
    if not np.allclose(losses, timed.losses, rtol=1e-4):
        raise RuntimeError(f"bare and loop must make the same steps: got the losses {timed.losses} and {losses}")
    return {clock: {part: values[1:] for part, values in parts.items()} for clock, parts in timed.times.items()}


def summarise(times: Times, steps: int) -> dict[str, Any]:
    """By clock: milliseconds a step, and each epoch's time as a multiple of the bare epoch's before it."""
    summary: dict[str, Any] = {"n": len(times["seconds"]["bare"]), "steps_per_epoch": steps}
    for clock, parts in times.items():
        entry: dict[str, Any] = {f"{part}_ms_per_step": 1000 * median(parts[part]) / steps for part in PARTS}
        for part in ("loop", "whole"):
            ratios = np.asarray(parts[part]) / np.asarray(parts["bare"])
            p10, middle, p90 = map(float, np.quantile(ratios, (0.1, 0.5, 0.9)))
            entry[f"{part}_to_bare"] = {"median": middle, "p10": p10, "p90": p90}
        summary[clock] = entry
    return summary


def hardware() -> str:
    """The processor, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def commit() -> dict[str, Any]:
    """The commit of this checkout and whether files differ from it; nulls outside of one."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "changed": None if changed is None else bool(changed)}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results for a reader."""
    lines = [["arm", "clock", "bare", "loop", "loop / bare (p10-p90)", "with validation, files", "n"]]
    for arm, result in results.items():
        for clock, label in (("seconds", "wall"), ("cpu_seconds", "cpu")):
            entry = result[clock]
            times = [f"{entry[f'{part}_ms_per_step']:.2f} ms" for part in ("bare", "loop")]
            ratios = [
                "{median:.3f} ({p10:.3f}-{p90:.3f})".format(**entry[f"{part}_to_bare"]) for part in ("loop", "whole")
            ]
            lines.append([arm, label, *times, *ratios, str(result["n"])])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Times both arms in turn, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description="What the training loop adds to the bare step.")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each arm")
    parser.add_argument("--epochs", type=int, default=8, help="timed epochs in each run, after one that warms up")
    parser.add_argument(
        "--out", type=Path, help="the JSON; benchmarks/results/training_loop_HARDWARE_DATE.json if not given"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.epochs < 1:
        parser.error(f"rounds and epochs must be positive: got {options.rounds} and {options.epochs}")
    recipe = get_recipe("digits_resnet18")
    # No warm-up of the learning rate: it would have to be shorter than the run.
    recipe = replace(recipe, epochs=options.epochs + 1, optim=replace(recipe.optim, warmup_epochs=0))
    recipes = {arm: replace(recipe, arm=arm) for arm in ARMS}
    started = datetime.now(UTC)
    samples = {arm: no_times() for arm in ARMS}
    for _ in range(options.rounds):
        for arm in ARMS:
            for clock, parts in time_round(recipes[arm]).items():
                for part, values in parts.items():
                    samples[arm][clock][part] += values
    steps = len(recipe.data.open("train")) // recipe.batch_size
    results = {arm: summarise(samples[arm], steps) for arm in ARMS}
    slug = re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-")
    out = options.out or Path(__file__).parent / "results" / f"training_loop_{slug}_{started:%Y-%m-%d}.json"
    content = {
        "theme": "training_loop",
        "date": started.isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": fitting.versions(),
        **commit(),
        "options": {"rounds": options.rounds, "epochs": options.epochs},
        "recipes": {arm: as_dict(recipes[arm]) for arm in ARMS},
        "results": results,
        "epochs": samples,
    }
    write_json(out, content)
    print(table(results))
    print(f"written: {out}")


if __name__ == "__main__":
    main()
