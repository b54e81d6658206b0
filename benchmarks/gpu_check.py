"""A first look at a GPU: do attached networks compute there what they compute on a CPU, and then, how fast?

    python benchmarks/gpu_check.py [--device cuda] [--quick] [--out FOLDER]
    python benchmarks/gpu_check.py --show FILE.json

1. Versions, device and driver. Then equality, on a small ResNet, ViT and ConvNeXt with maps of odd sizes: networks
   with mixers at their start against plain ones, bit for bit; and every method on the device against float64 on the
   CPU, outputs, gradients and running statistics.
2. Speed and peak memory of plain, light and base: inference and training step, and compiled.

No speed is reported where an equality row does not hold (``--force`` measures all the same), and the exit code is then
1. Every row is written as soon as it is known, and what there is no time for is a row that says so. ``--quick`` runs
all of it with tiny networks, to see that the script works. It needs torch, torchvision, timm, jaxtyping and
safetensors, and no installation: the source tree that it lies in is the one that it measures.
"""

import argparse
import copy
import gc
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # nothing can be installed on some machines

import timm  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

import mrla  # noqa: E402
from mrla.analysis.benchmarking.record import commit, hardware, versions  # noqa: E402
from mrla.files.atomic_write import write_json  # noqa: E402

RESULTS = Path(__file__).parent / "results"
METHODS: dict[str, dict[str, Any]] = {
    "light": {"method": "light"},
    "light, carry=output": {"method": "light", "carry": "output"},
    "base": {"method": "base"},
    "exact": {"method": "exact"},
    "dw": {"method": "dw"},
}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
FLOAT32_TOLERANCE = 0.005
"""Largest error allowed in float32, as a part of the reference's root mean square (that of flash-linear-attention)."""
BFLOAT16_FACTOR = 3.0
"""Largest error allowed under autocast, in errors that rounding makes there anyway: those of the plain network on the
device, or of the same network by torch's operators on the CPU under autocast, whichever is larger.

The second is the one that counts: how much a network amplifies rounding is its own (batch statistics of few values,
sums that cancel), and one sample of a rounding error says its size within a factor of two or so.
"""
BFLOAT16_FLOOR = 2.0**-6
"""Errors under autocast that are always allowed: four times the spacing of bfloat16 just below 1."""

Action = Callable[[], object]
Row = dict[str, Any]


class OutOfTime(Exception):
    """The time that was left for a part of the run is over."""


class Report:
    """The rows so far, and the file that holds them after each."""

    def __init__(self, path: Path, head: dict[str, Any]):
        self.path = path
        self.content: dict[str, Any] = {**head, "complete": False, "rows": []}

    def add(
        self,
        kind: str,
        name: str,
        settings: dict[str, Any],
        values: dict[str, Any],
        ok: bool | None,
        tolerance: Any = None,
    ) -> None:
        """Adds a row, writes the file and prints the row. `ok` is None where nothing was measured."""
        row = {"kind": kind, "name": name, "settings": settings, "values": values, "tolerance": tolerance, "ok": ok}
        self.content["rows"].append(row)
        self.write()
        print(line_of(row), flush=True)

    def write(self) -> None:
        """Replaces the file by one with all rows, or leaves it as it was."""
        write_json(self.path, self.content)

    def holds(self) -> bool:
        """Whether every equality row held."""
        return all(row["ok"] is True for row in self.content["rows"] if row["kind"] == "equality")


class Clock:
    """The time that the run has left."""

    def __init__(self, seconds: float):
        self.deadline = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the run must end."""
        return self.deadline - time.monotonic()


# ---- equality ------------------------------------------------------------------------------------------------------


def small_networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks of a few thousand weights by name, with images whose maps have odd sides."""
    made: dict[str, tuple[nn.Module, Tensor]] = {}
    arguments: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
        # 45x37 pixels: maps of 12x10, 6x5, 3x3 and 2x2
        "ResNet": ("resnet26", {"channels": (8, 8, 16, 16), "stem_width": 8}, (45, 37)),
        # 15 tokens and the class token
        "ViT": (
            "vit_tiny_patch16_224",
            {"img_size": (40, 24), "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2},
            (40, 24),
        ),
        # 108x76 pixels: maps of 27x19, 13x9, 6x4 and 3x2
        "ConvNeXt": ("convnext_atto", {"depths": (2, 2, 2, 2), "dims": (32, 32, 64, 64)}, (108, 76)),
    }
    for name, (model, options, size) in arguments.items():
        torch.manual_seed(0)
        made[name] = timm.create_model(model, num_classes=10, **options), torch.randn(5, 3, *size)
    return made


