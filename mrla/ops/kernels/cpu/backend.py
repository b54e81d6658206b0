"""The CPU's backend: kernels that numba compiles when they first run."""

import functools
import warnings
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from mrla.messages.one_line import one_line

from ...backend import Backend, is_plain
from ...calls import MixerCall
from . import epilogue, fused_base, fused_light

DTYPES = (torch.float32, torch.bfloat16)


class CpuBackend(Backend):
    """Contiguous float32 or bfloat16 maps on a CPU."""

    name = "cpu"
    light_forward = staticmethod(fused_light.forward)  # type: ignore[assignment]
    light_backward = staticmethod(fused_light.backward)  # type: ignore[assignment]
    base_forward = staticmethod(fused_base.forward)  # type: ignore[assignment]
    base_backward = staticmethod(fused_base.backward)  # type: ignore[assignment]
    begin = staticmethod(epilogue.begin)  # type: ignore[assignment]

    def unavailable(self) -> str | None:
        """Why numba cannot compile the kernels here; None where it can."""
        if can_compile():
            return None
        what = "is not installed" if find_spec("numba") is None else "does not run here"
        return f"the kernels are compiled with numba, which {what}: pip install 'mrla[fast]'"

    def supports(self, call: MixerCall) -> bool:
        """Whether the maps are contiguous, of one type, and all that is read lies on the CPU."""
        dtype = call.x.dtype
        if dtype not in DTYPES:
            return False
        for map in (call.x, call.shortcut, *call.values):
            if map is not None and not (
                _is_here(map) and map.dtype is dtype and map.numel() > 0 and map.is_contiguous()
            ):
                return False
        for one in call.parameters:
            if one is not None and not ((one.dtype is dtype or one.dtype is torch.float32) and _is_here(one)):
                return False
        return all(_is_here(one) and one.dtype is torch.float32 for one in call.keys)


def _is_here(tensor: Tensor) -> bool:
    return tensor.is_cpu and is_plain(tensor)


@functools.cache
def can_compile() -> bool:
    """Whether the kernels can be compiled; says so once where an installed numba does not run here."""
    if find_spec("numba") is None:
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
