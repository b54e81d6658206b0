"""Which way an operator is computed: by a backend's kernels where one supports the call, else by torch's operators."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from mrla.messages.registering import register

from .calls import (
    BaseForm,
    BaseState,
    BaseWeights,
    Begun,
    DeferredGrad,
    LightState,
    LightWeights,
    MixerCall,
    ResidualEpilogue,
    ResidualNorm,
)
from .torch_internals import is_watched

REFERENCE, FUSED = "reference", "fused"
_path: ContextVar[str] = ContextVar("mrla.ops.path", default=FUSED)


class Backend(ABC):
    """Kernels for one kind of device: a mixer's whole work, x + norm(update), forward and backward.

    A backend is a value without state. Its methods get plain tensors, outside autograd; `mrla::light` and `mrla::base`
    make torch's operators of them, with gradients and for compiled graphs.

    Attributes:
        name: What `use` knows it by.
    """

    name: str

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why the backend cannot run on this machine, with the remedy; None where it can."""

    @abstractmethod
    def supports(self, call: MixerCall) -> bool:
        """Whether the backend can do a call: devices, types, strides, sizes of its tensors.

        It is called before every call of a kernel, and while torch compiles; it reads no number of a tensor.
        """

    @abstractmethod
    def light_forward(
        self,
        x: Tensor,
        shortcut: Tensor | None,
        weights: LightWeights,
        statistics: tuple[Tensor, Tensor] | None,
        drop_scale: Tensor | None,
        heads: int,
        eps: float,
        *,
        branch_norm: ResidualNorm | None = None,
        in_place: bool = False,
        keep_state: bool = True,
    ) -> tuple[Tensor, LightState]:
        """The output of MRLA-light and what its gradient needs.

        Args:
            x: The block's output; with `branch_norm` the branch that it is relu(norm(branch) + shortcut) of.
            shortcut: What the block added.
            weights: The mixer's own.
            statistics: The norm's running mean and variance in float32; None for those of this batch.
            drop_scale: DropPath's factor for each image.
            heads: Number of heads.
            eps: The norm's.
            branch_norm: The norm behind the branch.
            in_place: Whether `x` may be overwritten.
            keep_state: Whether there will be a gradient.
        """

    @abstractmethod
    def light_backward(
        self,
        gradient: Tensor,
        x: Tensor,
        shortcut: Tensor | None,
        weights: LightWeights,
        state: LightState,
        drop_scale: Tensor | None,
        eps: float,
        *,
        batch_statistics: bool,
        branch_norm: ResidualNorm | None = None,
    ) -> tuple[Tensor, Tensor | None, LightWeights, tuple[Tensor, Tensor] | None]:
        """Gradients of `x`, the shortcut, the weights and, with `branch_norm`, weight and bias of its norm.

        Args:
            gradient: That of the output.
            x: As `light_forward` had it, as the rest; with `branch_norm` the branch.
            shortcut: What the block added.
            weights: The mixer's own.
            state: What `light_forward` returned.
            drop_scale: DropPath's factor for each image.
            eps: The norm's.
            batch_statistics: Whether the mixer's norm took those of the batch.
            branch_norm: The norm behind the branch.
        """

    @abstractmethod
    def base_forward(
        self,
        x: Tensor,
        shortcut: Tensor | None,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        weights: BaseWeights,
        statistics: tuple[Tensor, Tensor] | None,
        drop_scale: Tensor | None,
        form: BaseForm,
        *,
        branch_norm: ResidualNorm | None = None,
        in_place: bool = False,
        keep_value: bool = True,
    ) -> tuple[Tensor, BaseState]:
        """The output of MRLA-base, and what the memory and its gradient need.

        Args:
            x: The block's output; with `branch_norm` the branch that it is relu(norm(branch) + shortcut) of.
            shortcut: What the block added; used with `branch_norm` alone.
            keys: Those of the blocks before.
            values: Those of the blocks before.
            weights: The mixer's own.
            statistics: The norm's running mean and variance in float32; None for those of this batch.
            drop_scale: DropPath's factor for each image.
            form: What kind of MRLA-base.
            branch_norm: The norm behind the branch.
            in_place: Whether `x` may be overwritten.
            keep_value: Whether anybody reads the block's value later, where the norm goes by its own statistics; an
                empty tensor stands for it otherwise.
        """

    @abstractmethod
    def base_backward(
        self,
        gradient: Tensor,
        grad_key: Tensor | None,
        grad_value: Tensor | None,
        pending: Sequence[DeferredGrad],
        x: Tensor,
        shortcut: Tensor | None,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        weights: BaseWeights,
        state: BaseState,
        drop_scale: Tensor | None,
        form: BaseForm,
        *,
        batch_statistics: bool,
        wanted: Sequence[bool],
        grad_update: Tensor | None = None,
        branch_norm: ResidualNorm | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor | None], BaseWeights, tuple[Tensor, Tensor] | None]:
        """Gradients of `x`, the shortcut, earlier keys and values, the weights and, with `branch_norm`, its norm's two.

        Args:
            gradient: That of the output.
            grad_key: That of the block's key, from later blocks.
            grad_value: That of its value, from whoever defers nothing.
            pending: What later blocks have deferred to this one.
            x: As `base_forward` had it, as the rest; with `branch_norm` the branch.
            shortcut: What the block added.
            keys: Those of the blocks before.
            values: Those of the blocks before.
            weights: The mixer's own.
            state: What `base_forward` returned.
            drop_scale: DropPath's factor for each image.
            form: What kind of MRLA-base.
            batch_statistics: Whether the mixer's norm took those of the batch.
            wanted: For which earlier values a gradient is to be made here; the others are deferred.
            grad_update: Where the gradient of y goes, if any is deferred; the place of the block's own value will do.
            branch_norm: The norm behind the branch.
        """

    @abstractmethod
    def begin(self, epilogue: ResidualEpilogue) -> Begun:
        """What is left of the end of a residual block after what torch's own operator must do first.

        The running statistics of a norm in training move on, as by calling it. The output must be what the block itself
        gives, to the last bit; where the backend does not round so, `kernels.residual_epilogue.begin_by_torch` does.
        """


