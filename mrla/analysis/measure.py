"""What a network costs: multiply-accumulates, and images a second side by side."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mrla.messages.suggestions import nearest
from mrla.models.modes import in_eval_mode
from mrla.train.recipe import Machine


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Images a second in inference.

    Attributes:
        median: Median over rounds.
        p10: Tenth percentile.
        p90: Ninetieth percentile.
        rounds: Number of timed rounds.
        batch_size: Images in a round.
        threads: Threads of the CPU.
    """

    median: float
    p10: float
    p90: float
    rounds: int
    batch_size: int
    threads: int


def count_macs(model: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-accumulates of one image in inference, by torch's own counter, which gives twice as many FLOPs.

    Counted are convolutions and matrix products; norms, activations and sums are not, in any arm.

    Args:
        model: The network.
        input_size: Shape (c, h, w) of the image.

    Returns:
        MACs; divide by 1e9 for G.

    Example:
        >>> count_macs(nn.Linear(3, 2), (3,))
        6
    """
    reference = next(model.parameters())
    image = torch.zeros(1, *input_size, device=reference.device, dtype=reference.dtype)
    with in_eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


def measure_throughput(
    models: Mapping[str, nn.Module], images: Tensor, *, rounds: int = 30, warmup: int = 3
) -> dict[str, Throughput]:
    """Images a second of several networks, taking turns in one process so that drift hits all alike.

    Args:
        models: The networks by name, on the device of `images`.
        images: One batch.
        rounds: Timed turns of each.
        warmup: Turns before them that are not timed.

    Returns:
        Median and spread of each.

    Raises:
        ValueError: If there is no image or no round.
    """
    if not len(images) or rounds < 1:
        raise ValueError(f"there must be images and rounds to time: got {len(images)} images, {rounds} rounds")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with in_eval_mode(*models.values()), torch.inference_mode():
        for turn in range(warmup + rounds):
            for name, model in models.items():
                elapsed = _timed(model, images)
                if turn >= warmup:
                    seconds[name].append(elapsed)
    rates = {name: len(images) / np.asarray(values) for name, values in seconds.items()}
    return {
        name: Throughput(
            median=float(np.median(rate)),
            p10=float(np.quantile(rate, 0.1)),
            p90=float(np.quantile(rate, 0.9)),
            rounds=rounds,
            batch_size=len(images),
            threads=torch.get_num_threads(),
        )
        for name, rate in rates.items()
    }


def timing_device(accelerator: str) -> torch.device:
    """The GPU where a recipe's accelerator may be one and there is one, else the CPU."""
    gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def single_device(machine: Machine) -> torch.device:
    """Where one network is looked at outside of training: a CUDA GPU or the CPU.

    Args:
        machine: Its accelerator says which: ``auto``, ``cpu``, ``gpu`` or ``cuda``; its threads are set by the caller.

    Returns:
        The device.

    Raises:
        ValueError: If the accelerator is another word or not there, or the machine has settings for training alone.

    Example:
        >>> single_device(Machine(accelerator="cpu", threads=1))
        device(type='cpu')
    """
    usual = vars(Machine(accelerator=machine.accelerator, threads=machine.threads))
    if others := [f"machine.{name}={value}" for name, value in vars(machine).items() if value != usual[name]]:
        raise ValueError(f"this is computed on one device, in float32: got {', '.join(others)}; leave it out")
    choices = ("auto", "cpu", "gpu", "cuda")
    if machine.accelerator not in choices:
        hint = nearest(machine.accelerator, choices)
        raise ValueError(f"machine.accelerator must be one of {', '.join(choices)}: got {machine.accelerator!r}{hint}")
    device = timing_device(machine.accelerator)
    if machine.accelerator in ("gpu", "cuda") and device.type == "cpu":
        raise ValueError(f"machine.accelerator={machine.accelerator} needs a CUDA GPU: none is here; take cpu or auto")
    return device


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of the clock that an action takes, what it leaves to the device included.

    Args:
        action: What is timed.
        device: Where it computes; a GPU is waited for before and after.

    Returns:
        Seconds.

    Example:
        >>> timed(lambda: time.sleep(0.01), torch.device("cpu")) >= 0.01
        True
    """
    _wait(device)
    start = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - start


def _timed(model: nn.Module, images: Tensor) -> float:
    return timed(lambda: model(images), images.device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
