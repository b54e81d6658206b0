"""The compiled CPU kernels give what torch's operators give, and keep away wherever somebody would notice."""

import copy
import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as every_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mrla.ops import METHODS, ChainPlace, LayerMemory, LayerMixer, MRLABase, MRLALight, use
from mrla.ops.calls import BaseForm, BaseWeights, LightWeights
from mrla.ops.kernels.base import base

pytest.importorskip("numba")


@pytest.fixture
def launched(monkeypatch) -> list[Any]:
    """The kernels that have been run so far."""
    from mrla.ops.kernels.cpu import launch

    seen: list[Any] = []
    run = launch.run

    def spy(kernel: Any, **fields: Any) -> None:
        seen.append(kernel)
        run(kernel, **fields)

    monkeypatch.setattr(launch, "run", spy)
    return seen


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """A chain of mixers, and the maps that go through it."""

    method: str
    shape: tuple[int, int, int, int]
    options: dict[str, Any] = field(default_factory=dict)
    length: int = 1
    k: int | None = None
    dtype: torch.dtype = torch.float32
    training: bool = True
    placed: bool = False
    change: Callable[[nn.BatchNorm2d], Any] | None = None
    """Something that is done to the norm of every mixer."""

    def mixers(self) -> list[Any]:
        made = []
        for at in range(self.length):
            place = ChainPlace(at, self.length) if self.placed else None
            mixer = randomised(METHODS[self.method](self.shape[1], place=place, **self.options))
            if self.k is not None:
                for name in ("query_weight", "key_weight"):
                    setattr(mixer, name, nn.Parameter(torch.randn(1, 1, self.k) / self.k**0.5))
            if self.change is not None:
                self.change(mixer.norm)
            made.append(mixer.to(self.dtype).train(self.training))
        return made

    def maps(self) -> list[Tensor]:
        """For each mixer the block's output, and the shortcut."""
        return [torch.randn(self.shape).add(0.3).to(self.dtype) for _ in range(2 * self.length)]

    def run(self, mixers: Sequence[Any], maps: Sequence[Tensor], path: Any, *, backward: bool = True) -> dict[str, Any]:
        """All that comes out of the chain, of copies of mixers and maps: values, gradients, buffers."""
        mixers = [copy.deepcopy(mixer) for mixer in mixers]
        leaves = [one.detach().clone().requires_grad_(backward) for one in maps]
        torch.manual_seed(5)
        found: dict[str, Any] = {}
        memory, outs = None, []
        with use(path), torch.set_grad_enabled(backward):
            for at, mixer in enumerate(mixers):
                out, memory = mixer(leaves[2 * at], leaves[2 * at + 1], memory)
                outs.append(out)
                found[f"out {at}"] = out
            if isinstance(memory, LayerMemory):
                outs += [*memory.values, *memory.keys]
                found |= {f"value {at}": one for at, one in enumerate(memory.values)}
                found |= {f"key {at}": one for at, one in enumerate(memory.keys)}
            found["random"] = torch.rand(4, dtype=torch.float64)  # where the generator stands
            if backward:
                generator = torch.Generator().manual_seed(3)
                sums = [
                    (one * torch.randn(one.shape, generator=generator).to(one.dtype)).sum().double() for one in outs
                ]
                torch.stack(sums).sum().backward()
        for at, leaf in enumerate(leaves):
            assert torch.equal(leaf, maps[at])  # inputs are left alone
            if leaf.grad is not None:
                found[f"grad of {'shortcut' if at % 2 else 'x'} {at // 2}"] = leaf.grad
        for at, mixer in enumerate(mixers):
            found |= {f"grad of {name} {at}": p.grad for name, p in mixer.named_parameters() if p.grad is not None}
            found |= {f"{name} {at}": one for name, one in mixer.named_buffers()}
        return {name: one.detach() for name, one in found.items()}


def randomised(mixer: Any) -> Any:
    """With weights that hide nothing."""
    mixer.reset_parameters("released")
    with torch.no_grad():
        if isinstance(mixer.norm, nn.BatchNorm2d):
            mixer.norm.weight.uniform_(0.5, 1.5)
            mixer.norm.bias.normal_(std=0.3)
            if mixer.norm.running_mean is not None:
                mixer.norm.running_mean.normal_(std=0.1)
                mixer.norm.running_var.uniform_(0.5, 1.5)
        if mixer.scale is not None:
            mixer.scale.uniform_(0.5, 1.5)
        mixer.value_weight.normal_(std=0.5)
        for weight in (mixer.query_weight, mixer.key_weight):
            weight.normal_(std=1.0)
    return mixer


def doubled(case: Case, mixers: Sequence[Any], maps: Sequence[Tensor], **more: Any) -> dict[str, Any]:
    """The same in float64, by torch's operators."""
    return case.run(
        [copy.deepcopy(one).double() for one in mixers], [one.double() for one in maps], "reference", **more
    )


def assert_as_good(
    found: dict[str, Any], reference: dict[str, Any], truth: dict[str, Any], *, times: float = 4.0
) -> None:
    """What the kernels found is off by no more than a few times what torch's operators are off."""
    assert found.keys() == reference.keys() == truth.keys()
    largest = max([float(one.abs().max()) for name, one in truth.items() if name.startswith("grad")], default=0.0)
    for name, expected in truth.items():
        one, other = found[name], reference[name]
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert one.isfinite().all(), name
        if not one.is_floating_point() or name == "random":
            assert torch.equal(one, other), name
            continue
        is_gradient = name.startswith("grad")
        scale = max(float(expected.abs().max()), 1e-3 * largest if is_gradient else 1e-3)
        # In bfloat16 a ReLU's mask differs here and there; `test_bfloat16_is_no_worse` takes many cases together.
        floor = 8e-6 if other.dtype == torch.float32 else 2**-8
        if is_gradient and other.dtype == torch.bfloat16:
            if name.startswith(("grad of query", "grad of key")) or "norm" in name:
                continue
            floor = 0.06
            off, allowed = ((value - expected).norm() / expected.numel() ** 0.5 for value in (one, other))
        else:
            off, allowed = ((value - expected).abs().max() for value in (one, other))
        off, allowed = float(off), times * float(allowed)
        assert off <= max(allowed, floor * scale), f"{name}: off by {off:.2e}, {off / scale:.2e} of its largest value"


