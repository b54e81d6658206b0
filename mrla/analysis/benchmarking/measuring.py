"""The benchmark: what an arm costs against the plain network, measured side by side."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from mrla.files.atomic_write import write_json
from mrla.files.one_writer import alone_in
from mrla.messages.brief import Brief
from mrla.messages.suggestions import nearest
from mrla.train.recipe import MOST_PROCESSES
from mrla.train.threads import thread_limit

from .arms import NO_NUMBA, check_network, read_arm
from .candidates import DTYPES, LEARNING_RATE, MOMENTUM, MemoryFormat
from .plots import draw_benchmark
from .points import Setting, measure_point, sweep_settings
from .record import commit, hardware, versions
from .rounds import Quantity

RESULTS = "bench.json"
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
DEFAULT_MODEL, DEFAULT_ARMS = "resnet18_cifar", ("plain", "light", "base")
NOTE = (
    "A ratio is an arm's time by the first arm's in the same round: the median over rounds (10 to 90 %); all arms take "
    "turns in one process. Kept is what lies in memory between forward and backward, peak the most that a run adds to "
    "what was there. Weights are random; norms and mixers do their full work."
)


@dataclass(frozen=True, kw_only=True, repr=False)
class Benchmark(Brief):
    """A finished benchmark.

    Attributes:
        folder: Where it is.
        content: What ``bench.json`` holds; docs/reference/json_keys.md lists its keys.
    """

    folder: Path
    content: dict[str, Any]

    def _brief(self) -> dict[str, object]:
        quantities = [name for name in ("inference", "training") if name in self.content["configuration"]["quantities"]]
        arms = self.content["configuration"]["arms"]
        ratios = {
            f"{arm} ({quantity}, ratio)": round(ratio, 3)
            for arm in arms[1:]
            for quantity in quantities
            if (ratio := self.ratio(arm, quantity)) is not None
        }
        return {
            "folder": str(self.folder),
            "model": self.content["configuration"]["model"],
            "baseline": arms[0],
            **ratios,
        }

    def ratio(self, arm: str, quantity: str = "inference") -> float | None:
        """The median ratio of an arm's time to the first arm's, at the first value of a sweep.

        Args:
            arm: As it was given.
            quantity: ``inference`` or ``training``.

        Returns:
            The ratio; None where it was not measured.
        """
        entry = self.content["points"][0]["results"][arm][quantity]
        return entry["ratio"]["median"] if entry and entry["ratio"] else None


def benchmark(
    model: str | nn.Module = DEFAULT_MODEL,
    arms: Sequence[str] = DEFAULT_ARMS,
    *,
    quantities: Sequence[str] = QUANTITIES,
    image_size: int | None = None,
    in_chans: int | None = None,
    batch_size: int = 64,
    rounds: int = 10,
    warmup: int = 2,
    dtype: str = "float32",
    memory_format: str = "contiguous",
    device: str = "cpu",
    threads: int | None = None,
    sweep: str | None = None,
    values: Sequence[int] | None = None,
    out: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Measures what arms cost: inference, a training step, what is kept for backward, and peak memory.

    All arms take turns in one process, in rounds, so that drift hits all alike; every ratio is taken within a round.
    It is checked first that every arm runs and that its states leave its outputs as they are.

    Args:
        model: The plain network: a name of timm's, torchvision's after ``torchvision/``, a folder of `mrla.save`, or
            a network of yours, which is left as it is.
        arms: What is compared, the baseline first, each ``NAME[+STATE...]``. NAME is ``plain``, a method that is
            attached to `model` (``light``, ``base``, ``exact``, ``dw``), or any network's name. STATE is ``fused``
            (`mrla.fuse`), ``reference`` (torch's operators in place of kernels), ``compiled`` (`torch.compile`),
            or a format of `mrla.export`, such as ``onnx``, whose engine then runs the network.
        quantities: Of ``inference``, ``training``, ``memory``.
        image_size: Side of the square images; the network's own if not given.
        in_chans: Channels of the images; the network's own if not given.
        batch_size: Images in a batch.
        rounds: Timed rounds; each arm runs once a round.
        warmup: Rounds before them that are not timed.
        dtype: Of weights and images: ``float32``, ``bfloat16``, ``float16``, ``float64``.
        memory_format: ``contiguous`` or ``channels_last``.
        device: ``cpu`` or ``cuda``.
        threads: Threads of the CPU; as many as torch has if not given. Restored afterwards.
        sweep: What is varied: ``batch``, ``depth`` (of a ResNet), ``resolution``, or ``blocks`` (one block of the
            longest chain at several places, with the memory of the blocks before it).
        values: What a sweep gives it; its own values if not given.
        out: Folder of the results; ``runs/bench-MODEL`` if not given.
        on_progress: Called with the rounds that are done and the rounds in all.

    Returns:
        The benchmark; its folder holds ``bench.json``, ``bench.png`` and ``bench.svg``.

    Raises:
        ValueError: If an argument is not as described, a package that an arm needs is missing, an arm does not run, a
            state changes what a network computes, or another process writes into the folder.
        TypeError: If an argument is of another type.

    Example:
        A benchmark takes a minute, so this is not run with the tests::

            result = mrla.benchmark("resnet50", ("plain", "light", "light+fused"), batch_size=8)
            print(result.ratio("light"))
    """
    import matplotlib  # noqa: F401 - missing, it is to be missed before the measuring

    setting = _checked(
        model=model,
        arms=arms,
        quantities=quantities,
        image_size=image_size,
        in_chans=in_chans,
        batch_size=batch_size,
        rounds=rounds,
        warmup=warmup,
        dtype=dtype,
        memory_format=memory_format,
        device=device,
        threads=threads,
    )
    values = None if values is None else [_number("values", value, least=1) for value in values]
    settings = sweep_settings(setting, sweep, values)
    folder = Path(out) if out is not None else Path("runs") / f"bench-{_slug(setting.model_name)}"
    swept = [value for value, _ in settings if value is not None]
    date, start = datetime.now(UTC), time.monotonic()
    with alone_in(folder):  # before the measuring: it may be refused
        with thread_limit(setting.threads):
            points = _measure(settings, on_progress)
        content = {
            "theme": "bench",
            "date": date.isoformat(timespec="seconds"),
            "hardware": hardware(setting.device, setting.threads),
            "versions": versions(),
            **commit(),
            "configuration": {**_configuration(setting), "sweep": sweep, "values": swept or None},
            "notes": [NO_NUMBA] if any([point.pop("needs_numba") for point in points]) else [],
            "note": NOTE,
            "points": points,
            "seconds": time.monotonic() - start,
        }
        draw_benchmark(content, folder)
        write_json(folder / RESULTS, content)  # last: where it is, all of it is there
    return Benchmark(folder=folder, content=content)


