"""Which of two ways an operator is computed: by compiled CPU kernels where they apply, else by torch's operators."""

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from mrla.messages.one_line import one_line

Path = Literal["fused", "reference"]
_path: ContextVar[Path] = ContextVar("mrla.ops.path", default="fused")

_PLAIN = (Tensor, torch.nn.Parameter)
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
HAS_NUMBA = find_spec("numba") is not None
"""Whether what compiles the kernels is installed."""


@functools.cache
def can_compile() -> bool:
    """Whether the kernels can be compiled; says so once where an installed numba does not run here."""
    if not HAS_NUMBA:
        return False
    try:
        numba = import_module("numba")
    except Exception as error:  # as with a numpy or a Python that this numba does not know
        warnings.warn(
            f"mrla goes by torch's operators: numba is installed and does not import ({one_line(error, 200)}); "
            f"install one that fits, pip install -U 'mrla[fast]', or remove it",
            stacklevel=2,
        )
        return False
    return not numba.config.DISABLE_JIT


@contextmanager
def use(path: Path) -> Iterator[None]:
    """Chooses how the operators are computed inside a ``with`` block, for this thread or task alone.

    Both ways give the same numbers within rounding. ``"fused"`` is what happens without a choice: CPU kernels compiled
    with numba wherever they apply (contiguous float32 or bfloat16 maps on a CPU, a plain BatchNorm; never under export
    or tracing), torch's operators elsewhere. A network keeps to the way that it was compiled with.

    Args:
        path: ``"fused"``, or ``"reference"`` for torch's operators everywhere.

    Raises:
        ValueError: If it is another word, or kernels are asked for and numba is not there or does not run.

    Example:
        >>> from mrla.ops import MRLALight
        >>> mixer, x = MRLALight(32, has_shortcut=False, init="released"), torch.randn(2, 32, 6, 5)
        >>> fast = mixer(x)[0]
        >>> with use("reference"):
        ...     slow = mixer(x)[0]
        >>> torch.allclose(fast, slow, atol=1e-5)
        True
    """
    if path not in get_args(Path):
        raise ValueError(f"the path must be one of {', '.join(map(repr, get_args(Path)))}: got {path!r}")
    if path == "fused" and not can_compile():
        what = "does not run here" if HAS_NUMBA else "is not installed"
        raise ValueError(f"the kernels are compiled with numba, which {what}: pip install 'mrla[fast]'")
    before = _path.set(path)
    try:
        yield
    finally:
        _path.reset(before)


@torch.compiler.assume_constant_result
def chosen_path() -> Path:
    """The way chosen with `use`."""
    return "fused" if _path.get() == "fused" and can_compile() else "reference"


def kernels_apply(
    x: Tensor, *others: Tensor | None, parameters: Sequence[Tensor | None] = (), exact: Sequence[Tensor] = ()
) -> bool:
    """Whether the kernels can work on maps like these here and now.

    Args:
        x: The first map.
        others: Others, of its shape and type.
        parameters: All small tensors that the kernels read, in float32 or the type of `x`; they may be strided.
        exact: Small tensors that must be in float32.
    """
    if chosen_path() == "reference" or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    dtype = x.dtype
    if dtype not in KERNEL_DTYPES:
        return False
    for map in (x, *others):
        if map is not None and not (_is_plain(map) and map.dtype is dtype and map.numel() > 0 and map.is_contiguous()):
            return False
    for one in parameters:
        if one is not None and not ((one.dtype is dtype or one.dtype is torch.float32) and _is_plain(one)):
            return False
    for one in exact:
        if not _is_plain(one) or one.dtype is not torch.float32:
            return False
    if torch.compiler.is_compiling():
        return True
    if _is_watched():
        return False
    # a sign that is still to be applied is in no number that a kernel reads
    return not any(one is not None and one.is_neg() for one in (x, *others, *parameters, *exact))


def _is_plain(x: Tensor) -> bool:
    """Whether the numbers of a tensor lie in this machine's memory: no subclass, device or layout says otherwise."""
    return type(x) in _PLAIN and x.is_cpu and x.layout is torch.strided


def _is_watched() -> bool:
    """Whether something looks at each of torch's operators: a dispatch mode, torch.func, forward-mode derivatives."""
    inside: Any = torch._C
    return (
        inside._len_torch_dispatch_stack() > 0
        or (inside._len_torch_function_stack() > 0 and _is_overridden())
        or inside._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _is_overridden() -> bool:
    """Whether a mode sees torch's functions; that of a default device sees only what makes tensors."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode) is not DeviceContext for mode in modes)