def check(case: Case, launched: list[Any] | None = None) -> None:
    torch.manual_seed(sum(map(ord, str(case.shape) + case.method)))
    mixers, maps = case.mixers(), case.maps()
    if launched is not None:
        launched.clear()
    found = case.run(mixers, maps, "fused")
    assert launched is None or launched, "the kernels were not used"
    used = None if launched is None else len(launched)
    reference = case.run(mixers, maps, "reference")
    assert launched is None or used == len(launched)
    assert_as_good(found, reference, doubled(case, mixers, maps))


# --- numbers

SIZES = [(1, 1), (1, 9), (7, 1), (5, 7), (3, 15), (2, 16), (4, 17), (31, 33), (3, 50), (32, 32), (2, 64), (9, 31)]
HEADS = {16: (16, 1, 4), 64: (2, 64, 8), 256: (8, 16, 4)}
CASES = {}
for _at, (_h, _w) in enumerate(SIZES):
    _batch, _channels = (3, 1, 9)[_at % 3], tuple(HEADS)[(_at // 2) % 3]
    if (_h, _w) == (1, 1):
        _batch = 9
    for _method in ("light", "base"):
        _kernel, _heads = (3, 5, 7)[(_at + (_method == "base")) % 3], HEADS[_channels][_at % 3]
        CASES[f"{_method}-{_batch}x{_channels}x{_h}x{_w}-{_heads}heads-k{_kernel}"] = Case(
            _method, (_batch, _channels, _h, _w), {"heads": _heads}, 1 if _method == "light" else 1 + _at % 5, _kernel
        )


def over(cases: dict[str, Case], name: str = "case") -> Any:
    return pytest.mark.parametrize(name, [pytest.param(case, id=key) for key, case in cases.items()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@over(CASES)
def test_every_shape(case, training, dtype, launched):
    check(Case(case.method, case.shape, case.options, case.length, case.k, dtype, training), launched)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("method", ["light", "base"])
def test_bfloat16_is_no_worse(method, training):
    """Over all shapes, each value and gradient is as near to float64 as by torch's operators, which round more."""
    off: dict[str, list[float]] = {}
    for case in CASES.values():
        if case.method != method or case.shape[0] * case.shape[2] * case.shape[3] < 32:
            continue
        case = Case(case.method, case.shape, case.options, case.length, case.k, torch.bfloat16, training)
        for seed in range(2):
            torch.manual_seed(seed)
            mixers, maps = case.mixers(), case.maps()
            both = [case.run(mixers, maps, path) for path in ("fused", "reference")]
            truth = doubled(case, mixers, maps)
            largest = max(float(one.norm()) for name, one in truth.items() if name.startswith("grad"))
            for name, expected in truth.items():
                size = float(expected.norm()) if expected.is_floating_point() else 0.0
                if size > 1e-3 * largest:
                    sums = off.setdefault(name.rsplit(" ", 1)[0], [0.0, 0.0])
                    for at, one in enumerate(both):
                        sums[at] += float((one[name] - expected).norm()) / size
    assert len(off) > 8
    for name, (fused, reference) in off.items():
        assert fused <= 1.35 * reference + 1e-6, (name, fused, reference)


def _no_momentum(norm: nn.BatchNorm2d) -> None:
    norm.momentum = None
    norm.num_batches_tracked.fill_(3)


def _untracked(norm: nn.BatchNorm2d) -> None:
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def _big_eps(norm: nn.BatchNorm2d) -> None:
    norm.eps = 0.3


S = (5, 32, 6, 7)
FORMS = {
    "light-no-shortcut": Case("light", S, {"has_shortcut": False}),
    "light-no-momentum": Case("light", S, change=_no_momentum),
    "light-momentum-0": Case("light", S, change=lambda norm: setattr(norm, "momentum", 0.0)),
    "light-untracked": Case("light", S, change=_untracked),
    "light-untracked-eval": Case("light", S, change=_untracked, training=False),
    "light-frozen-norm": Case("light", S, change=lambda norm: norm.eval()),
    "light-eps": Case("light", S, change=_big_eps),
    "light-eps-eval": Case("light", S, change=_big_eps, training=False),
    "light-drop_path": Case("light", (8, 32, 6, 7), {"drop_path": 0.4}),
    "light-drop_path-eval": Case("light", (8, 32, 6, 7), {"drop_path": 0.4}, training=False),
    "light-drop_path-bfloat16": Case("light", (8, 32, 6, 7), {"drop_path": 0.4}, dtype=torch.bfloat16),
    "light-channel-wise": Case("light", S, {"head_dim": 1}),
    "light-three-channels": Case("light", (2, 3, 4, 5)),
    "light-one-channel": Case("light", (2, 1, 4, 5)),
    "light-k-wider-than-the-channels": Case("light", (2, 4, 4, 5), k=11),
    "base-no-relu": Case("base", S, {"out_act": None}, 3),
    "base-relu-without-scale": Case("base", S, {"init": "released"}, 3),
    "base-no-relu-eval": Case("base", S, {"out_act": None}, 3, training=False),
    "base-sigmoid": Case("base", S, {"weighting": "sigmoid"}, 4),
    "base-sigmoid-no-relu-eval": Case("base", S, {"weighting": "sigmoid", "out_act": None}, 2, training=False),
    "base-last-1": Case("base", S, {"last": 1}, 3),
    "base-last-2": Case("base", S, {"last": 2}, 4),
    "base-last-3-sigmoid": Case("base", S, {"last": 3, "weighting": "sigmoid"}, 5),
    "base-last-longer-than-the-chain": Case("base", S, {"last": 9}, 3),
    "base-placed": Case("base", S, length=4, placed=True),
    "base-placed-eval": Case("base", S, length=4, placed=True, training=False),
    "base-no-momentum": Case("base", S, length=2, change=_no_momentum),
    "base-untracked": Case("base", S, length=2, change=_untracked),
    "base-untracked-eval": Case("base", S, length=2, change=_untracked, training=False),
    "base-frozen-norm": Case("base", S, length=2, change=lambda norm: norm.eval()),
    "base-eps": Case("base", S, length=2, change=_big_eps),
    "base-drop_path": Case("base", (8, 32, 6, 7), {"drop_path": 0.4}, 3),
    "base-drop_path-no-relu-eval": Case("base", (8, 32, 6, 7), {"drop_path": 0.4, "out_act": None}, 3, training=False),
    "base-drop_path-bfloat16": Case("base", (8, 32, 6, 7), {"drop_path": 0.4}, 2, dtype=torch.bfloat16),
    "base-channel-wise": Case("base", S, {"head_dim": 1}, 2),
    "base-three-channels": Case("base", (2, 3, 4, 5), length=2),
    "base-k-wider-than-the-channels": Case("base", (2, 4, 4, 5), length=2, k=11),
}


@over(FORMS)
def test_every_form(case, launched):
    check(case, launched)


@over({name: case for name, case in FORMS.items() if case.training})
def test_without_a_gradient(case):
    """The same values and statistics where no gradient is asked for."""
    torch.manual_seed(1)
    mixers, maps = case.mixers(), case.maps()
    found, expected = (case.run(mixers, maps, "fused", backward=backward) for backward in (False, True))
    assert all(torch.equal(one, expected[name]) for name, one in found.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["light", "base"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_far_from_zero(method, training, dtype):
    """Where mean is large against deviation, the variance must not drown in rounding; in bfloat16 the maps have."""
    shift = 100.0 if dtype == torch.float32 else 4.0
    case = Case(method, (4, 16, 8, 9), {"heads": 2}, 2, dtype=dtype, training=training)
    mixers, maps = case.mixers(), [(one.float() + shift).to(dtype) for one in case.maps()]
    found, expected = (case.run(mixers, maps, path) for path in ("fused", "reference"))
    assert_as_good(found, expected, doubled(case, mixers, maps))


@pytest.mark.parametrize("method", ["light", "base"])
def test_starts_as_the_identity_to_the_last_bit(method, launched):
    for dtype in (torch.float32, torch.bfloat16):
        for training in (True, False):
            x, shortcut, memory = torch.randn(3, 32, 5, 7).to(dtype), torch.randn(3, 32, 5, 7).to(dtype), None
            for _ in range(2):
                mixer = METHODS[method](32).to(dtype).train(training)
                out, memory = mixer(x, shortcut, memory)
                assert torch.equal(out, x)
                assert out.data_ptr() != x.data_ptr()
    assert launched


def test_the_identity_learns(launched):
    for method in ("light", "base"):
        mixer = METHODS[method](32)
        mixer(torch.randn(2, 32, 4, 4), torch.randn(2, 32, 4, 4))[0].square().sum().backward()
        awake = mixer.norm.weight if mixer.scale is None else mixer.scale
        assert awake.grad.abs().max() > 1e-3
    assert launched


@pytest.mark.parametrize("method", ["light", "base"])
@pytest.mark.parametrize("batch", [1, 3, 9])
def test_the_number_of_threads_changes_no_bit(method, batch, set_threads):
    """Also where there are fewer images than threads, so that the heads of one image are shared out."""
    for training in (True, False):
        case = Case(method, (batch, 48, 30, 31), {"heads": 6}, 2, training=training)
        torch.manual_seed(0)
        mixers, maps = case.mixers(), case.maps()
        runs = []
        for threads in (1, 2, 5):
            set_threads(threads)
            runs.append(case.run(mixers, maps, "fused"))
        for run in runs[1:]:
            assert all(torch.equal(one, runs[0][name]) for name, one in run.items())
        set_threads(2)
        assert_as_good(runs[0], case.run(mixers, maps, "reference"), doubled(case, mixers, maps))


def test_heads_that_do_not_share_out_evenly(set_threads):
    """Five heads in as many chunks as four threads ask for; kernels that reach over the edge of a chunk."""
    for method in ("light", "base"):
        case = Case(method, (3, 20, 31, 33), {"heads": 5}, 2, k=9, training=False)
        mixers, maps = case.mixers(), case.maps()
        set_threads(1)
        expected = case.run(mixers, maps, "fused")
        set_threads(4)
        found = case.run(mixers, maps, "fused")
        assert all(torch.equal(one, expected[name]) for name, one in found.items())
        assert_as_good(found, case.run(mixers, maps, "reference"), doubled(case, mixers, maps))


@pytest.mark.parametrize("method", ["light", "base"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("channels", "heads"), [(20, 5), (6, 6)])
def test_pieces_of_work_in_any_order(channels, heads, method, training, set_threads, monkeypatch):
    """No piece leans on another's having been done, also where a kernel reaches over the edge of a chunk."""
    from mrla.ops.kernels.cpu import launch

    def backwards(kernel: Any, *, items: int, work: int, **fields: Any) -> None:
        for item in reversed(range(items)):
            call = kernel.record.pack(item + 1, fields, counter=item)
            kernel.ctypes(ctypes.addressof(call))

    case = Case(method, (3, channels, 5, 18), {"heads": heads}, 2, k=9, training=training)
    mixers, maps = case.mixers(), case.maps()
    set_threads(4)
    expected = case.run(mixers, maps, "fused")
    monkeypatch.setattr(launch, "run", backwards)
    # torch then fills fresh memory with NaN: nothing may be read before it is written.
    torch.use_deterministic_algorithms(True)
    try:
        found = case.run(mixers, maps, "fused")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, expected[name]) for name, one in found.items())


def test_the_same_numbers_each_time(set_threads):
    set_threads(2)
    for method in ("light", "base"):
        case = Case(method, (2, 32, 31, 33), length=2)
        mixers, maps = case.mixers(), case.maps()
        first, *others = (case.run(mixers, maps, "fused") for _ in range(4))
        assert all(torch.equal(one, first[name]) for other in others for name, one in other.items())


@pytest.mark.parametrize("method", ["light", "base"])
@pytest.mark.parametrize("frozen", ["x", "shortcut", "parameters", "norm", "kernels"])
def test_gradients_of_a_part(method, frozen, launched):
    """Whatever is left out of the gradient, the rest gets the same one."""
    mixers = [randomised(METHODS[method](16)) for _ in range(2)]
    maps = [torch.randn(2, 16, 5, 4) for _ in range(4)]
    grads = []
    for path in ("fused", "reference"):
        copies = [copy.deepcopy(mixer) for mixer in mixers]
        leaves = [one.clone().requires_grad_(frozen != ("shortcut" if at % 2 else "x")) for at, one in enumerate(maps)]
        for mixer in copies:
            for name, parameter in mixer.named_parameters():
                off = frozen == "parameters" or (frozen == "norm") == name.startswith("norm")
                parameter.requires_grad_(not (off and frozen in ("parameters", "norm", "kernels")))
        memory, total = None, 0
        with use(path):
            for at, mixer in enumerate(copies):
                out, memory = mixer(leaves[2 * at], leaves[2 * at + 1], memory)
                total = total + out.square().sum()
        total.backward()
        parameters = [parameter for mixer in copies for parameter in mixer.parameters()]
        grads.append([one.grad for one in (*leaves, *parameters)])
    assert launched
    assert any(one is not None for one in grads[0])
    for one, other in zip(*grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=2e-4 * max(1.0, float(other.abs().max())), rtol=0)


@pytest.mark.parametrize("method", ["light", "base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_incoming_gradients_of_any_layout(method, dtype):
    mixer = randomised(METHODS[method](16, heads=4)).to(dtype).eval()
    x, s = (torch.randn(2, 16, 5, 4).to(dtype) for _ in range(2))
    cotangent = torch.randn(2, 16, 5, 4).to(dtype)
    many = {
        "plain": lambda: cotangent,
        "channels_last": lambda: cotangent.contiguous(memory_format=torch.channels_last),
        "strided": lambda: torch.stack((cotangent, cotangent), -1)[..., 0],
    }
    found = {}
    for name, make in many.items():
        leaf = x.clone().requires_grad_()
        out, memory = mixer(leaf, s)
        if memory is None:
            (found[name],) = torch.autograd.grad(out, leaf, make())
        else:  # the memory's own, likewise
            (found[name],) = torch.autograd.grad((out, memory.values[0]), leaf, (make(), make()))
    assert all(torch.equal(one, found["plain"]) for one in found.values())
    leaf = x.clone().requires_grad_()
    (summed,) = torch.autograd.grad(mixer(leaf, s)[0].sum(), leaf)  # one number, expanded
    (ones,) = torch.autograd.grad(mixer(leaf, s)[0], leaf, torch.ones_like(x))
    assert torch.equal(summed, ones)


def test_gradients_through_the_memory_alone():
    """The output may be dropped; what reaches a block then comes through its key and value."""
    first, second = (randomised(MRLABase(16, heads=4)) for _ in range(2))
    maps = [torch.randn(2, 16, 5, 4) for _ in range(2)]
    found = []
    for path in ("fused", "reference"):
        leaf = maps[0].clone().requires_grad_()
        with use(path):
            _, memory = copy.deepcopy(first)(leaf)
            out, _ = copy.deepcopy(second)(maps[1], memory=memory)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        found.append(grad)
    assert found[1].abs().max() > 1e-2
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chain_of_both_ways(dtype):
    """A mixer takes the memory of one that was computed the other way."""
    mixers = [randomised(MRLABase(16, heads=4)).to(dtype).eval() for _ in range(3)]
    maps = [torch.randn(2, 16, 5, 4).to(dtype) for _ in range(3)]
    results = []
    for paths in (("reference",) * 3, ("fused", "reference", "fused"), ("reference", "fused", "reference")):
        memory, leaves = None, [one.clone().requires_grad_() for one in maps]
        for mixer, x, path in zip(mixers, leaves, paths, strict=True):
            with use(path):
                out, memory = mixer(x, memory=memory)
        results.append([out, *torch.autograd.grad(out.sum(), leaves), *memory.keys])
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], atol=tolerance, rtol=tolerance)


def test_twice_backward_through_one_graph():
    for method in ("light", "base"):
        mixer = randomised(METHODS[method](16))
        x = torch.randn(2, 16, 5, 4, requires_grad=True)
        out = mixer(x, torch.randn(2, 16, 5, 4))[0].square().sum()
        first, second = (torch.autograd.grad(out, (x, *mixer.parameters()), retain_graph=True, materialize_grads=True)
                         for _ in range(2))  # fmt: skip
        assert all(map(torch.equal, first, second))


def test_a_changed_input_is_noticed_in_backward():
    x = torch.randn(2, 16, 5, 4, requires_grad=True)
    for method in ("light", "base"):
        doubled_x = x * 2
        out = randomised(METHODS[method](16))(doubled_x, torch.randn(2, 16, 5, 4))[0].sum()
        with torch.no_grad():
            doubled_x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def test_the_map_may_be_the_shortcut():
    for path in ("fused", "reference"):
        torch.manual_seed(0)
        x, mixer = torch.randn(2, 16, 5, 4, requires_grad=True), randomised(MRLALight(16))
        with use(path):
            out = mixer(x, x)[0].square().sum()
        found = torch.autograd.grad(out, x)[0]
        if path == "fused":
            expected = found
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_a_part_of_a_larger_tensor():
    """Contiguous, but not at the front of its storage."""
    for method in ("light", "base"):
        whole, shortcut = torch.randn(5, 16, 5, 4), torch.randn(5, 16, 5, 4)
        mixer = randomised(METHODS[method](16)).eval()
        assert torch.equal(mixer(whole[2:4], shortcut[1:3])[0], mixer(whole[2:4].clone(), shortcut[1:3].clone())[0])


def test_weights_in_any_layout():
    """A weight whose numbers do not lie one after the other, as after loading a transposed file."""
    for method in ("light", "base"):
        mixer = randomised(METHODS[method](16)).eval()
        x, s = torch.randn(2, 16, 5, 4), torch.randn(2, 16, 5, 4)
        expected = mixer(x, s)[0]
        taps = mixer.value_weight.detach()
        mixer.value_weight = nn.Parameter(taps.transpose(2, 3).contiguous().transpose(2, 3))
        mixer.norm.weight = nn.Parameter(torch.stack((mixer.norm.weight.detach(), taps.new_zeros(16)), 1)[:, 0])
        for name in ("query_weight", "key_weight"):
            weight = getattr(mixer, name).detach()
            setattr(mixer, name, nn.Parameter(torch.stack((weight, weight + 1), -1)[..., 0]))
        assert not mixer.value_weight.is_contiguous()
        assert torch.equal(mixer(x, s)[0], expected)


@pytest.mark.parametrize("method", ["light", "base"])
def test_float64_goes_by_torch(method, launched):
    case = Case(method, S, length=2, dtype=torch.float64)
    mixers, maps = case.mixers(), case.maps()
    found, expected = (case.run(mixers, maps, path) for path in ("fused", "reference"))
    assert all(torch.equal(one, expected[name]) for name, one in found.items())
    assert not launched


@pytest.mark.parametrize("method", ["light", "base"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["identity", "released"])
def test_nan_and_infinity_go_where_they_went(method, value, dtype, init, launched):
    mixers = [METHODS[method](32, heads=4, init=init).to(dtype).eval() for _ in range(2)]
    x, s = torch.randn(3, 32, 6, 19).to(dtype), torch.randn(3, 32, 6, 19).to(dtype)
    for map, channel in ((x, 9), (s, 30)):
        spoilt = map.clone()
        spoilt[1, channel, 2, 17] = value
        given = (spoilt, s) if map is x else (x, spoilt)
        outs = []
        for path in ("fused", "reference"):
            memory, last = None, given[0]
            with use(path), torch.no_grad():
                for mixer in mixers:
                    last, memory = mixer(last, given[1], memory)
            outs.append(last)
        found, expected = outs
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isposinf(), expected.isposinf())
        assert torch.equal(found.isneginf(), expected.isneginf())
        assert found[[0, 2]].isfinite().all()
        assert (map is s and method == "base") or not found[1].isfinite().all()
    assert launched


@pytest.mark.parametrize("method", ["light", "base"])
def test_a_nan_in_training_reaches_statistics_and_gradients(method):
    mixer = randomised(METHODS[method](16, heads=4))
    x, s = torch.randn(2, 16, 5, 4), torch.randn(2, 16, 5, 4)
    x[1, 6, 2, 2] = math.nan
    masks = []
    for path in ("fused", "reference"):
        one, leaf = copy.deepcopy(mixer), x.clone().requires_grad_()
        with use(path):
            out = one(leaf, s)[0]
        out.sum().backward()
        found = [
            out,
            leaf.grad,
            one.norm.running_mean,
            one.norm.running_var,
            one.norm.weight.grad,
            one.value_weight.grad,
        ]
        masks.append([tensor.isnan() for tensor in found])
    assert all(map(torch.equal, *masks))
    assert masks[0][2].any()


# --- where the kernels keep away


def _light(**options: Any) -> Any:
    return randomised(MRLALight(16, heads=4, **options))


def _pair(**options: Any) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 16, 5, 4, **options), torch.randn(2, 16, 5, 4, **options)


def same_as_reference(mixer: nn.Module, *given: Any, launched: list[Any]) -> None:
    """Both ways are one: the kernels were not used, and not a bit differs."""
    twin = copy.deepcopy(mixer)
    torch.manual_seed(2)
    found = mixer(*given)[0]
    with use("reference"):
        torch.manual_seed(2)
        expected = twin(*given)[0]
    assert not launched
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()


LAST = {"memory_format": torch.channels_last}


@pytest.mark.parametrize("method", ["light", "base"])
def test_other_layouts_go_by_torch(method, launched):
    x, s = _pair()
    x_last, s_last = (one.contiguous(**LAST) for one in (x, s))
    mixer = randomised(METHODS[method](16, heads=4))
    same_as_reference(mixer, x_last, s_last, launched=launched)
    same_as_reference(mixer, x.transpose(2, 3), s.transpose(2, 3), launched=launched)
    same_as_reference(mixer, torch.randn(2, 16, 5, 8)[..., ::2], s, launched=launched)
    same_as_reference(mixer, torch.randn(2, 1, 5, 4).expand(2, 16, 5, 4), s, launched=launched)
    if method == "light":
        same_as_reference(mixer, x, s_last, launched=launched)


def test_a_memory_of_another_layout_goes_by_torch(launched):
    mixer, x = randomised(MRLABase(16, heads=4)).eval(), torch.randn(2, 16, 5, 4)
    key = torch.randn(2, 4, 4)
    memory = LayerMemory((key,), (torch.randn(2, 16, 5, 4).contiguous(**LAST),))
    same_as_reference(mixer, x, None, memory, launched=launched)
    # A key that does not lie in one piece is no hindrance.
    memory = LayerMemory((torch.randn(4, 2, 4).transpose(0, 1),), (torch.randn(2, 16, 5, 4),))
    found = mixer(x, None, memory)[0]
    with use("reference"):
        torch.testing.assert_close(found, mixer(x, None, memory)[0], atol=1e-5, rtol=1e-5)
    assert launched


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: MRLALight(16, carry="output"), id="carry-output"),
        pytest.param(lambda: MRLALight(16, value_act="gelu"), id="value-gelu"),
        pytest.param(lambda: MRLALight(16, out_act="gelu"), id="out-gelu"),
        pytest.param(lambda: MRLALight(16, out_act="relu"), id="out-relu"),
        pytest.param(lambda: MRLALight(16, norm="layer"), id="layer-norm"),
        pytest.param(lambda: MRLALight(16, norm="pre_layer"), id="pre-layer-norm"),
        pytest.param(lambda: MRLABase(16, value_act="gelu"), id="base-value-gelu"),
        pytest.param(lambda: MRLABase(16, out_act="gelu"), id="base-out-gelu"),
        pytest.param(lambda: MRLABase(16, norm="layer"), id="base-layer-norm"),
    ],
)
def test_other_forms_go_by_torch(make, launched):
    same_as_reference(make(), *_pair(), launched=launched)


@pytest.mark.parametrize("method", ["light", "base"])
def test_other_norms_go_by_torch(method, launched):
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    for norm in (
        nn.GroupNorm(4, 16),
        nn.SyncBatchNorm(16).eval(),
        Own(16),
        nn.BatchNorm2d(16, affine=False),
        nn.InstanceNorm2d(16, affine=True),
    ):
        mixer = randomised(METHODS[method](16, heads=4))
        mixer.norm = norm
        same_as_reference(mixer, *_pair(), launched=launched)
    mixer = randomised(METHODS[method](16, heads=4))
    mixer.drop_path = nn.Dropout(0.5)
    same_as_reference(mixer, *_pair(), launched=launched)


def _outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("method", ["light", "base"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 16, 5, 4), (1, 16, 1, 1), (2, 16, 0, 4), (2, 8, 5, 4), (16, 5, 4)])
def test_maps_that_are_no_maps_end_as_they_did(method, training, shape, launched):
    """No image, one value a channel, no pixel, another width, no batch."""
    mixer = randomised(METHODS[method](16, heads=4)).train(training)
    outcomes = []
    for path in ("fused", "reference"):
        with use(path):
            outcomes.append(_outcome(lambda: copy.deepcopy(mixer)(torch.ones(shape), torch.ones(shape))[0]))
    found, expected = outcomes
    assert type(found) is type(expected)
    if isinstance(found, Tensor):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    else:
        assert found == expected
    if shape == (1, 16, 1, 1):  # of one value there is no variance: the running ones
        assert isinstance(found, Tensor)
    assert (not launched) == (shape != (1, 16, 1, 1) or training)