def randomize(network: nn.Module) -> None:
    """Moves norms, scales and biases away from ones and zeros, where errors would not show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if tensor.is_floating_point() and tensor.dim() <= 1:
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.mul_(0.75 + 0.5 * noise) if "var" in name else tensor.add_(0.4 * noise - 0.2)


class Pass:
    """Output, gradients and running statistics of one pass forward and back, as float64 on the CPU."""

    def __init__(self, network: nn.Module, images: Tensor, training: bool, context: AbstractContextManager):
        # A copy, since statistics move and gradients add up.
        network = copy.deepcopy(network).train(training)
        images = images.detach().clone().requires_grad_()
        with context:
            output = network(images)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        (output.double() * weights.to(output.device)).sum().backward()
        self.output = as_reference(output)
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        self.gradients = {name: as_reference(gradient) for name, gradient in gradients.items()}
        self.gradients["images"] = as_reference(images.grad)
        running = {name: b for name, b in network.named_buffers() if "running" in name}
        self.statistics = {name: as_reference(b) for name, b in running.items()}


def as_reference(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.detach().to("cpu", torch.float64)


def rms(tensor: Tensor) -> float:
    """Root mean square; not a number where one element is none."""
    return float(tensor.square().mean().sqrt())


def relative_error(got: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    """Root mean square of the difference by that of the reference, or by `floor` where that is larger."""
    if not torch.isfinite(got).all():
        return float("inf")
    return rms(got - wanted) / max(rms(wanted), floor, 1e-30)


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor], floor: float) -> tuple[float, str | None]:
    """The largest relative error of tensors of the same names, and whose it is."""
    if set(got) != set(wanted):
        return float("inf"), f"only one side has {sorted(set(got) ^ set(wanted))[:3]}"
    errors = {name: relative_error(got[name], wanted[name], floor) for name in wanted}
    name = max(errors, key=lambda key: errors[key], default=None)
    return (0.0, None) if name is None else (errors[name], name)


def together(gradients: dict[str, Tensor], of_mixers: bool) -> Tensor:
    """The gradients of a network's own parameters, or those of its mixers', as one vector."""
    chosen = [g.flatten() for name, g in sorted(gradients.items()) if (".mrla." in name) == of_mixers]
    return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.float64)


def float32_errors(got: Pass, wanted: Pass) -> dict[str, Any]:
    """The largest relative error forward, backward and of the statistics, each tensor by itself.

    A gradient that is zero but for rounding has no relative error: what is below a thousandth of the median gradient
    is counted by that.
    """
    sizes = sorted(rms(gradient) for gradient in wanted.gradients.values())
    backward, of = worst(got.gradients, wanted.gradients, sizes[len(sizes) // 2] / 1000)
    return {
        "forward": relative_error(got.output, wanted.output),
        "backward": backward,
        "backward_worst": of,
        "statistics": worst(got.statistics, wanted.statistics, 0.0)[0],
    }


def bfloat16_errors(got: Pass, wanted: Pass) -> dict[str, Any]:
    """Relative errors of the output and of all gradients as one vector: single small ones are mostly rounding."""
    found = {"forward": relative_error(got.output, wanted.output)}
    for name, of_mixers in (("backward", False), ("backward_mixers", True)):
        if len(reference := together(wanted.gradients, of_mixers)):
            found[name] = relative_error(together(got.gradients, of_mixers), reference)
    return found


class Case(NamedTuple):
    """One way to run a network on the device."""

    device: torch.device
    mode: str
    layout: str
    autocast: bool
    path: str

    @property
    def settings(self) -> dict[str, Any]:
        """What the row says of it."""
        dtype = "bfloat16 autocast" if self.autocast else "float32"
        return {"mode": self.mode, "format": self.layout, "dtype": dtype, "path": self.path}

    @property
    def training(self) -> bool:
        """Whether norms take the batch's statistics."""
        return self.mode == "train"

    def move(self, thing: Any) -> Any:
        """A copy of a network or images on the device, in the layout."""
        return copy.deepcopy(thing).to(self.device).to(memory_format=FORMATS[self.layout])

    def context(self) -> AbstractContextManager:
        """What a pass runs inside."""
        return computing(self.device, self.path, self.autocast)


@contextmanager
def computing(device: torch.device, path: str, autocast: bool) -> Iterator[None]:
    """Chooses how mixers are computed, and bfloat16 by autocast or float32."""
    with (
        mrla.ops.use("reference") if path == "reference" else nullcontext(),
        torch.autocast(device.type, torch.bfloat16, enabled=autocast),
    ):
        yield


def check_equality(report: Report, device: torch.device, clock: Clock, path: str) -> None:
    """Adds every equality row; none stops the others."""
    cases = [
        Case(device, mode, layout, autocast, path)
        for mode, layout, autocast in itertools.product(("eval", "train"), FORMATS, (False, True))
    ]
    for network, (plain, images) in small_networks().items():
        randomize(plain)
        plain_errors = check_plain(report, network, plain, images, cases, clock)
        for method, options in METHODS.items():
            check_start(report, f"{network}, {method}", plain, options, images, cases, clock)
            check_device(report, f"{network}, {method}", plain, options, images, cases, plain_errors, clock)


def check_start(
    report: Report,
    name: str,
    plain: nn.Module,
    options: dict[str, Any],
    images: Tensor,
    cases: Sequence[Case],
    clock: Clock,
) -> None:
    """Does an attached network at its start give the plain one's output, bit for bit?"""
    name += ": same bits at the start"
    with guarded(report, "equality", name, {}, clock):
        attached = mrla.attach(copy.deepcopy(plain), **options, init="identity")
        for case in cases:
            with guarded(report, "equality", name, case.settings, clock):
                outputs = []
                for network in (plain, attached, plain):
                    moved = case.move(network).train(case.training)
                    with torch.no_grad(), case.context():
                        outputs.append(moved(case.move(images)))
                of_plain, of_attached, again = outputs
                equal = torch.equal(of_attached, of_plain)
                values = {
                    "equal": equal,
                    "largest_difference": finite(float((of_attached.double() - of_plain.double()).abs().max())),
                    # Where a device does not repeat itself, a difference says nothing of mixers.
                    "plain_repeats": torch.equal(of_plain, again),
                }
                report.add("equality", name, case.settings, values, equal, "bit-equal")


def check_device(
    report: Report,
    name: str,
    plain: nn.Module,
    options: dict[str, Any],
    images: Tensor,
    cases: Sequence[Case],
    plain_errors: dict[Case, dict[str, float]],
    clock: Clock,
) -> None:
    """Is what the device computes with mixers at work near enough to float64 on the CPU?"""
    name += ": device against CPU"
    with guarded(report, "equality", name, {}, clock):
        torch.manual_seed(2)
        attached = mrla.attach(copy.deepcopy(plain), **options, init="released")
        randomize(attached)
        wanted = references(attached, images)
        rounding = {mode: rounding_errors(attached, images, mode, wanted[mode]) for mode in wanted}
        for case in cases:
            with guarded(report, "equality", name, case.settings, clock):
                got = Pass(case.move(attached), case.move(images), case.training, case.context())
                usual = {"plain": plain_errors.get(case, {}), "on_cpu": rounding[case.mode]}
                device_row(report, name, got, wanted[case.mode], case, usual)


def check_plain(
    report: Report, network: str, plain: nn.Module, images: Tensor, cases: Sequence[Case], clock: Clock
) -> dict[Case, dict[str, float]]:
    """The same of the plain network, whose errors under autocast are the measure of the others'."""
    name, errors = f"{network}, plain: device against CPU", {}
    with guarded(report, "equality", name, {}, clock):
        wanted = references(plain, images)
        rounding = {mode: rounding_errors(plain, images, mode, wanted[mode]) for mode in wanted}
        for case in cases:
            with guarded(report, "equality", name, case.settings, clock):
                got = Pass(case.move(plain), case.move(images), case.training, case.context())
                if case.autocast:
                    errors[case] = bfloat16_errors(got, wanted[case.mode])
                device_row(report, name, got, wanted[case.mode], case, {"on_cpu": rounding[case.mode]})
    return errors


