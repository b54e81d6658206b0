"""How long does the Python around one mixer take, in microseconds of the processor's time?

    python benchmarks/mixer_overhead.py [--rounds 25] [--places hot narrow wide] [--out FILE.json]
    python benchmarks/mixer_overhead.py --against OTHER_CHECKOUT

Maps are so small that arithmetic is negligible; torch has one thread. Three places:

- ``hot``: four mixers of 32 channels called in turn, again and again on the same maps of 2x2 pixels;
- ``narrow``: a ResNet-50 of 32 to 64 channels on images of 16x16 (maps of 4x4 to 1x1), attached minus plain;
- ``wide``: the same at full width: its 94 MB of weights empty the caches between two mixers.

Each in inference and in training (forward, and backward to norms and mixers; no optimizer), with the kernels
(``fused``) and with torch's operators (``reference``). ``--against`` gives a second source tree: each tree runs in a
process of its own, and the two take turns round by round. Only `mrla.attach`, the mixers of `mrla.ops` and
`mrla.ops.use` are called, so that older checkouts can be measured too.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import mrla

METHODS = {"light": mrla.ops.MRLALight, "base": mrla.ops.MRLABase}
PLACES = ("hot", "narrow", "wide")
MODES = ("inference", "training")
HOT_MIXERS = 4
REPEATS = {"hot": 25, "narrow": 4, "wide": 1}  # passes in one timed turn

Action = Callable[[], object]
Arms = dict[str, tuple[Action, int]]


def hot_arms(mode: str) -> Arms:
    """The arms of the hot place: what one turn runs, and how many mixers it calls."""
    torch.manual_seed(0)
    x, shortcut = torch.randn(2, 2, 32, 2, 2)
    arms: Arms = {}
    for method, mixer_class in METHODS.items():
        mixers = [mixer_class(32, init="released").train(mode == "training") for _ in range(HOT_MIXERS)]
        for path in paths():
            arms[f"{method} {path}"] = (timed_action(chain(mixers, x, shortcut), mode, path, "hot"), HOT_MIXERS)
    return arms


def chain(mixers: Sequence[nn.Module], x: torch.Tensor, shortcut: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A pass through mixers that stand one behind another."""

    def run() -> torch.Tensor:
        # The input wants a gradient as it does inside a network.
        out, memory = x.clone().requires_grad_(torch.is_grad_enabled()), None
        for mixer in mixers:
            out, memory = mixer(out, shortcut, memory)
        return out

    return run


def network_arms(place: str, mode: str) -> Arms:
    """The plain network (no mixer) and the attached ones."""
    torch.manual_seed(0)
    width: dict[str, Any] = {"channels": (8, 8, 16, 16), "stem_width": 8} if place == "narrow" else {}
    plain = timm.create_model("resnet50", num_classes=10, **width)
    for module in plain.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            # Their gradients, 94 MB of fresh memory a pass at full width, would drown the mixers.
            module.requires_grad_(False)
    images = torch.randn(2, 3, 16, 16)
    arms: Arms = {}
    for method in (None, *METHODS):
        network = copy.deepcopy(plain) if method is None else mrla.attach(copy.deepcopy(plain), method, init="released")
        network.train(mode == "training")
        mixers = sum(isinstance(module, mrla.ops.LayerMixer) for module in network.modules())
        for path in paths() if method else ("reference",):
            run = lambda network=network: network(images)  # noqa: E731
            name = f"{method} {path}" if method else "plain"
            arms[name] = (timed_action(run, mode, path, place), mixers)
    return arms


def timed_action(run: Callable[[], torch.Tensor], mode: str, path: str, place: str) -> Action:
    """Repeats a pass, with its backward in training."""
    inference = mode == "inference"

    def action() -> None:
        with mrla.ops.use("reference") if path == "reference" else nullcontext(), torch.inference_mode(inference):
            for _ in range(REPEATS[place]):
                out = run()
                if not inference:
                    out.sum().backward()

    return action


def paths() -> tuple[str, ...]:
    """The ways in which mixers can be computed here; kernels need numba."""
    return ("fused", "reference") if mrla.ops.chosen_path() == "fused" else ("reference",)


class Rounds:
    """All arms of the places asked for, ready to be timed round by round."""

    def __init__(self, places: Sequence[str]):
        torch.set_num_threads(1)
        self.arms: dict[tuple[str, str], Arms] = {}
        for place in places:
            for mode in MODES:
                self.arms[place, mode] = hot_arms(mode) if place == "hot" else network_arms(place, mode)
        self.turn = 0
        self.run()  # compiles kernels, allocates

    def run(self) -> dict[str, float]:
        """Microseconds a mixer, by ``place mode method path``, of one round."""
        self.turn += 1
        values: dict[str, float] = {}
        for (place, mode), arms in self.arms.items():
            names = list(arms)
            # Who follows whom changes from round to round.
            turned = names[self.turn % len(names) :] + names[: self.turn % len(names)]
            taken = {name: processor_time(arms[name][0]) / REPEATS[place] for name in turned}
            for name in names:
                if name != "plain":
                    values[f"{place} {mode} {name}"] = 1e6 * (taken[name] - taken.get("plain", 0.0)) / arms[name][1]
        return values