def _measure(
    settings: Sequence[tuple[int | None, Setting]], on_progress: Callable[[int, int], None] | None
) -> list[dict[str, Any]]:
    total = sum(setting.warmup + setting.rounds for _, setting in settings)
    done = 0

    def on_round() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    points = []
    for value, setting in settings:
        name = {} if value is None else {"value": value}
        points.append({**name, "model": setting.model_name, **measure_point(setting, on_round)})
    return points


def _configuration(setting: Setting) -> dict[str, Any]:
    """Every field of a setting as JSON has it."""
    plain = {field.name: getattr(setting, field.name) for field in fields(setting) if field.name != "position"}
    own = {"model": setting.model_name, "arms": [arm.name for arm in setting.arms], "device": str(setting.device)}
    optimizer = {"name": "SGD", "lr": LEARNING_RATE, "momentum": MOMENTUM}
    return {**plain, **own, "quantities": list(setting.quantities), "optimizer": optimizer}


def _checked(**given: Any) -> Setting:
    """The arguments of `benchmark` as a setting."""
    model, threads = given["model"], given["threads"]
    if not isinstance(model, (str, nn.Module)):
        raise TypeError(f"model must be a network's name or a network: got {type(model).__name__}")
    arms = tuple(read_arm(arm) for arm in _words("arms", given["arms"]))
    if isinstance(model, str) and any(arm.of_model for arm in arms):
        check_network(model)
    quantities = _words("quantities", given["quantities"])
    for quantity in quantities:
        _choice("quantities", quantity, QUANTITIES)
    if "inference" not in quantities and not arms[0].trains:
        raise ValueError(
            f"the first arm is the baseline and must have what is measured: got {arms[0].name!r}, which has no "
            f"training step; begin with another, or add inference to the quantities"
        )
    return Setting(
        model=model,
        arms=arms,
        quantities=quantities,  # type: ignore[arg-type]
        image_size=_number("image_size", given["image_size"], least=1, optional=True),
        in_chans=_number("in_chans", given["in_chans"], least=1, optional=True),
        batch_size=_number("batch_size", given["batch_size"], least=1),
        rounds=_number("rounds", given["rounds"], least=1),
        warmup=_number("warmup", given["warmup"], least=0),
        dtype=_choice("dtype", given["dtype"], tuple(DTYPES)),
        memory_format=_choice("memory_format", given["memory_format"], get_args(MemoryFormat)),  # type: ignore[arg-type]
        device=_device(given["device"]),
        threads=_number("threads", threads, least=1, most=MOST_PROCESSES)
        if threads is not None
        else torch.get_num_threads(),
    )


def _words(name: str, given: Any) -> tuple[str, ...]:
    if isinstance(given, str) or not all(isinstance(word, str) for word in given):
        raise TypeError(f"{name} must be a sequence of names, such as ['plain', 'light']: got {given!r}")
    words = tuple(word.strip() for word in given)
    if not words or not all(words) or len(set(words)) != len(words):
        raise ValueError(f"{name} must be one or more different names: got {', '.join(words) or 'none'}")
    return words


def _number(name: str, given: Any, *, least: int, most: int = 2**20, optional: bool = False) -> Any:
    if given is None and optional:
        return None
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{name} must be a whole number: got {given!r}")
    if not least <= given <= most:
        raise ValueError(f"{name} must be from {least} to {most}: got {given}")
    return given


def _choice(name: str, given: str, allowed: Sequence[str]) -> str:
    if given not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}: got {given!r}{nearest(given, allowed)}")
    return given


def _device(given: str) -> torch.device:
    _choice("device", given.split(":")[0] if given.startswith("cuda") else given, ("cpu", "cuda"))
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or cuda:NUMBER: got {given!r}") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device must be one that torch sees: got {given!r}, there are {count} GPUs; take device cpu")
    return device


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-")