def rounding_errors(network: nn.Module, images: Tensor, mode: str, wanted: Pass) -> dict[str, float]:
    """The errors of torch's operators on the CPU under autocast."""
    context = computing(torch.device("cpu"), "reference", True)
    return bfloat16_errors(Pass(network, images, mode == "train", context), wanted)


def device_row(
    report: Report, name: str, got: Pass, wanted: Pass, case: Case, usual: dict[str, dict[str, float]]
) -> None:
    """Adds the row of one pass on the device; `usual` are errors that rounding makes under autocast anyway."""
    if case.autocast:
        errors = bfloat16_errors(got, wanted)
        tolerance = {}
        for part in errors:  # the plain network has no mixers
            known = [known.get(part, known.get(part.removesuffix("_mixers"), 0.0)) for known in usual.values()]
            tolerance[part] = max([BFLOAT16_FLOOR, *(BFLOAT16_FACTOR * error for error in known)])
    else:
        errors = float32_errors(got, wanted)
        tolerance = dict.fromkeys(("forward", "backward", "statistics"), FLOAT32_TOLERANCE)
    ok = all(errors[part] < bound for part, bound in tolerance.items())
    values: dict[str, Any] = {"largest_error": max(errors[part] for part in tolerance), **errors}
    values = {part: finite(value) for part, value in values.items()}
    if case.autocast:
        for whose, known in usual.items():
            values[whose] = {part: finite(value) for part, value in known.items()}
    report.add("equality", name, case.settings, values, ok, {part: finite(bound) for part, bound in tolerance.items()})


def references(network: nn.Module, images: Tensor) -> dict[str, Pass]:
    """What torch's operators compute in float64 on the CPU, in eval and in training."""
    network = copy.deepcopy(network).double()
    return {
        mode: Pass(network, images.double(), mode == "train", mrla.ops.use("reference")) for mode in ("eval", "train")
    }


def finite(value: Any) -> Any:
    """A number as JSON can hold it."""
    return str(value) if isinstance(value, float) and not (float("-inf") < value < float("inf")) else value


# ---- speed ---------------------------------------------------------------------------------------------------------


def workloads(quick: bool) -> list[dict[str, Any]]:
    """The networks of the table, with the share of the time that each gets."""
    narrow = {"channels": (8, 8, 16, 16), "stem_width": 8}
    rows: list[tuple[str, str, dict[str, Any], int, int, bool, int, bool]] = [
        ("ResNet-50", "resnet50", {}, 64, 224, True, 3, False),
        ("ResNet-50", "resnet50", {}, 256, 224, True, 4, False),
        ("ResNet-18 for 32x32", "resnet18_cifar", {}, 256, 32, True, 1, False),
        ("ViT-S", "vit_small_patch16_224", {}, 64, 224, False, 2, False),
        ("ConvNeXt-T", "convnext_tiny", {}, 64, 224, True, 2, False),
        ("ResNet-50", "resnet50", {}, 64, 224, True, 7, True),
    ]
    if quick:
        rows = [
            ("ViT", "test_vit", {"img_size": 32}, 2, 32, False, 1, False),
            ("ResNet", "resnet26", narrow, 2, 32, True, 1, False),
            ("ResNet", "resnet26", narrow, 2, 32, True, 1, True),
        ]
    columns = ("name", "model", "options", "batch", "size", "channels_last", "share", "compiled")
    return [dict(zip(columns, row, strict=True)) for row in rows]


def make_arm(work: dict[str, Any], method: str, device: torch.device) -> nn.Module:
    """The plain network or an attached one, on the device in the layout that it is trained in."""
    torch.manual_seed(0)
    network = timm.create_model(work["model"], num_classes=10, **work["options"])
    if method != "plain":
        mrla.attach(network, method, init="released")
    layout = torch.channels_last if work["channels_last"] else torch.contiguous_format
    return network.to(device).to(memory_format=layout)  # type: ignore[call-overload]


def make_actions(
    network: nn.Module, work: dict[str, Any], device: torch.device, path: str, compiled: str | None = None
) -> dict[str, Action]:
    """One pass of inference, and one training step with plain SGD, under bfloat16 autocast."""
    generator = torch.Generator().manual_seed(1)
    layout = torch.channels_last if work["channels_last"] else torch.contiguous_format
    images = torch.randn(work["batch"], 3, work["size"], work["size"], generator=generator)
    images = images.to(device).to(memory_format=layout)
    targets = torch.randint(10, (work["batch"],), generator=generator).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    run = torch.compile(network, backend=compiled) if compiled else network

    def inference() -> None:
        network.eval()
        with torch.no_grad(), computing(device, path, True):
            run(images)

    def training() -> None:
        network.train()
        with computing(device, path, True):
            loss = nn.functional.cross_entropy(run(images), targets)
            # Inside, since a backward may be computed in a way of its own too.
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"training step": training, "inference": inference}


def seconds_of(action: Action, device: torch.device, times: int = 1) -> float:
    """Seconds that the device takes for an action, between events on a GPU and by the clock on a CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            action()
        return (time.perf_counter() - start) / times
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        action()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000 / times


def peak_memory(action: Action, device: torch.device) -> float:
    """Megabytes that an action takes at most beyond what was allocated before: activations and gradients."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    action()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile."""
    at = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    return {"median": float(at[1]), "p10": float(at[0]), "p90": float(at[2])}


def check_speed(report: Report, options: argparse.Namespace, device: torch.device, clock: Clock) -> None:
    """Adds the rows of every workload, in a part of the time that is left for each."""
    todo = workloads(options.quick)
    # As in training of one image size. After the equality rows, since it chooses algorithms by their time.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False
    for at, work in enumerate(todo):
        allowed = max(0.0, clock.left()) * work["share"] / sum(later["share"] for later in todo[at:])
        end = Clock(allowed)
        settings = settings_of(work, options.path)
        if allowed == 0.0:
            report.add("speed", title(work), settings, {"not_run": "no time left"}, None)
            continue
        with guarded(report, "speed", title(work), settings, clock):
            if work["compiled"]:
                measure_compiled(report, work, settings, options, device, clock)
            else:
                measure_eager(report, work, settings, options, device, end)
        release()


def measure_eager(
    report: Report,
    work: dict[str, Any],
    settings: dict[str, Any],
    options: argparse.Namespace,
    device: torch.device,
    end: Clock,
) -> None:
    """Speed and memory of plain, light and base, not compiled."""
    arms: dict[str, dict[str, Action]] = {}
    for method in ("plain", "light", "base"):
        with guarded(report, "speed", title(work), {**settings, "arm": method}, end):
            arms[method] = make_actions(make_arm(work, method, device), work, device, options.path)
    for part, quantity in ((2, "training step"), (1, "inference")):
        actions = {arm: made[quantity] for arm, made in arms.items()}
        until = Clock(end.left() / part)
        measure_rounds(report, title(work), settings, quantity, actions, options, device, until)
        measure_memory(report, title(work), settings, quantity, actions, device)


def measure_compiled(
    report: Report,
    work: dict[str, Any],
    settings: dict[str, Any],
    options: argparse.Namespace,
    device: torch.device,
    clock: Clock,
) -> None:
    """Compiled plain and light beside the eager ones, then base, as far as there is time to compile."""
    backend = "eager" if options.quick else "inductor"
    settings = {**settings, "backend": backend}
    name = title(work)
    arms = {arm: make_actions(make_arm(work, arm, device), work, device, options.path) for arm in ("plain", "light")}
    compiled: dict[str, dict[str, Action]] = {"training step": {}, "inference": {}}
    needed = 0.0 if options.quick else 30.0  # seconds; a guess until something was compiled
    for quantity, methods in (
        ("training step", ("plain", "light")),
        ("inference", ("plain", "light")),
        ("training step", ("base",)),
    ):
        for method in methods:
            row = {**settings, "quantity": quantity, "arm": f"{method}+compiled"}
            if clock.left() < needed:
                report.add("speed", name, row, {"not_run": "no time left"}, None)
                continue
            with guarded(report, "speed", name, row, clock):
                network = make_arm(work, method, device)
                action = make_actions(network, work, device, options.path, backend)[quantity]
                start, before = time.monotonic(), graph_counts()
                action()
                seconds_of(action, device)  # waits
                seconds = time.monotonic() - start
                # A release that cannot trace something compiles pieces, whose speed is not that of the whole.
                graphs = {name: count - before[name] for name, count in graph_counts().items()}
                needed = 1.3 * seconds  # the next one has mixers, or as many
                compiled[quantity][row["arm"]] = action
                report.add("compilation", name, row, {"seconds": seconds, **graphs}, True)
        if new := [f"{method}+compiled" for method in methods if f"{method}+compiled" in compiled[quantity]]:
            actions = {arm: made[quantity] for arm, made in arms.items()} | compiled[quantity]
            until = Clock(min(15.0, clock.left() - 1.0))
            if methods == ("base",):
                actions = {arm: action for arm, action in actions.items() if arm in ("plain", "plain+compiled", *new)}
            measure_rounds(report, name, settings, quantity, actions, options, device, until)
            measure_memory(report, name, settings, quantity, actions, device)