BACKENDS: dict[str, Backend] = {}
"""The registered backends by name, in the order in which they are tried."""


def register_backend(backend: Backend) -> Backend:
    """Adds a backend, which is tried after those that are registered already.

    Args:
        backend: The backend.

    Returns:
        The same.

    Raises:
        ValueError: If its name is taken.

    Example:
        `docs/extend/backend.md` has a whole one::

            mrla.ops.register_backend(MyBackend())
    """
    register(BACKENDS, backend.name, backend, "a backend", (REFERENCE, FUSED))
    return backend


@contextmanager
def use(path: str) -> Iterator[None]:
    """Chooses how the operators are computed inside a ``with`` block, for this thread or task alone.

    All ways give the same numbers within rounding. ``"fused"`` is what happens without a choice: the first registered
    backend that supports a call does it (``"cpu"``: kernels compiled with numba, for contiguous float32 or bfloat16
    maps and a plain BatchNorm; never under export or tracing), torch's operators do the rest. A network keeps to the
    way that it was compiled with.

    Args:
        path: ``"fused"``; the name of one backend, which alone is tried; or ``"reference"`` for torch's operators
            everywhere.

    Yields:
        Nothing.

    Raises:
        ValueError: If it is another word, or kernels are asked for and no backend runs here.

    Example:
        >>> from mrla.ops import MRLALight
        >>> mixer, x = MRLALight(32, has_shortcut=False, init="released"), torch.randn(2, 32, 6, 5)
        >>> fast = mixer(x)[0]
        >>> with use("reference"):
        ...     slow = mixer(x)[0]
        >>> torch.allclose(fast, slow, atol=1e-5)
        True
    """
    known = (FUSED, REFERENCE, *BACKENDS)
    if path not in known:
        raise ValueError(f"the path must be one of {', '.join(map(repr, known))}: got {path!r}")
    wanted = BACKENDS if path == FUSED else () if path == REFERENCE else (path,)
    reasons = [BACKENDS[name].unavailable() for name in wanted]
    if reasons and all(reasons):
        raise ValueError("; ".join(filter(None, reasons)))
    before = _path.set(path)
    try:
        yield
    finally:
        _path.reset(before)


@torch.compiler.assume_constant_result
def chosen_path() -> str:
    """The way chosen with `use`; ``"reference"`` also where no backend runs here.

    Returns:
        ``"fused"``, ``"reference"`` or a backend's name.

    Example:
        >>> with use("reference"):
        ...     chosen_path()
        'reference'
    """
    return _path.get() if backends_in_order() else REFERENCE


@torch.compiler.assume_constant_result
def backends_in_order() -> tuple[str, ...]:
    """The names of the backends that are tried here and now, in order."""
    return _available(_path.get(), tuple(BACKENDS.values()))


@functools.cache
def _available(path: str, backends: tuple[Backend, ...]) -> tuple[str, ...]:
    wanted = [backend for backend in backends if path in (FUSED, backend.name)]
    return tuple(backend.name for backend in wanted if backend.unavailable() is None)


def select(call: MixerCall) -> str | None:
    """The name of the backend that does a call; None where torch's operators do it.

    Args:
        call: What would be read.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return None
    for name in backends_in_order():
        if BACKENDS[name].supports(call):
            return name if torch.compiler.is_compiling() or _is_plain_work(call) else None
    return None


def _is_plain_work(call: MixerCall) -> bool:
    """Whether nothing looks at torch's operators one by one, and the tensors' numbers are what lies in memory."""
    if is_watched():
        return False
    # a sign that is still to be applied is in no number that a kernel reads
    for one in (call.x, call.shortcut, *call.parameters, *call.values, *call.keys):
        if one is not None and one.is_neg():
            return False
    return True


_PLAIN: tuple[Any, ...] = (Tensor, torch.nn.Parameter)


def is_plain(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor lie in its memory as its strides say: no subclass or layout says otherwise."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided
