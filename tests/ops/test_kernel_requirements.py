"""What the kernels ask before they compute, one test for each kind of input that once gave wrong numbers or a crash."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mrla.ops import METHODS, ResidualEpilogue, use

pytest.importorskip("numba")

ROOT = Path(__file__).parents[2]


def mixer_of(method: str, **options: Any) -> Any:
    torch.manual_seed(0)
    mixer: Any = METHODS[method](16, heads=4, init="released", **options)
    nn.init.uniform_(mixer.norm.weight, 0.5, 1.5)
    return mixer


def pair(shape: tuple[int, ...] = (3, 16, 5, 4)) -> tuple[Tensor, Tensor]:
    return torch.randn(shape) + 0.3, torch.randn(shape)


def everything(mixer: Any, norm: nn.BatchNorm2d, path: Any) -> dict[str, Tensor]:
    """Output, gradients and statistics of a mixer called and behind a tail."""
    mixer, norm = copy.deepcopy(mixer), copy.deepcopy(norm)
    torch.manual_seed(1)
    x, s = (one.requires_grad_() for one in pair())
    with use(path):
        called = mixer(x, s)[0]
        behind = mixer.forward_fused(ResidualEpilogue(x, norm, s, False))[0]
        (called.square().mean() + behind.square().mean()).backward()
    found = {"called": called, "forward_fused": behind, "x": x.grad, "s": s.grad}
    for part in (mixer, norm):
        found |= {f"{id(part) == id(mixer)} grad {name}": one.grad for name, one in part.named_parameters()}
        found |= {f"{id(part) == id(mixer)} {name}": one for name, one in part.named_buffers()}
    return {name: one.detach() for name, one in found.items() if one is not None}


def assert_same(mixer: Any, norm: nn.BatchNorm2d) -> None:
    fused, reference = (everything(mixer, norm, path) for path in ("fused", "reference"))
    assert fused.keys() == reference.keys()
    for name, one in fused.items():
        torch.testing.assert_close(one, reference[name], atol=1e-4, rtol=1e-3, msg=name)


def _flag(norm: nn.BatchNorm2d) -> None:
    norm.track_running_stats = False


def _integers(norm: nn.BatchNorm2d) -> None:
    norm.momentum, norm.eps = 1, 1


def _no_bias(norm: nn.BatchNorm2d) -> None:
    norm.bias = None


def _no_affine(norm: nn.BatchNorm2d) -> None:
    norm.weight = norm.bias = None


def _uncounted(norm: nn.BatchNorm2d) -> None:
    norm.momentum = norm.num_batches_tracked = None


def _expanded(norm: nn.BatchNorm2d) -> None:
    norm.weight = nn.Parameter(torch.full((1,), 1.5).expand(16))


def _strided(norm: nn.BatchNorm2d) -> None:
    norm.weight = nn.Parameter(torch.rand(32)[::2])
    norm.running_mean = torch.rand(48)[::3]


CHANGES = [_flag, _integers, _no_bias, _no_affine, _uncounted, _expanded, _strided]


@pytest.mark.parametrize("method", ["light", "base"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_norms_mean_what_torch_means(change, training, method):
    for whose in ("mixer", "block"):
        mixer, norm = mixer_of(method), nn.BatchNorm2d(16)
        change(mixer.norm if whose == "mixer" else norm)
        assert_same(mixer.train(training), norm.train(training))


@pytest.mark.parametrize("method", ["light", "base"])
def test_default_dtype_and_device_are_of_no_matter(method):
    from mrla.ops.kernels.cpu.epilogue import kernels_norm_as_torch

    mixer, norm = mixer_of(method), nn.BatchNorm2d(16)
    expected = everything(mixer, norm, "reference")
    torch.manual_seed(1)
    x, s = pair()
    before = torch.get_default_dtype()
    kernels_norm_as_torch.cache_clear()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert torch.allclose(
                mixer.forward_fused(ResidualEpilogue(x, norm, s, False))[0], expected["forward_fused"], atol=1e-4
            )
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("method", ["light", "base", "exact", "dw"])
@pytest.mark.parametrize("part", ["value_weight", "norm.running_mean", "norm.weight"])
def test_a_mixer_on_meta_names_itself(method, part):
    mixer: Any = METHODS[method](16)
    owner = mixer.norm if part.startswith("norm") else mixer
    name = part.rpartition(".")[2]
    value = getattr(owner, name).detach().to("meta")
    setattr(owner, name, nn.Parameter(value) if name in owner._parameters else value)
    for path in ("fused", "reference"):
        with use(path), pytest.raises(RuntimeError, match=f"{type(mixer).__name__} of mrla.*meta"):
            mixer.eval()(*pair())


@pytest.mark.parametrize("method", ["light", "base", "exact", "dw"])
@pytest.mark.parametrize("path", ["fused", "reference"])
def test_one_value_per_channel_goes_by_the_running_statistics(method, path):
    mixer: Any = METHODS[method](16, init="released")
    before = {name: one.clone() for name, one in mixer.named_buffers()}
    x, s = pair((1, 16, 1, 1))
    with use(path):
        found = mixer(x, s)[0]
        assert torch.allclose(found, copy.deepcopy(mixer).eval()(x, s)[0], atol=1e-6)
        assert all(torch.equal(one, before[name]) for name, one in mixer.named_buffers())
        assert mixer.norm.training
        mixer.norm.running_mean = mixer.norm.running_var = None
        out = mixer(x, s)[0]  # the update less its own mean: nothing but the bias
        assert torch.allclose(out, x + mixer.norm.bias[:, None, None], atol=1e-6)


@pytest.mark.parametrize("method", ["light", "base"])
def test_a_second_derivative_says_the_remedy(method):
    mixer, (x, s) = mixer_of(method).eval(), pair()
    x.requires_grad_()
    norm = nn.BatchNorm2d(16).eval()
    for out in (mixer(x, s)[0], mixer.forward_fused(ResidualEpilogue(x, norm, s, False))[0]):
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)  # the incoming gradient is constant
        with pytest.raises(RuntimeError, match=r"use\(\"reference\"\)"):
            grad.square().sum().backward()


@pytest.mark.unchecked  # other types than the annotations say
@pytest.mark.parametrize("method", ["light", "base"])
def test_integers_where_real_numbers_are_due(method):
    from mrla.ops.calls import BaseForm, BaseWeights, LightWeights
    from mrla.ops.kernels.cpu import fused_base, fused_light

    mixer, (x, s) = mixer_of(method), pair()
    taps = mixer.query_weight, mixer.key_weight, mixer.value_weight
    vectors = mixer.norm.weight, mixer.norm.bias
    with torch.no_grad():
        for eps in (1, torch.tensor(1), torch.tensor(1.0)):
            found = []
            for one in (1.0, eps):
                if method == "light":
                    weights = LightWeights(*taps, mixer.decay, *vectors)
                    out, state = fused_light.forward(x, s, weights, None, None, 4, one)
                    found.append(
                        [out, *fused_light.backward(x, x, s, weights, state, None, one, batch_statistics=True)[2]]
                    )
                else:
                    weights = BaseWeights(*taps, *vectors, None)
                    form = BaseForm(4, one, True, True)
                    out, state = fused_base.forward(x, None, (), (), weights, None, None, form)
                    back = fused_base.backward(
                        x, None, None, (), x, None, (), (), weights, state, None, form, batch_statistics=True, wanted=()
                    )
                    found.append([out, *back[4][:5]])
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.unchecked
def test_a_cache_cut_short_or_full_is_said_once(tmp_path):
    script = """