def graph_counts() -> dict[str, int]:
    """How many graphs were compiled so far, and how often one had to end before its time."""
    return {
        "graphs": int(counters["stats"]["unique_graphs"]),
        "graph_breaks": int(sum(counters["graph_break"].values())),
    }


def measure_rounds(
    report: Report,
    name: str,
    settings: dict[str, Any],
    quantity: str,
    actions: dict[str, Action],
    options: argparse.Namespace,
    device: torch.device,
    end: Clock,
) -> None:
    """Times the arms in turn until the rounds or the time are over, and adds a row for each arm."""
    ready: dict[str, int] = {}
    for arm, action in actions.items():
        row = {**settings, "quantity": quantity, "arm": arm}
        with guarded(report, "speed", name, row, end):
            for _ in range(1 if options.quick else 3):
                action()
            seconds = seconds_of(action, device)
            ready[arm] = 1 if options.quick else max(1, min(20, int(0.05 / seconds)))
    taken: dict[str, list[float]] = {arm: [] for arm in ready}
    with guarded(report, "speed", name, {**settings, "quantity": quantity}, None):
        for turn in range(options.rounds if ready else 0):
            # Who follows whom changes from round to round.
            order = list(ready)[turn % len(ready) :] + list(ready)[: turn % len(ready)]
            found = {arm: seconds_of(actions[arm], device, ready[arm]) for arm in order}
            for arm, seconds in found.items():  # whole rounds only
                taken[arm].append(seconds)
            if end.left() < 0:
                break
    for arm, seconds in taken.items():
        row = {**settings, "quantity": quantity, "arm": arm}
        if not seconds:
            report.add("speed", name, row, {"not_run": "no time left"}, None)
            continue
        values: dict[str, Any] = {"n": len(seconds), "passes": ready[arm], "ms": spread([1000 * s for s in seconds])}
        if taken.get("plain"):
            values["ratio"] = spread([s / plain for s, plain in zip(seconds, taken["plain"], strict=True)])
        if taken.get("plain+compiled") and arm.endswith("+compiled"):
            pairs = zip(seconds, taken["plain+compiled"], strict=True)
            values["ratio_to_compiled"] = spread([s / plain for s, plain in pairs])
        report.add("speed", name, row, values, True)


def measure_memory(
    report: Report, name: str, settings: dict[str, Any], quantity: str, actions: dict[str, Action], device: torch.device
) -> None:
    """Adds a row of the peak memory for each arm."""
    if device.type != "cuda":
        report.add("memory", name, {**settings, "quantity": quantity}, {"not_measured": "on a CPU"}, None)
        return
    plain: float | None = None
    for arm, action in actions.items():
        row = {**settings, "quantity": quantity, "arm": arm}
        with guarded(report, "memory", name, row, None):
            megabytes = peak_memory(action, device)
            plain = megabytes if arm == "plain" else plain
            values = {"mb": megabytes} | ({"ratio": megabytes / plain} if plain else {})
            report.add("memory", name, row, values, True)


def title(work: dict[str, Any]) -> str:
    """A workload in words."""
    return f"{work['name']}, {work['batch']} images of {work['size']}x{work['size']}" + ", compiled" * work["compiled"]


def settings_of(work: dict[str, Any], path: str) -> dict[str, Any]:
    """What a workload's rows share."""
    format = "channels_last" if work["channels_last"] else "NCHW"
    kept = {key: work[key] for key in ("model", "options", "batch", "size")}
    return {**kept, "format": format, "autocast": "bfloat16", "path": path}


