"""How arms are measured: in rounds, taking turns in one process, and what is kept and held in memory."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile

from ..measure import timed
from .candidates import Candidate

Quantity = Literal["inference", "training", "memory"]
Round = dict[str, dict[str, float]]
"""Seconds by quantity and arm, in the order in which they were taken."""


def time_rounds(
    candidates: Mapping[str, Candidate],
    quantities: Sequence[Quantity],
    device: torch.device,
    *,
    rounds: int,
    warmup: int,
    on_round: Callable[[], None] = lambda: None,
) -> list[Round]:
    """Times every arm once a round, so that drift hits all alike.

    Args:
        candidates: The arms by name.
        quantities: What is timed: ``inference``, ``training``; anything else is passed over.
        device: Where they compute.
        rounds: Timed rounds.
        warmup: Rounds before them that are not timed.
        on_round: Called after each.

    Returns:
        The timed rounds.
    """
    taken: list[Round] = []
    for number in range(-warmup, rounds):
        times: Round = {}
        for quantity in ("inference", "training"):
            actions = {
                name: candidate.infer if quantity == "inference" else candidate.step
                for name, candidate in candidates.items()
                if quantity in quantities
            }
            runnable = [name for name, action in actions.items() if action is not None]
            seconds = {name: timed(actions[name], device) for name in order(runnable, number)}  # type: ignore[arg-type]
            if seconds:
                times[quantity] = seconds
        if number >= 0:
            taken.append(times)
        on_round()
    return taken


def order(names: Sequence[str], number: int) -> list[str]:
    """Who comes when in a round: every arm is first and last equally often, behind each of its neighbours.

    Args:
        names: The arms.
        number: Of the round.

    Returns:
        Their order.

    Example:
        >>> [order(["a", "b", "c"], number) for number in range(3)]
        [['a', 'b', 'c'], ['c', 'b', 'a'], ['b', 'c', 'a']]
    """
    shift = number // 2 % len(names) if names else 0
    turned = [*names[shift:], *names[:shift]]
    return turned[::-1] if number % 2 else turned


def measure_memory(candidate: Candidate, device: torch.device) -> dict[str, int | None]:
    """Bytes that an arm keeps for backward, and the peak of what it holds while it runs.

    Args:
        candidate: The arm.
        device: Where it computes.

    Returns:
        ``saved_for_backward``, ``peak_inference``, ``peak_training``; None where it has none, or an engine's own
        memory cannot be seen.
    """
    foreign = candidate.arm.engine is not None
    forward, step = candidate.forward, candidate.step
    return {
        "saved_for_backward": None if forward is None else saved_bytes(forward, candidate.tensors),
        "peak_inference": None if foreign else peak_bytes(candidate.infer, device),
        "peak_training": None if step is None else peak_bytes(step, device),
    }


def saved_bytes(forward: Callable[[], object], ignored: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once.

    Args:
        forward: Gives an output with its graph.
        ignored: Tensors that are there anyway, as parameters and buffers are.

    Returns:
        Bytes; of a view the whole storage, for the whole is kept alive.

    Example:
        >>> x = torch.ones(10, requires_grad=True)
        >>> saved_bytes(lambda: x.exp().sin())  # both keep the same map, once as output and once as input
        40
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in ignored}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # alive until here, so that no two storages can have had one address
    del output
    return sum(kept.values())


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator holds while an action runs, above what it held before.

    Weights, images and momenta lie there before; gradients do not. On the CPU every allocation is followed with
    torch's profiler; what a library takes from the system by itself (oneDNN's scratchpads) is not seen.

    Args:
        action: What is run, once.
        device: Where it computes.

    Returns:
        Bytes.

    Example:
        >>> peak_bytes(lambda: torch.ones(10) + torch.ones(10), torch.device("cpu"))
        120
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    recorder = profile(profile_memory=True)
    with _quiet_profiler(), recorder:
        action()
    assert recorder.kineto_results is not None
    events: list[Any] = recorder.kineto_results.events()  # torch's stub of an event lacks its bytes
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = np.cumsum([change for _, change in changes], dtype=np.int64)
    return max(0, int(held.max(initial=0)))


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    # The profiler's library writes to standard error by itself, above all where there is no GPU.
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def summarise(
    candidates: Mapping[str, Candidate],
    rounds: Sequence[Round],
    memory: Mapping[str, Mapping[str, int | None]],
    batch_size: int,
) -> dict[str, Any]:
    """What the rounds say of each arm, against the first one.

    Args:
        candidates: The arms by name.
        rounds: As `time_rounds` gives them.
        memory: As `measure_memory` gives it, by arm; empty if it was not asked for.
        batch_size: Images in a batch.

    Returns:
        By arm what the README of this room lists.
    """
    baseline = next(iter(candidates))
    results: dict[str, Any] = {}
    for name, candidate in candidates.items():
        entry: dict[str, Any] = {"parameters": candidate.parameters, "max_abs_difference": candidate.difference}
        for quantity in ("inference", "training"):
            entry[quantity] = _times(rounds, quantity, name, baseline, batch_size)
        entry["memory"] = _memory(memory[name], memory[baseline]) if memory else None
        results[name] = entry
    return results


def _times(rounds: Sequence[Round], quantity: str, arm: str, baseline: str, batch_size: int) -> dict[str, Any] | None:
    taken = [times[quantity] for times in rounds if quantity in times]
    if not taken or arm not in taken[0]:
        return None
    seconds = np.asarray([times[arm] for times in taken])
    ratio = None
    if baseline in taken[0]:
        ratio = _spread(seconds / np.asarray([times[baseline] for times in taken]))
    return {
        "ms": _spread(1000 * seconds),
        "images_per_second": batch_size / float(np.median(seconds)),
        "ratio": ratio,
        "n": len(taken),
    }


def _memory(own: Mapping[str, int | None], baseline: Mapping[str, int | None]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for name, amount in own.items():
        against = baseline[name]
        entry[f"{name}_mb"] = None if amount is None else amount / 1e6
        entry[f"{name}_ratio"] = None if amount is None or not against else amount / against
    return entry


def _spread(values: np.ndarray) -> dict[str, float]:
    p10, median, p90 = map(float, np.quantile(values, (0.1, 0.5, 0.9)))
    return {"median": median, "p10": p10, "p90": p90}
