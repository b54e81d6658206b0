"""Whether training with mixers leaves tensors or memory behind, with Python's garbage collector off.

    python benchmarks/memory_growth.py [--steps 2000] [--out benchmarks/results/NAME.json]

What later blocks need rides on tensors, so a memory that held the tensor it rides on would be a circle, which only the
garbage collector ends. Each method trains a narrow ResNet and a small ViT; after the first fifth of the steps and at
the end the live tensors are counted and the resident memory is read.
"""

import argparse
import gc
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
from result_file import write_result
from torch import nn

import mrla

METHODS: dict[str, dict[str, Any]] = {
    "light": {},
    "light-output": {"carry": "output"},
    "base": {},
    "exact": {},
    "dw": {},
}
NETWORKS = {
    "resnet": lambda: timm.create_model("resnet18", channels=(8, 8, 16, 16), num_classes=5),
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, embed_dim=24, num_classes=5
    ),
}


def live_tensors() -> int:
    """Tensors that Python holds."""
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def resident_mb() -> float:
    """Memory of this process, in MB; from Linux's /proc."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def grown(model: nn.Module, steps: int) -> dict[str, float]:
    """What is left of the last four fifths of a training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x, start = torch.randn(4, 3, 32, 32), (0, 0.0)
    gc.collect()
    gc.disable()
    try:
        for step in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if step == steps // 5:
                start = live_tensors(), resident_mb()
        return {"tensors": live_tensors() - start[0], "resident_mb": round(resident_mb() - start[1], 2)}
    finally:
        gc.enable()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.steps < 5:
        parser.error(f"steps must be at least 5: got {options.steps}")
    started = datetime.now()
    torch.set_num_threads(1)
    results = {}
    for name, make in NETWORKS.items():
        for method, arguments in METHODS.items():
            model = mrla.attach(make(), method.partition("-")[0], init="released", **arguments).train()
            results[f"{name} {method}"] = grown(model, options.steps)
            print(f"{name:7} {method:13}", results[f"{name} {method}"], flush=True)
    write_result("memory_growth", started, options, 1, results=results)


if __name__ == "__main__":
    main()