def release() -> None:
    """Gives the memory of networks that are no longer used back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- the run -------------------------------------------------------------------------------------------------------


@contextmanager
def guarded(report: Report, kind: str, name: str, settings: dict[str, Any], clock: Clock | None) -> Iterator[None]:
    """Turns an error of its body, too little memory too, into a row, and ends the body when the time is over.

    Where no time is left at the start the body is ended after a millisecond.
    """
    try:
        with interrupted_after(None if clock is None else clock.left()):
            yield
    except OutOfTime:
        report.add(kind, name, settings, {"not_run": "no time left"}, None)
    except Exception as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        # A compiler wraps what interrupts it.
        late = clock is not None and clock.left() <= 0 and "OutOfTime" in f"{type(error).__name__} {error}"
        values = {"not_run": "no time left"} if late else {"error": f"{type(error).__name__}: {message[:300]}"}
        report.add(kind, name, settings, values, None if late else False)
        del error  # its frames hold tensors
        release()


@contextmanager
def interrupted_after(seconds: float | None) -> Iterator[None]:
    """Raises `OutOfTime` in its body after so many seconds, where the system and the thread allow it."""
    if seconds is None or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise OutOfTime("OutOfTime")

    handler = signal.signal(signal.SIGALRM, interrupt)
    outer = signal.getitimer(signal.ITIMER_REAL)[0]
    start = time.monotonic()
    # Again every two seconds, should somebody swallow the first.
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, min(seconds, outer or seconds)), 2.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, outer - (time.monotonic() - start)), 2.0)


def describe(device: torch.device, options: argparse.Namespace, started: datetime) -> dict[str, Any]:
    """What the file says above its rows."""
    return {
        "theme": "gpu_check",
        "date": started.isoformat(timespec="seconds"),
        "hardware": hardware(device, torch.get_num_threads()),
        "versions": {**versions(), "triton": installed("triton"), "jaxtyping": installed("jaxtyping")},
        **commit(),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
    }


def installed(package: str) -> str | None:
    """Its version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """The version of NVIDIA's driver, as its own tool says."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def environment_row(report: Report, device: torch.device, limit: float) -> None:
    """The first row: where this runs, and for how long it may."""
    values: dict[str, Any] = {
        "device": report.content["hardware"]["gpu"] or report.content["hardware"]["cpu"],
        "driver": driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "memory_gb": None,
        "source_tree": str(Path(mrla.__file__).parents[1]),
        "commit": report.content["commit"],
        "changed": report.content["changed"],
        "seconds": limit,
        **report.content["versions"],
    }
    if device.type == "cuda":
        values["memory_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
    report.add("environment", "versions and device", {}, values, True)


def file_of(folder: Path, device: torch.device, started: datetime) -> Path:
    """``gpu_check_HARDWARE_DATE.json``; with a number where an earlier run has taken that name."""
    found = hardware(device, torch.get_num_threads())
    words = found["gpu"] or f"{found['cpu']} {found['cores']} cores"
    stem = f"gpu_check_{re.sub('[^a-z0-9]+', '-', words.lower()).strip('-')}_{started:%Y-%m-%d}"
    names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
    return next(path for path in (folder / f"{name}.json" for name in names) if not path.exists())


# ---- the table -----------------------------------------------------------------------------------------------------


def line_of(row: Row) -> str:
    """A row in one line of plain text."""
    state = {True: "ok", False: "FAILED", None: "-"}[row["ok"]]
    shown = ("quantity", "arm", "mode", "format", "dtype", "backend")
    where = ", ".join(str(row["settings"][key]) for key in shown if key in row["settings"])
    return f"{state:<7}{row['kind']:<12}{row['name']:<52}{where:<54}{said(row)}".rstrip()


def said(row: Row) -> str:
    """The values of a row in words."""
    values = row["values"]
    for problem in ("error", "not_run", "not_measured"):
        if problem in values:
            return f"{problem.replace('_', ' ')}: {values[problem]}"
    if row["kind"] == "environment":
        return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
    if "equal" in values:
        repeats = "" if values["plain_repeats"] else " (the plain network does not repeat itself either)"
        return "bit-equal" if values["equal"] else f"differs by {number(values['largest_difference'])}{repeats}"
    if "largest_error" in values:
        parts = [f"{part} {number(values[part])} (< {number(bound)})" for part, bound in row["tolerance"].items()]
        return f"error {number(values['largest_error'])}: {', '.join(parts)}"
    if row["kind"] == "memory":
        return f"{values['mb']:.0f} MB" + (f", {values['ratio']:.3f} of plain" if "ratio" in values else "")
    if row["kind"] == "compilation":
        return f"{values['seconds']:.1f} s, {values['graphs']} graphs, {values['graph_breaks']} graph breaks"
    words = f"{spread_of(values['ms'])} ms"
    if "ratio" in values:
        words += f", {spread_of(values['ratio'], 3)} of plain"
    if "ratio_to_compiled" in values:
        words += f", {spread_of(values['ratio_to_compiled'], 3)} of plain compiled"
    return f"{words}, n={values['n']}"


def number(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def spread_of(values: dict[str, float], digits: int = 2) -> str:
    """Median, and in brackets 10 to 90 %."""
    return f"{values['median']:.{digits}f} ({values['p10']:.{digits}f} to {values['p90']:.{digits}f})"


def show(path: Path) -> None:
    """Prints a file's rows as a table, with a summary below."""
    content = json.loads(path.read_text())
    print(f"{path.name}: {content['date']}, {content['hardware']['gpu'] or content['hardware']['cpu']}")
    for row in content["rows"]:
        print(line_of(row))
    print(summary(content))