@pytest.mark.unchecked
@pytest.mark.parametrize("method", ["light", "base"])
def test_the_wrong_shortcut_is_refused_as_before(method):
    for shortcut in (torch.ones(2, 16, 5, 5), torch.ones(1, 16, 5, 4)):
        outcomes = []
        for path in ("fused", "reference"):
            with use(path):
                outcomes.append(_outcome(lambda s=shortcut: METHODS[method](16)(torch.ones(2, 16, 5, 4), s)))
        assert outcomes[0] == outcomes[1]
        assert outcomes[0][0] is ValueError


def test_mixed_types_end_as_they_did(launched):
    x, s = _pair()
    for one, other, dtype in ((x, s.bfloat16(), torch.float32), (x.bfloat16(), s, torch.bfloat16)):
        mixer = _light().to(dtype).eval()
        same_as_reference(mixer, one, other, launched=launched)


@pytest.mark.parametrize("method", ["light", "base"])
def test_a_map_in_another_type_than_the_weights_ends_as_it_did(method):
    """A network in float64 that is given float32 said so; it must not compute in silence."""
    for weights, maps in ((torch.float64, torch.float32), (torch.float32, torch.bfloat16)):
        mixer = randomised(METHODS[method](16, heads=4)).to(weights).eval()
        x, s = (one.to(maps) for one in _pair())
        outcomes = []
        for path in ("fused", "reference"):
            with use(path):
                outcomes.append(_outcome(lambda given=(mixer, x, s): given[0](*given[1:])[0].dtype))
        assert outcomes[0] == outcomes[1], (weights, maps)