import pathlib, sys, warnings, torch
from mrla.ops import METHODS, use
from mrla.ops.kernels.cpu import compiling, norms
full = sys.argv[1] == "full"
if full:
    def no_room(*_):
        raise OSError(28, "No space left on device")
    compiling.FunctionCache.save_overload = no_room
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    norms.finish()
    norms.statistics()
print(sum("cache" in str(one.message) for one in said))
"""
    for what, expected in (("fresh", "0"), ("cut", "1"), ("healed", "0"), ("full", "1")):
        if what == "cut":
            for file in (*tmp_path.rglob("*.nbi"), *tmp_path.rglob("*.nbc")):
                file.write_bytes(file.read_bytes()[:20])
        if what == "full":
            for file in (*tmp_path.rglob("*.nbi"), *tmp_path.rglob("*.nbc")):
                file.unlink()
        environment = {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [sys.executable, "-c", script, what], capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.stdout.strip() == expected, (what, done.stderr[-500:])


def _negated(tensor: Tensor) -> Tensor:
    """The same numbers, as a view of their opposites whose sign is still to be applied."""
    return torch._neg_view(-tensor.detach())


@pytest.mark.parametrize("method", ["light", "base"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", ["maps", "mixer", "norm"])
def test_signs_that_are_still_to_be_applied(what, training, method):
    found = []
    for negated in (False, True):
        mixer, norm = mixer_of(method).train(training), nn.BatchNorm2d(16).train(training)
        torch.manual_seed(1)
        x, s = pair()
        if negated and what == "maps":
            x, s = _negated(x), _negated(s)
        elif negated:
            for part in (mixer if what == "mixer" else norm).modules():
                for name, one in part.named_parameters(recurse=False):
                    setattr(part, name, nn.Parameter(_negated(one)))
                for name, one in part.named_buffers(recurse=False):
                    setattr(part, name, _negated(one) if one.is_floating_point() else one)
        called, behind = mixer(x, s)[0], mixer.forward_fused(ResidualEpilogue(x, norm, s, False))[0]
        (called.square().mean() + behind.square().mean()).backward()
        found.append([called, behind, *(one.grad for one in (*mixer.parameters(), *norm.parameters()))])
    for one, expected in zip(*found, strict=True):
        torch.testing.assert_close(one.resolve_neg(), expected, atol=1e-5, rtol=1e-4)


MEMORIES = {"light": {"carry": "output"}, "base": {}, "exact": {}}


def _memory(method: str, change: Callable[[Tensor], Tensor]) -> tuple[Any, Tensor, Tensor, Any]:
    first, second = (mixer_of(method, **MEMORIES[method]).eval() for _ in range(2))
    x, s = pair()
    memory = first(x, s)[1]
    if isinstance(memory, Tensor):
        return second, x, s, change(memory)
    return second, x, s, type(memory)(*(tuple(change(one) for one in part) for part in memory))


CHANGED_MEMORIES: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": Tensor.double,
    "bfloat16": Tensor.bfloat16,
    "strided": lambda one: one.transpose(-1, -2).contiguous().transpose(-1, -2),
    "negated": _negated,
}


@pytest.mark.parametrize("method", MEMORIES)
@pytest.mark.parametrize("change", CHANGED_MEMORIES)
def test_memory_of_other_kinds(change, method):
    mixer, x, s, memory = _memory(method, CHANGED_MEMORIES[change])
    found = []
    for path in ("fused", "reference"):
        with use(path):
            found.append(mixer(x, s, memory)[0])
    assert found[0].dtype == x.dtype
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@pytest.mark.unchecked  # shapes that the annotations refuse
@pytest.mark.parametrize("method", MEMORIES)
@pytest.mark.parametrize("path", ["fused", "reference"])
@pytest.mark.parametrize("change", [lambda one: one[..., :3], lambda one: one[:1], lambda one: one[:, :4]])
def test_memory_of_other_shapes_is_refused(change, path, method):
    mixer, x, s, memory = _memory(method, change)
    with use(path), pytest.raises(ValueError, match=r"must have the shape of x, \(3, 16, 5, 4\): got"):
        mixer(x, s, memory)


@pytest.mark.parametrize("method", ["light", "base"])
@pytest.mark.parametrize("first", ["fused", "reference"])
def test_one_graph_may_go_both_ways(first, method):
    second = "reference" if first == "fused" else "fused"
    found = []
    for paths in ((first, second), ("reference", "reference")):
        mixer = mixer_of(method).train()
        torch.manual_seed(1)
        outputs = []
        for path in paths:
            with use(path):
                outputs.append(mixer(*pair())[0])
        sum(one.square().mean() for one in outputs).backward()
        found.append([*outputs, *(one.grad for one in mixer.parameters()), *mixer.buffers()])
    for one, expected in zip(*found, strict=True):
        torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-4)