def summary(content: dict[str, Any]) -> str:
    """How many rows held, in one line."""
    rows = content["rows"]
    equality = [row for row in rows if row["kind"] == "equality"]
    measured = sum(row["ok"] is True for row in rows if row["kind"] in ("speed", "memory"))
    failed = sum(row["ok"] is False for row in rows if row["kind"] != "equality")
    not_run = sum("not_run" in row["values"] for row in rows)
    end = "" if content["complete"] else "; the run was cut off"
    held = sum(row["ok"] is True for row in equality)
    return (
        f"equality: {held} of {len(equality)} rows hold; speed and memory: {measured} rows measured, {failed} failed; "
        f"{not_run} not run{end}"
    )


def check(options: argparse.Namespace) -> int:
    """The run; its exit code."""
    started, clock, device = datetime.now(UTC), Clock(options.seconds), torch.device(options.device)
    # Products of float32 with 10 bits would hide what is to be seen.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True  # or the plain network may differ from itself
    report = Report(file_of(options.out, device, started), describe(device, options, started))
    environment_row(report, device, options.seconds)
    check_equality(report, device, clock, options.path)
    if report.holds() or options.force:
        check_speed(report, options, device, clock)
    else:
        for work in workloads(options.quick):
            values = {"not_run": "equality rows failed, see above; --force measures all the same"}
            report.add("speed", title(work), settings_of(work, options.path), values, None)
    report.content["complete"] = True
    report.content["seconds"] = options.seconds - clock.left()
    report.write()
    print(f"{summary(report.content)}; {report.content['seconds']:.0f} s")
    print(f"written: {report.path}")
    return 0 if report.holds() else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks and measures, or shows a file of an earlier run; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS
    parser.add_argument("--device", choices=("cuda", "cpu"), default=gpu)
    parser.add_argument("--quick", action="store_true", help="tiny networks and two rounds: only to see that it works")
    parser.add_argument("--out", type=Path, default=out, help="folder of the JSON ($OUT where set, or results/)")
    parser.add_argument("--seconds", type=float, default=290.0, help="when to end; what is left is noted as not run")
    parser.add_argument("--rounds", type=int, default=None, help="timed turns of each arm at most (15)")
    parser.add_argument(
        "--path",
        choices=("reference", "fused"),
        default="reference",
        help="how mixers are computed on the device: torch's operators, or kernels where there are some",
    )
    parser.add_argument("--force", action="store_true", help="measure speed although equality rows failed")
    parser.add_argument("--show", type=Path, default=None, metavar="FILE", help="print the rows of an earlier run")
    options = parser.parse_args(arguments)
    if options.show:
        show(options.show)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use; there is none")
    options.rounds = options.rounds or (2 if options.quick else 15)
    return check(options)


if __name__ == "__main__":
    sys.exit(main())