def processor_time(action: Action) -> float:
    """Seconds that this process computes for an action: other processes on the machine disturb the clock more."""
    start = time.process_time()
    action()
    return time.process_time() - start


def serve(places: Sequence[str]) -> None:
    """Runs as one of two workers: says which tree it has, then answers each line with a round."""
    rounds = Rounds(places)
    print(json.dumps({"tree": str(source_tree())}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(rounds.run()), flush=True)


class Worker:
    """Another process that measures the mixers of one source tree."""

    def __init__(self, tree: Path, places: Sequence[str]):
        path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve", "--places", *places],
            env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        imported = Path(self._answer()["tree"])
        if imported != tree:
            self.close()
            raise ValueError(f"the source tree must hold the package mrla: got {tree}, and {imported} was imported")

    def run(self) -> dict[str, float]:
        """One round, as that of `Rounds`."""
        assert self.process.stdin is not None
        self.process.stdin.write("round\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with exit code {self.process.wait()}; see its message above")
        return json.loads(line)


def source_tree() -> Path:
    """The folder that holds the package mrla which was imported."""
    return Path(mrla.__file__).resolve().parents[1]


def commit(tree: Path) -> str | None:
    """The commit of a checkout, with ``+changes`` where tracked files differ; None outside of one."""
    git = ["git", "-C", str(tree)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:  # no git
        return None
    return head.stdout.strip() + "+changes" * bool(changed.stdout) if head.returncode == 0 else None


def measure(trees: dict[str, Path], places: Sequence[str], rounds: int) -> dict[str, list[dict[str, float]]]:
    """The rounds of each tree, which take turns; a lone tree is measured in this process."""
    if len(trees) == 1:
        own = Rounds(places)
        return {name: [own.run() for _ in range(rounds)] for name in trees}
    workers: dict[str, Worker] = {}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    try:
        for name, tree in trees.items():
            workers[name] = Worker(tree, places)
        for turn in range(rounds):
            for name in list(trees) if turn % 2 else reversed(list(trees)):
                found[name].append(workers[name].run())
    finally:
        for worker in workers.values():
            worker.close()
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile."""
    p10, median, p90 = map(float, np.quantile(values, (0.1, 0.5, 0.9)))
    return {"median": median, "p10": p10, "p90": p90}


def summarise(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Microseconds a mixer of each tree, and the ratio of the first to the second where both rounds were positive."""
    first = next(iter(found.values()))
    results: dict[str, Any] = {}
    for key in first[0]:
        by_tree = {name: [values[key] for values in rounds] for name, rounds in found.items()}
        row: dict[str, Any] = {"n": len(first), "microseconds": {name: spread(v) for name, v in by_tree.items()}}
        if len(found) == 2:
            # Attached minus plain may come out below zero where a disturbance hit the plain pass.
            pairs = [(own, other) for own, other in zip(*by_tree.values(), strict=True) if own > 0 and other > 0]
            row["ratio"] = {"n": len(pairs), **spread([own / other for own, other in pairs])} if pairs else None
        results[key] = row
    return results


def table(results: dict[str, Any]) -> list[str]:
    """The printed lines: one for each place, mode, method and path."""
    trees = list(next(iter(results.values()))["microseconds"])
    lines = [f"{'microseconds a mixer':<34}{'n':>4}" + "".join(f"{name:>26}" for name in trees)]
    lines[0] += f"{'ratio':>24}" if len(trees) == 2 else ""
    for key, row in results.items():
        cells = ["{median:.1f} ({p10:.1f} to {p90:.1f})".format(**row["microseconds"][name]) for name in trees]
        line = f"{key:<34}{row['n']:>4}" + "".join(f"{cell:>26}" for cell in cells)
        if len(trees) == 2:
            ratio = row["ratio"]
            line += f"{'{median:.3f} ({p10:.3f} to {p90:.3f})'.format(**ratio) if ratio else 'none':>24}"
        lines.append(line)
    return lines


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--against", type=Path, default=None, help="another source tree, such as an older checkout")
    parser.add_argument("--out", type=Path, default=None, help="JSON (results/mixer_overhead_HARDWARE_DATE.json)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.places)
    if options.rounds < 1:
        parser.error(f"rounds must be positive: got {options.rounds}")
    if options.against is not None and not (options.against / "mrla" / "__init__.py").is_file():
        parser.error(f"--against must be a source tree that holds mrla/__init__.py: got {options.against}")
    # Not in a worker: an older checkout may keep these elsewhere.
    from result_file import write_result

    started = datetime.now(UTC)
    trees = {"this": source_tree()}
    if options.against is not None:
        trees["against"] = options.against.resolve()
        options.against = str(options.against)
    found = measure(trees, options.places, options.rounds)
    results = summarise(found)
    print("\n".join(table(results)))
    vars(options).pop("serve")
    write_result(
        "mixer_overhead", started, options, 1, results=results, rounds=found,
        trees={name: {"path": str(tree), "commit": commit(tree)} for name, tree in trees.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
