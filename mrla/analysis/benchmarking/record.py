"""Where and with what a benchmark was measured."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_SETTINGS = re.compile(r"MALLOC_|LD_PRELOAD|OMP_|KMP_|MKL_|DNNL_|ONEDNN_|GOMP_")
_PACKAGES = ("mrla", "torch", "torchvision", "timm", "numpy", "numba", "onnx", "onnxruntime", "openvino")


def hardware(device: torch.device, threads: int) -> dict[str, Any]:
    """The processor that numbers depend on, in words; and the GPU, if it computes.

    Args:
        device: Where the arms computed.
        threads: Threads of the CPU that they had.

    Returns:
        ``cpu``, ``cores``, ``threads``, ``gpu``, ``system``; under ``environment`` what is set there that decides about
        memory and threads.
    """
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "environment": {name: value for name, value in sorted(os.environ.items()) if _SETTINGS.match(name)},
    }


def versions() -> dict[str, str | None]:
    """Versions of what computes, None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> dict[str, Any]:
    """The commit of mrla's checkout and whether files differ from it; nulls outside of one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:  # no git on this machine
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie in somebody else's checkout, whose commit would say nothing.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"commit": None, "changed": None}
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "changed": None if changed is None else bool(changed)}


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
