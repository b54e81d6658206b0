"""A smoke test of attached networks, for environments other than the newest: run by `.ci/lowest`, not by pytest.

    python tests/smoke_lowest.py

It needs the core dependencies alone, and numba where the kernels are to be checked. Only public functions are used. It
prints one line a check and exits with 1 if any failed. Mixers have random weights, so that one that is not run, or that
loses its memory, changes the output.
"""

import copy
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import timm
import torch
from torch import Tensor, nn

import mrla

METHODS = ("light", "base", "exact")
# Narrow and small: what is compiled, exported and traced costs by the operator, not by the channel.
NETWORKS = {
    "resnet18": {"layers": (2, 2, 1, 1), "channels": (16, 32, 48, 64), "num_classes": 10},
    "vit_tiny_patch16_224": {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10},
}
PACKAGES = (
    *("torch", "torchvision", "timm", "numpy", "jaxtyping", "safetensors", "huggingface_hub", "jsonargparse", "pyyaml"),
    *("rich", "numba"),
)
IMAGES = (4, 3, 64, 64)


def plain(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **NETWORKS[name])


def randomized(name: str, method: str) -> nn.Module:
    """An attached network whose mixers change its output: what starts at zero or one is drawn anew."""
    model = mrla.attach(plain(name), method, init="released")
    torch.manual_seed(1)
    for path, parameter in model.named_parameters():
        if ".mrla." in path and parameter.ndim < 2:
            nn.init.normal_(parameter, 0.5, 0.2)
    return model


def images(seed: int = 2) -> Tensor:
    return torch.randn(IMAGES, generator=torch.Generator().manual_seed(seed))


def step(
    model: nn.Module, function: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output, and after one backward pass the gradient of each parameter and the buffers."""
    model.zero_grad()
    outputs = (model if function is None else function)(images())
    outputs.square().mean().backward()
    state = {}
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, f"no gradient: {path}"
        state[f"gradient of {path}"] = parameter.grad
    return outputs.detach(), {**state, **{path: buffer.clone() for path, buffer in model.named_buffers()}}


def same(ours: Tensor, expected: Tensor, what: str = "output") -> None:
    # By the largest value: single elements near zero, of gradients too, are sums of what cancels.
    bound = 1e-4 * max(expected.abs().max().item(), 1e-3)
    difference = (ours - expected).abs().max().item()
    assert difference <= bound, f"{what} is off by {difference:.3g}, more than {bound:.3g}"


def check_start(name: str, method: str) -> None:
    model = mrla.attach(plain(name), method)
    for training in (False, True):
        assert torch.equal(model.train(training)(images()), plain(name).train(training)(images())), f"{training=}"


def check_mixers_run(name: str, method: str) -> None:
    outputs, before = randomized(name, method).eval()(images()), plain(name).eval()(images())
    assert outputs.isfinite().all()
    assert (outputs - before).abs().max() > 1e-3, "the mixers do not change the output"


def check_kernels(name: str, method: str) -> None:
    """With numba, what is taken by itself, against torch's operators; without numba the two are one."""
    model = randomized(name, method).train()
    with mrla.ops.use("reference"):
        expected, states = step(copy.deepcopy(model))
    outputs, ours = step(model)
    same(outputs, expected)
    for path in states:
        same(ours[path], states[path], path)


def check_two_steps(name: str, method: str) -> None:
    model = randomized(name, method).train()
    before = {path: parameter.clone() for path, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(images()), torch.arange(IMAGES[0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0], f"the loss does not fall: {losses}"
    unmoved = [path for path, parameter in model.named_parameters() if torch.equal(parameter, before[path])]
    assert not unmoved, f"not trained: {unmoved}"


def check_save_and_load(name: str, method: str) -> None:
    model = randomized(name, method).eval()
    with tempfile.TemporaryDirectory() as folder:
        mrla.save(model, folder, architecture=name, model_args=NETWORKS[name])
        again = mrla.load(folder).eval()
    assert torch.equal(again(images()), model(images()))


def check_detach(name: str, method: str) -> None:
    model, before = mrla.detach(randomized(name, method)).eval(), plain(name).eval()
    assert list(model.state_dict()) == list(before.state_dict())
    assert torch.equal(model(images()), before(images()))


def check_compile_eval(name: str, method: str) -> None:
    model = randomized(name, method).eval()
    with torch.no_grad():
        same(torch.compile(model, fullgraph=True, backend="aot_eager")(images()), model(images()))


def check_compile_training(name: str, method: str) -> None:
    model = randomized(name, method).train()
    expected, states = step(copy.deepcopy(model))
    outputs, ours = step(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    same(outputs, expected)
    for path in states:
        same(ours[path], states[path], path)


def _check_export(name: str, method: str, strict: bool) -> None:
    model = randomized(name, method).eval()
    program = torch.export.export(model, (images(),), strict=strict)
    same(program.module()(images(3)), model(images(3)))


def check_export_strict(name: str, method: str) -> None:
    _check_export(name, method, strict=True)


def check_export_non_strict(name: str, method: str) -> None:
    _check_export(name, method, strict=False)


def check_jit_trace(name: str, method: str) -> None:
    model = randomized(name, method).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, images(), check_trace=False)
        same(traced(images(3)), model(images(3)))


CHECKS = {
    "start": check_start,
    "mixers run": check_mixers_run,
    "kernels": check_kernels,
    "two steps": check_two_steps,
    "save, load": check_save_and_load,
    "detach": check_detach,
    "compile, eval": check_compile_eval,
    "compile, training": check_compile_training,
    "export, strict": check_export_strict,
    "export, non-strict": check_export_non_strict,
    "jit.trace": check_jit_trace,
}


def check_command_line(*words: str) -> None:
    """The commands that need no extra: jsonargparse, PyYAML and rich at work."""
    done = subprocess.run(
        [sys.executable, "-c", "from mrla.cli import main; main()", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1:]


def _passed(title: str, check: Callable[..., None], *arguments: str) -> bool:
    torch.compiler.reset()
    try:
        check(*arguments)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())[:300]
        print(f"FAILED  {title}: {type(error).__name__}: {reason} ({where.filename}:{where.lineno})", flush=True)
        return False
    print(f"passed  {title}", flush=True)
    return True


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def main() -> int:
    warnings.simplefilter("ignore")  # torch.jit is deprecated, and says so at every trace
    print("  ".join(f"{package} {_version(package)}" for package in PACKAGES))
    passed = [_passed(f"mrla {words}", check_command_line, *words.split()) for words in ("--help", "chains resnet18")]
    for name in NETWORKS:
        for method in METHODS:
            passed += [_passed(f"{name}, {method}: {title}", check, name, method) for title, check in CHECKS.items()]
    print(f"{passed.count(True)} of {len(passed)} checks passed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
