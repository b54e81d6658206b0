"""What a benchmark runs of an arm: one pass in inference, and one training step."""

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mrla.ops
from mrla.deploy import Facts, get_format
from mrla.messages.one_line import one_line
from mrla.ops.torch_internals import compiling_often

from .arms import Arm

MemoryFormat = Literal["contiguous", "channels_last"]
Objective = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""What `backward` is called on, given the output, and the gradient that it is given."""

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
LEARNING_RATE, MOMENTUM = 1e-3, 0.9
# Of the largest output, through a deep network at its random start.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every arm is given.

    Attributes:
        images: One batch.
        objective: What is minimised in a training step.
        threads: Threads of the CPU, for engines that have their own.
    """

    images: Tensor
    objective: Objective
    threads: int


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An arm that is ready to be timed.

    Attributes:
        arm: The arm.
        infer: One pass over the images, in eval mode.
        forward: The forward half of a training step, with its graph; None where the arm has none.
        step: A whole training step; gives the loss.
        tensors: Parameters and buffers of the network in training.
        parameters: How many trainable numbers the network has.
        difference: Largest difference of an output from the same network's without states; None without states.
    """

    arm: Arm
    infer: Callable[[], Tensor]
    forward: Callable[[], Tensor] | None
    step: Callable[[], Tensor] | None
    tensors: tuple[Tensor, ...]
    parameters: int
    difference: float | None


def prepare(arm: Arm, network: nn.Module, work: Work, *, training: bool) -> Candidate:
    """Makes an arm ready, and checks that it runs, and that its states leave the outputs as they are.

    Args:
        arm: The arm.
        network: Its network, on the images' device and in their dtype; it is copied.
        work: What it is given.
        training: Whether its training step is wanted too.

    Returns:
        The candidate.

    Raises:
        ValueError: If it does not run, an output is not finite, or a state changes what the network computes.
    """
    try:
        expected = _expected(network, work) if arm.states else None
        infer = _inference(arm, copy.deepcopy(network).eval(), work)
        difference = _checked(arm, infer(), expected)
        forward, step, tensors = None, None, ()
        if training and arm.trains:
            forward, step, tensors = _training(arm, copy.deepcopy(network).train(), work)
            loss = step()
            if not loss.isfinite().all():
                raise ValueError(f"its loss is {loss.sum().item()}")
    except _Changed:
        raise
    except Exception as error:  # whatever an engine, a compiler or a foreign network raises
        shape = "x".join(map(str, work.images.shape))
        raise ValueError(
            f"the arm {arm.name} does not run on {shape} images of {work.images.dtype} on {work.images.device} "
            f"({type(error).__name__}: {one_line(error, 300)}); choose another size, dtype or arm, or "
            f"--quantities inference if it is the training step"
        ) from error
    return Candidate(
        arm=arm,
        infer=infer,
        forward=forward,
        step=step,
        tensors=tensors,
        parameters=sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad),
        difference=difference,
    )


@contextmanager
def compiling(arms: Iterable[Arm]) -> Iterator[None]:
    """The body with every arm compiled for itself, if any is to be.

    Arms of one class share its code, of which torch compiles for eight networks and then, in silence, for no more; and
    after a second shape it compiles for all shapes.

    Args:
        arms: The arms.
    """
    if not any("compiled" in arm.states for arm in arms):
        yield
        return
    torch.compiler.reset()
    with compiling_often(64):
        yield


def classify(labels: Tensor) -> Objective:
    """The objective of a classifier: cross-entropy with labels that are taken modulo its classes."""

    def objective(logits: Tensor) -> tuple[Tensor, None]:
        if logits.ndim != 2:
            raise TypeError(f"its output must be logits (b, classes) to be trained: got {tuple(logits.shape)}")
        # Taken in float32, as autocast does: half precision has no kernel for it on a CPU.
        return cross_entropy(logits.float(), labels % logits.shape[1]), None

    return objective


def pull(gradient: Tensor) -> Objective:
    """The objective of a part of a network: a gradient that comes from what follows it."""
    return lambda output: (output, gradient)


class _Changed(ValueError):
    """A state changes what a network computes."""


def _path(arm: Arm) -> AbstractContextManager[None]:
    return mrla.ops.use("reference") if "reference" in arm.states else nullcontext()


def _inference(arm: Arm, network: nn.Module, work: Work) -> Callable[[], Tensor]:
    if "fused" in arm.states:
        # In float64, for it checks what it has done, and a deep network at random weights makes much of rounding.
        fused = mrla.fuse(network.double(), example=(2, *work.images.shape[1:]))
        network = fused.to(work.images.dtype)
    call: Callable[[Tensor], Tensor] = network
    if "compiled" in arm.states:
        call = torch.compile(network, dynamic=False)  # type: ignore[assignment]
    elif arm.engine is not None:
        call = _exported(network, work, arm.engine)

    def infer() -> Tensor:
        with _path(arm), torch.inference_mode():
            return call(work.images)

    return infer


def _training(
    arm: Arm, network: nn.Module, work: Work
) -> tuple[Callable[[], Tensor], Callable[[], Tensor], tuple[Tensor, ...]]:
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    call: Any = torch.compile(network, dynamic=False) if "compiled" in arm.states else network

    def forward() -> Tensor:
        with _path(arm):
            return work.objective(call(work.images))[0]

    def step() -> Tensor:
        with _path(arm):  # activation checkpointing computes again in backward
            target, gradient = work.objective(call(work.images))
            target.backward(gradient)
            optimizer.step()
            optimizer.zero_grad()
        return target.detach()

    return forward, step, (*network.parameters(), *network.buffers())


def _expected(network: nn.Module, work: Work) -> Tensor:
    """What a network says without states, taken from a copy of its own: a state might change what it is given."""
    with torch.inference_mode():
        return copy.deepcopy(network).eval()(work.images)


def _checked(arm: Arm, output: Any, expected: Tensor | None) -> float | None:
    """The largest difference from what the arm is to compute, where that is known."""
    if not isinstance(output, Tensor):
        raise TypeError(f"its output must be one tensor: got {type(output).__name__}")
    if not output.isfinite().all():
        raise ValueError("its outputs are not finite")
    if expected is None:
        return None
    difference = (output.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    # A format that keeps less says so by its bound, by which its file was allowed when it was written.
    allowed = max(_TOLERANCES[expected.dtype], 0.0 if arm.engine is None else get_format(arm.engine).bound)
    if not difference <= allowed * largest:
        raise _Changed(
            f"{arm.name} must compute what {arm.network} does: outputs differ by up to {difference:.3g} where the "
            f"largest is {largest:.3g} ({expected.dtype}), so its time would say nothing; leave the arm out"
        )
    return difference


def _exported(network: nn.Module, work: Work, engine: str) -> Callable[[Tensor], Tensor]:
    """The network as a file that an engine runs, for these images alone."""
    images = work.images
    if images.device.type != "cpu":
        raise ValueError(f"exported networks are measured on the cpu: got {images.device}")
    format = get_format(engine)()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / f"network{format.suffix}"
        program = torch.export.export(network, (images.contiguous(),))
        format.write(program, path, Facts(input_size=tuple(images.shape[1:]), dynamic=()))
        session = format.open(path, threads=work.threads, dtype=images.dtype).session
    return lambda images: format.values(session, images)[0]