def test_meta_tensors(launched):
    for method in ("light", "base"):
        mixer = METHODS[method](16, device="meta")
        out, _ = mixer(torch.empty(2, 16, 5, 4, device="meta"), torch.empty(2, 16, 5, 4, device="meta"))
        assert (out.shape, out.device.type) == ((2, 16, 5, 4), "meta")
    assert not launched


@pytest.mark.parametrize("method", ["light", "base"])
@pytest.mark.parametrize("training", [True, False])
def test_transforms_of_torch_func(method, training, launched):
    mixer = randomised(METHODS[method](16, heads=4)).train(training)
    x, s = _pair()
    weights = {name: one.detach() for name, one in mixer.named_parameters()}

    def loss(weights: Any, x: Tensor) -> Tensor:
        buffers = {name: one.clone() for name, one in mixer.named_buffers()}
        return torch.func.functional_call(mixer, {**weights, **buffers}, (x, s))[0].square().sum()

    found = torch.func.grad(loss, argnums=(0, 1))(weights, x)
    assert not launched
    leaf = x.clone().requires_grad_()
    with use("reference"):
        expected = torch.autograd.grad(
            loss(dict(mixer.named_parameters()), leaf), (*mixer.parameters(), leaf), materialize_grads=True
        )
    for one, other in zip((*found[0].values(), found[1]), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
    # functional_call by itself is no transform.
    torch.func.functional_call(mixer, weights, (x, s))
    assert launched


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # torch's own, when it first meets a dual number
@pytest.mark.parametrize("method", ["light", "base"])
def test_vmap_and_hessian_products(method, launched):
    mixer = randomised(METHODS[method](16, heads=4)).eval()
    many, s = torch.randn(3, 2, 16, 5, 4), torch.randn(2, 16, 5, 4)
    found = torch.func.vmap(lambda x: mixer(x, s)[0])(many)
    x, direction = many[0], torch.randn_like(many[0])
    product = torch.func.jvp(torch.func.grad(lambda x: mixer(x, s)[0].square().sum()), (x,), (direction,))[1]
    assert not launched
    with use("reference"):
        torch.testing.assert_close(found, torch.stack([mixer(x, s)[0] for x in many]), atol=1e-5, rtol=1e-5)
    assert product.abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # torch's own, when it first meets a dual number
@pytest.mark.parametrize("method", ["light", "base"])
def test_forward_mode_derivatives(method, launched):
    mixer = randomised(METHODS[method](16, heads=4)).eval()
    x, s = _pair()
    direction, cotangent = torch.randn_like(x), torch.randn_like(x)
    with forward_ad.dual_level():
        along = forward_ad.unpack_dual(mixer(forward_ad.make_dual(x, direction), s)[0]).tangent
    again = torch.func.jvp(lambda x: mixer(x, s)[0], (x,), (direction,))[1]
    assert not launched
    leaf = x.clone().requires_grad_()
    (back,) = torch.autograd.grad(mixer(leaf, s)[0], leaf, cotangent)
    assert launched
    assert along is not None
    for one in (along, again):
        torch.testing.assert_close((one * cotangent).sum(), (back * direction).sum(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("method", ["light", "base"])
def test_a_second_derivative_is_refused_or_right(method, launched):
    mixer = randomised(METHODS[method](16, heads=4)).eval()
    x, s = _pair()

    def penalty() -> Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(mixer(leaf, s)[0].square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    with pytest.raises(RuntimeError):
        penalty()
    assert launched
    with use("reference"):
        assert penalty().abs().max() > 0


@pytest.mark.parametrize("method", ["light", "base"])
def test_operations_are_counted_as_before(method, launched):
    mixer, given = randomised(METHODS[method](16, heads=4)), _pair()
    counts = []
    for path in ("fused", "reference"):
        with use(path), FlopCounterMode(display=False) as counter:
            mixer(*given)[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert not launched


@pytest.mark.parametrize("method", ["light", "base"])
def test_dispatch_modes_see_every_operation(method, launched):
    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    mixer, given = randomised(METHODS[method](16, heads=4)), _pair()
    seen = []
    for path in ("fused", "reference"):
        with use(path), Seen() as mode:
            mixer(*given)
        seen.append(mode.names)
    assert not launched
    assert seen[0] == seen[1]
    assert any("conv" in name for name in seen[0])


@pytest.mark.parametrize("method", ["light", "base"])
def test_fake_tensors(method, launched):
    from torch._subclasses.fake_tensor import FakeTensorMode

    mixer, (x, s) = randomised(METHODS[method](16, heads=4)).eval(), _pair()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        out, _ = mixer(mode.from_tensor(x), mode.from_tensor(s))
    assert out.shape == x.shape
    assert isinstance(out, torch._subclasses.FakeTensor)
    assert not launched


@pytest.mark.parametrize("method", ["light", "base"])
def test_subclasses_of_tensor_see_every_operation(method, launched):
    class Counted(Tensor):
        seen: int = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen += 1
            return super().__torch_function__(func, types, args, kwargs or {})

    mixer, (x, s) = randomised(METHODS[method](16, heads=4)).eval(), _pair()
    mixer(x.as_subclass(Counted), s.as_subclass(Counted))
    assert Counted.seen > 10
    assert not launched


@pytest.mark.parametrize("method", ["light", "base"])
@pytest.mark.parametrize("part", ["norm", "drop_path"])
def test_hooks_inside_a_mixer_fire(method, part, launched):
    mixer, given = randomised(METHODS[method](16, heads=4, drop_path=0.3)), _pair(requires_grad=True)
    inner, seen = getattr(mixer, part), []
    kinds = (
        lambda: inner.register_forward_hook(lambda *_: seen.append("forward")),
        lambda: inner.register_forward_pre_hook(lambda *_: seen.append("pre")),
        lambda: inner.register_full_backward_hook(lambda *_: seen.append("backward")),
        lambda: inner.register_full_backward_pre_hook(lambda *_: seen.append("backward pre")),
    )
    for kind in kinds:
        handle = kind()
        mixer(*given)[0].sum().backward()
        handle.remove()
    assert seen == ["forward", "pre", "backward", "backward pre"]
    assert not launched
    mixer(*given)
    assert launched


@pytest.mark.parametrize("method", ["light", "base"])
def test_hooks_everywhere_fire(method, launched):
    mixer, given = randomised(METHODS[method](16, heads=4, drop_path=0.3)), _pair(requires_grad=True)
    seen: list[Any] = []
    kinds = (
        every_module.register_module_forward_hook,
        every_module.register_module_forward_pre_hook,
        every_module.register_module_full_backward_hook,
        every_module.register_module_full_backward_pre_hook,
    )
    for kind in kinds:
        seen.clear()
        handle = kind(lambda module, *_: seen.append(module))
        try:
            mixer(*given)[0].sum().backward()
        finally:
            handle.remove()
        for module in (mixer, mixer.norm, mixer.drop_path):
            assert any(one is module for one in seen)
    assert not launched


@pytest.mark.parametrize("method", ["light", "base"])
def test_hooks_on_a_mixer_fire(method, launched):
    mixer, given, seen = randomised(METHODS[method](16, heads=4)), _pair(requires_grad=True), []
    mixer.register_forward_hook(lambda _, given, out: seen.append(out[0]))
    mixer.register_full_backward_hook(lambda *_: seen.append("backward"))
    out, _ = mixer(*given)
    out.sum().backward()
    assert seen[0] is out or torch.equal(seen[0], out)
    assert seen[1] == "backward"
    assert launched


# --- tracing and compiling


class Alone(nn.Module):
    """A chain of two as a module of two maps."""

    def __init__(self, method: str):
        super().__init__()
        self.mixers = nn.ModuleList([randomised(METHODS[method](16, heads=4)) for _ in range(2)])

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        memory = None
        for mixer in self.mixers:
            assert isinstance(mixer, LayerMixer)
            x, memory = mixer(x, shortcut, memory)
        return x


@pytest.mark.unchecked
@pytest.mark.parametrize("method", ["light", "base"])
def test_export_has_no_operator_of_ours(method, launched):
    network, given = Alone(method).eval(), _pair()
    exported = torch.export.export(network, given)
    names = [str(node.target) for node in exported.graph.nodes]
    assert not any("mrla." in name or "mrla::" in name for name in names)
    assert any("conv" in name for name in names)
    assert not launched
    with use("reference"):
        torch.testing.assert_close(exported.module()(*given), network(*given), atol=1e-5, rtol=1e-5)


@pytest.mark.unchecked
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("method", ["light", "base"])
def test_traces_have_no_operator_of_ours(method, launched):
    network, given = Alone(method).eval(), _pair()
    traced = torch.jit.trace(network, given, check_trace=False)
    assert "mrla::" not in str(traced.inlined_graph)
    assert not launched
    other = _pair()
    with use("reference"):
        torch.testing.assert_close(traced(*other), network(*other), atol=1e-5, rtol=1e-5)


def _light_arguments(shape: tuple[int, ...], *, batch: bool, shortcut: bool, keep: bool) -> tuple[Any, ...]:
    c = shape[1]
    weights = [torch.randn(1, 1, 3), torch.randn(1, 1, 3), torch.randn(c, 1, 3, 3),
               torch.randn(c) if shortcut else None, torch.rand(c) + 0.5, torch.randn(c)]  # fmt: skip
    weights = [None if one is None else one.requires_grad_() for one in weights]
    statistics = (None, None) if batch else (torch.randn(c), torch.rand(c) + 0.5)
    kept = torch.tensor([0.0, 1.25] * shape[0])[: shape[0]] if keep else None
    x = torch.randn(shape, requires_grad=True)
    carried = torch.randn(shape, requires_grad=True) if shortcut else None
    return (x, carried, *LightWeights(*weights), *statistics, kept, 2, 1e-5, "cpu")


def _base_arguments(
    shape: tuple[int, ...], asked: int, *, batch: bool, softmax: bool, rectify: bool, scale: bool
) -> tuple[Any, ...]:
    c = shape[1]
    keys = [torch.randn(shape[0], 2, c // 2, requires_grad=True) for _ in range(asked)]
    values = [torch.randn(shape, requires_grad=True) for _ in range(asked)]
    weights = [torch.randn(1, 1, 3), torch.randn(1, 1, 3), torch.randn(c, 1, 3, 3), torch.rand(c) + 0.5, torch.randn(c),
               torch.rand(c) if scale else None]  # fmt: skip
    weights = BaseWeights(*(None if one is None else one.requires_grad_() for one in weights))
    statistics = None if batch else (torch.randn(c), torch.rand(c) + 0.5)
    x = torch.randn(shape, requires_grad=True)
    seen: list[Any] = []
    patch = pytest.MonkeyPatch()
    operator = torch.ops.mrla.base

    class Ops:
        @staticmethod
        def base(*arguments: Any) -> Any:
            seen.append(arguments)
            return operator(*arguments)

    patch.setattr(torch.ops, "mrla", Ops)  # what `base` makes of its arguments, without a second list of them here
    try:
        base(x, keys, values, weights, statistics, None, BaseForm(2, 1e-5, softmax, rectify), "cpu")
    finally:
        patch.undo()
    return seen[0]


@pytest.mark.unchecked
@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("light", lambda: _light_arguments((2, 4, 3, 5), batch=True, shortcut=True, keep=False)),
        ("light", lambda: _light_arguments((2, 4, 3, 5), batch=False, shortcut=False, keep=True)),
        ("base", lambda: _base_arguments((2, 4, 3, 5), 0, batch=True, softmax=True, rectify=True, scale=True)),
        ("base", lambda: _base_arguments((2, 4, 3, 5), 2, batch=False, softmax=False, rectify=False, scale=False)),
    ],
    ids=["light-train", "light-eval", "base-train", "base-eval"],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # the check's own
def test_the_operators_keep_torchs_rules(name, arguments):
    torch.library.opcheck(getattr(torch.ops.mrla, name).default, arguments())


@pytest.mark.unchecked
@pytest.mark.sweep
@pytest.mark.parametrize("method", ["light", "base"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_is_eager(method, training):
    torch._dynamo.reset()
    network, given = Alone(method).train(training), _pair(requires_grad=True)
    twin = copy.deepcopy(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    results = []
    for one in (compiled, twin):
        out = one(*given)
        results.append((out, torch.autograd.grad(out.square().sum(), given, materialize_grads=True)))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    for one, other in zip(network.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()
