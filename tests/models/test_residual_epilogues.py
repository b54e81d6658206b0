"""Residual blocks that leave their end to the mixer: the same numbers, less memory, and nobody notices."""

import copy
import functools
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import randomise_norms
from timm.layers import SEModule
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import mrla
from mrla.ops import METHODS, LayerMixer, MRLABase, ResidualEpilogue, use
from mrla.ops.kernels.residual_epilogue import finish

pytest.importorskip("numba")

SMALL = {"num_classes": 7}
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "timm resnet18": functools.partial(timm.create_model, "resnet18", channels=(16, 16, 32, 32), **SMALL),
    "timm resnet50": functools.partial(timm.create_model, "resnet50", channels=(8, 8, 16, 16), **SMALL),
    "timm test_resnet": functools.partial(timm.create_model, "test_resnet", **SMALL),
    "torchvision basic": functools.partial(ResNet, BasicBlock, [2, 1, 1, 1], **SMALL),
    "torchvision bottleneck": functools.partial(ResNet, Bottleneck, [2, 1, 1, 1], **SMALL),
}
OPTIONS = {
    "light": ("light", {}),
    "base": ("base", {}),
    "light-drop_path": ("light", {"drop_path": 0.3}),
    "base-no-relu-sigmoid": ("base", {"out_act": None, "weighting": "sigmoid"}),
    "base-last-2": ("base", {"last": 2}),
}


def attached(name: str = "timm resnet18", option: str = "light", *, awake: bool = True, **numbers: Any) -> nn.Module:
    torch.manual_seed(3)
    method, options = OPTIONS[option]
    model = mrla.attach(NETWORKS[name](**numbers), method, **options)
    randomise_norms(model)
    for mixer in mixers(model):
        mixer.reset_parameters("released" if awake else "identity")
        if awake:
            randomise_norms(mixer)
            if mixer.scale is not None:
                nn.init.uniform_(mixer.scale, 0.2, 0.6)
            if getattr(mixer, "decay", None) is not None:
                nn.init.normal_(mixer.decay, std=0.3)
    return model


def mixers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LayerMixer)]


def image(batch: int = 3, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size)


@pytest.fixture
def tails(monkeypatch) -> list[ResidualEpilogue]:
    """The tails that mixers have been handed so far, by kernels or without."""
    seen: list[ResidualEpilogue] = []
    for kind in {*METHODS.values()}:
        behind = kind.forward_fused

        def spy(self: Any, tail: ResidualEpilogue, memory: Any = None, behind: Any = behind) -> Any:
            seen.append(tail)
            return behind(self, tail, memory)

        monkeypatch.setattr(kind, "forward_fused", spy)
    return seen


@pytest.fixture
def launched(monkeypatch) -> list[Any]:
    from mrla.ops.kernels.cpu import launch

    seen: list[Any] = []
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda kernel, **fields: (seen.append(kernel), run(kernel, **fields))[1])
    return seen


def run(model: nn.Module, x: Tensor, path: Any = "fused") -> dict[str, Tensor]:
    """Logits, every gradient and every buffer of a copy."""
    model, leaf = copy.deepcopy(model), x.clone().requires_grad_()
    torch.manual_seed(4)
    with use(path):
        out = model(leaf)
    out.square().mean().backward()
    assert torch.equal(leaf, x)
    found = {"out": out.detach(), "grad of the image": leaf.grad}
    found |= {f"grad of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | dict(model.named_buffers())


def off_by(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm())


def assert_as_good(found: dict[str, Tensor], reference: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """As near to float64 as torch's operators are: each value, and the gradients taken together.

    A single gradient has some room: where a sum is next to zero a ReLU may go the other way, by either path.
    """
    assert found.keys() == reference.keys() == truth.keys()
    largest = max(float(one.norm()) for name, one in truth.items() if name.startswith("grad"))
    logs = []
    for name, expected in truth.items():
        one, other = found[name], reference[name]
        if not one.is_floating_point():
            assert torch.equal(one, other), name
            continue
        assert one.dtype == other.dtype
        is_gradient = name.startswith("grad")
        size = max(float(expected.norm()), 1e-4 * largest if is_gradient else 1e-3)
        off, usual = off_by(one, expected) / size, off_by(other, expected) / size
        if is_gradient:
            logs.append([max(off, 1e-8), max(usual, 1e-8)])
        assert off <= max(5 * usual, 2e-2 if is_gradient else 2e-5), f"{name}: {off:.1e} against {usual:.1e}"
    fused, usual = torch.tensor(logs).log().mean(0).exp()
    assert fused <= 3 * usual + 1e-6


# --- numbers

BOTH = [(name, option) for name in NETWORKS for option in ("light", "base")]
MORE = [("timm resnet18", option) for option in OPTIONS if option not in ("light", "base")]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "option"), [*BOTH, *MORE])
def test_values_gradients_and_statistics(name, option, training, tails, launched):
    model, x = attached(name, option).train(training), image()
    found = run(model, x)
    assert len(tails) == len(mixers(model)) > 1
    assert launched
    tails.clear()
    launched.clear()
    reference = run(model, x, "reference")
    assert not tails
    assert not launched
    truth = run(copy.deepcopy(model).double(), x.double(), "reference")
    assert_as_good(found, reference, truth)


@pytest.mark.parametrize("option", ["light", "base"])
def test_some_norms_by_their_statistics_and_some_by_the_batch(option, tails):
    """The block's norm frozen, the mixer's in training, and the other way round; a norm with momentum None."""
    model, x = attached("timm resnet18", option).train(), image()
    for at, block in enumerate(one for one in model.modules() if isinstance(one, timm.models.resnet.BasicBlock)):
        (block.bn2 if at % 2 else block.mrla.norm).eval()
        block.bn2.momentum = None if at % 3 == 0 else 0.3
    found, reference = run(model, x), run(model, x, "reference")
    assert tails
    assert_as_good(found, reference, run(copy.deepcopy(model).double(), x.double(), "reference"))


@pytest.mark.parametrize("option", ["light", "base"])
def test_norms_without_weights_or_without_statistics(option, tails):
    model, x = attached("timm resnet18", option), image()
    for at, block in enumerate(one for one in model.modules() if isinstance(one, timm.models.resnet.BasicBlock)):
        block.bn2 = nn.BatchNorm2d(block.bn2.num_features, affine=at % 2 == 0, track_running_stats=at % 3 != 0)
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            outs = []
            for path in ("fused", "reference"):
                with use(path):
                    outs.append(copy.deepcopy(model)(x))
        torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)
        assert tails
        truth = run(copy.deepcopy(model).double(), x.double(), "reference")
        assert_as_good(run(model, x), run(model, x, "reference"), truth)


@pytest.mark.parametrize("option", ["light", "base"])
def test_a_folded_network_gives_gradients_of_the_image(option, tails):
    """`mrla.fuse` leaves an identity for the block's norm; the image's gradient still goes through it."""
    model = mrla.fuse(attached("timm resnet18", option).eval(), example=(1, 3, 64, 64))
    x, grads = image(), []
    tails.clear()
    for path in ("fused", "reference"):
        leaf = x.clone().requires_grad_()
        with use(path):
            out = model(leaf)
        grads.append(torch.autograd.grad(out.square().mean(), leaf)[0])
    assert tails
    assert torch.linalg.vector_norm(grads[0] - grads[1]) < 1e-4 * torch.linalg.vector_norm(grads[1])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("option", ["light", "base"])
@pytest.mark.parametrize("name", NETWORKS)
def test_starts_as_the_plain_network_to_the_last_bit(name, option, training, tails):
    model = attached(name, option, awake=False)
    plain = mrla.detach(copy.deepcopy(model))
    for how, size in (("float32", 64), ("float32", 32), ("float32", 80), ("autocast", 64), ("bfloat16", 64)):
        x = image(size=size)  # of 32, one pixel is left at the end
        one, other = (copy.deepcopy(network).train(training) for network in (model, plain))
        given = x.bfloat16() if how == "bfloat16" else x
        if how == "bfloat16":
            one, other = one.bfloat16(), other.bfloat16()
        for grad in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"), torch.set_grad_enabled(grad):
                found, expected = one(given), other(given)
            assert found.dtype == expected.dtype, how
            assert torch.equal(found, expected), (how, grad)
        theirs = dict(one.named_buffers())
        assert all(torch.equal(buffer, theirs[key]) for key, buffer in other.named_buffers()), how
    assert tails


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("option", ["light", "base"])
def test_a_mixer_says_the_same_behind_a_tail_and_behind_the_finished_block(option, training):
    """To the last bit: whether somebody looks at a block's output must not change what the network says."""
    for channels, size in itertools.product((32, 64, 256), (1, 2, 4, 7, 8, 14, 16, 17, 33)):
        torch.manual_seed(channels + size)
        mixer = METHODS[option](channels, init="released").train(training)
        randomise_norms(mixer)
        with torch.no_grad():  # gates that follow the last bits of the means that they are made of
            mixer.query_weight.mul_(5)
            mixer.key_weight.mul_(5)
        norm = nn.BatchNorm2d(channels).train(training)
        randomise_norms(norm)
        branch, shortcut = torch.randn(2, channels, size, size) * 3, torch.randn(2, channels, size, size)
        tail = ResidualEpilogue(branch, norm, shortcut, owned=False)
        finished = ResidualEpilogue(branch, copy.deepcopy(norm), shortcut, owned=False)
        with torch.no_grad():
            found, _ = copy.deepcopy(mixer).forward_fused(tail)
            expected, _ = mixer(finish(finished), shortcut)
        assert torch.equal(found, expected), (channels, size)


@pytest.mark.parametrize("option", ["light", "base"])
def test_identity_start_gives_the_plain_networks_gradients(option):
    model = attached("timm resnet18", option, awake=False).train()
    plain, x = mrla.detach(copy.deepcopy(model)), image()
    found, expected = run(model, x), run(plain, x)
    for name, one in expected.items():
        if name.startswith("grad"):
            assert off_by(found[name], one) <= 2e-5 * float(one.norm()) + 1e-7, name


@pytest.mark.parametrize("option", ["light", "base"])
def test_a_stage_in_float32_under_autocast_keeps_the_plain_type(option):
    """As where a stem is frozen in float32: the block's add happens in place, in the type of its branch."""
    model = attached("torchvision basic", option, awake=False).eval()
    plain, x = mrla.detach(copy.deepcopy(model)), torch.randn(2, 64, 16, 16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, expected = model.layer1(x), plain.layer1(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("option", ["light", "base"])
def test_bfloat16_is_near(option, tails):
    model, x = attached("timm resnet18", option).eval(), image()
    with torch.no_grad(), use("reference"):
        truth = copy.deepcopy(model).bfloat16().double()(x.bfloat16().double())
        reference = copy.deepcopy(model).bfloat16()(x.bfloat16())
    with torch.no_grad():
        found = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert tails
    assert found.dtype == torch.bfloat16
    assert off_by(found, truth) <= max(1.5 * off_by(reference, truth), 2**-8 * float(truth.norm()))


# --- memory


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd keeps for backward, each storage once, without the network's own."""
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
    size = sum(one.untyped_storage().nbytes() for at, one in kept.items() if at not in own)
    del out
    return size


@pytest.mark.parametrize(("option", "most"), [("light", 1.15), ("base", 1.15)])
def test_bytes_kept_for_backward(option, most):
    model = attached("timm resnet18", option).train()
    plain, x = mrla.detach(copy.deepcopy(model)), image(4, 128)  # 32x32 in the first stage
    before = saved_bytes(plain, x)
    assert saved_bytes(model, x) <= most * before
    with use("reference"):
        assert saved_bytes(model, x) > most * before  # the measure sees what is saved


def test_the_last_block_of_a_chain_keeps_no_value_in_inference(tails, monkeypatch):
    memories: list[Any] = []
    behind = MRLABase.forward_fused

    def noted(*given: Any) -> Any:
        out, memory = behind(*given)
        memories.append(memory)
        return out, memory

    monkeypatch.setattr(MRLABase, "forward_fused", noted)
    model = attached("timm resnet18", "base").eval()
    with torch.no_grad():
        model(image())
    for mixer, memory in zip(mixers(model), memories, strict=True):
        if mixer.place.index + 1 == mixer.place.length:
            assert memory is None
        else:
            assert len(memory.values) == mixer.place.index + 1


# --- base in backward: blocks leave letters to earlier ones


def long_chain(option: str = "base") -> Any:
    """Blocks 1 to 4 of one chain, with mixers, and a head."""
    torch.manual_seed(5)
    basic = timm.models.resnet.BasicBlock
    model = timm.models.resnet.ResNet(basic, (4, 1, 1, 1), channels=(16, 16, 16, 16), num_classes=7)
    model.layer2 = model.layer3 = model.layer4 = nn.Identity()
    method, arguments = OPTIONS[option]
    model = mrla.attach(model, method, **arguments)
    randomise_norms(model)
    for mixer in mixers(model):
        mixer.reset_parameters("released")
        randomise_norms(mixer)
        if mixer.scale is not None:
            nn.init.uniform_(mixer.scale, 0.2, 0.6)
    return model.train()


@pytest.fixture
def values(monkeypatch) -> list[Tensor]:
    """The values that blocks have made, as long as they are kept here."""
    from mrla.ops.mixers import base

    made: list[Tensor] = []
    behind = base.base_with_epilogue

    def spy(*given: Any, **more: Any) -> Any:
        found = behind(*given, **more)
        made.append(found[2])
        return found

    monkeypatch.setattr(base, "base_with_epilogue", spy)
    return made


@pytest.mark.parametrize("option", ["base", "base-last-2", "base-no-relu-sigmoid"])
def test_gradients_of_a_long_chain(option, tails):
    model, x = long_chain(option), image()
    found = run(model, x)
    assert len(tails) == 4
    assert_as_good(found, run(model, x, "reference"), run(copy.deepcopy(model).double(), x.double(), "reference"))


def test_a_value_that_somebody_holds_is_not_written_to(values):
    model, x = long_chain(), image()
    out = model(x)
    before = [one.detach().clone() for one in values]
    out.sum().backward()
    assert len(values) == 4
    assert all(map(torch.equal, values, before))


@pytest.mark.parametrize("retain", [False, True])
def test_where_the_gradient_of_an_update_goes(retain, monkeypatch):
    """Into the place of the block's own value, if the graph is not to be gone through again."""
    from mrla.ops.kernels import deferred_grads

    told: list[bool] = []
    asked = deferred_grads._is_done_with
    monkeypatch.setattr(deferred_grads, "_is_done_with", lambda value: (told.append(asked(value)), told[-1])[1])
    long_chain()(image()).sum().backward(retain_graph=retain)
    assert told == [not retain] * 3


def test_parts_of_a_graph_one_after_the_other():
    """Letters are read in the pass in which they were written, or never."""
    model, x = long_chain(), image()
    found = []
    for path in ("fused", "reference"):
        network, grads = copy.deepcopy(model), []
        outs: list[Tensor] = []
        mine = list(network.layer1)
        with use(path):
            feature = network.maxpool(network.act1(network.bn1(network.conv1(x))))
            for step in network.layer1:
                feature = step(feature)
                outs.append(feature)
        late = [*mine[3].mrla.parameters()]
        early = [*mine[0].parameters(), *mine[1].parameters()]
        asked: list[tuple[Tensor, list[Any]]] = [
            (outs[3].square().mean(), late),  # writes letters that nobody may read later
            (outs[1].square().mean(), early),
            (outs[3].square().mean() + outs[1].mean(), early),
            (outs[3].square().mean(), [*mine[2].mrla.parameters()]),
            (outs[2].mean(), early),
        ]
        for loss, parameters in asked:
            grads += torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        sum(one.square().mean() for one in outs).backward()
        grads += [p.grad for p in network.parameters() if p.grad is not None]
        found.append(grads)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=2e-3)


@pytest.mark.parametrize("hooked", [0, 1, 2, 3])
def test_a_block_in_between_that_keeps_its_end(hooked, tails):
    """Its mixer is an operator of its own, which gives gradients of the values, and takes them."""
    model, x = long_chain(), image()
    found = []
    for path in ("fused", "reference"):
        network = copy.deepcopy(model)
        network.layer1[hooked].bn2.register_forward_hook(lambda *_: None)
        tails.clear()
        with use(path):
            loss = network(x).square().mean()
        assert len(tails) == (3 if path == "fused" else 0)
        loss.backward()
        found.append([p.grad for p in network.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=2e-3)


def test_frozen_blocks_get_no_letters(tails):
    model, x = long_chain(), image()
    for step in [*model.layer1][:2]:
        step.requires_grad_(False)
    model.conv1.requires_grad_(False)
    model.bn1.requires_grad_(False)
    found, reference = run(model, x), run(model, x, "reference")
    assert len(tails) == 4
    assert_as_good(found, reference, run(copy.deepcopy(model).double(), x.double(), "reference"))


def test_saved_maps_elsewhere():
    """Where what is saved lies on a disk, or is a copy, each block finds its own."""
    model, x = long_chain(), image()
    expected = run(model, x)
    with torch.autograd.graph.save_on_cpu():
        found = run(model, x)
    assert all(torch.equal(found[name], one) for name, one in expected.items())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), len(kept) - 1)[1], lambda at: kept[at]):
        out = copy.deepcopy(model)(x)
    before = [one.detach().clone() for one in kept]
    out.sum().backward()
    assert all(map(torch.equal, kept, before))


# --- where tails are used, and where not


def _block(model: nn.Module) -> Any:
    return model.layer1[-1]


def used(model: nn.Module, x: Tensor, tails: list[ResidualEpilogue]) -> int:
    tails.clear()
    model(x)
    return len(tails)


def _set_se(model: nn.Module) -> None:
    _block(model).se = SEModule(16)


def _set_drop_path(model: nn.Module) -> None:
    _block(model).drop_path = timm.layers.DropPath(0.2)


def _set_act(model: nn.Module) -> None:
    _block(model).act2 = nn.GELU()


def _set_norm(model: nn.Module) -> None:
    _block(model).bn2 = nn.GroupNorm(4, 16)


def _set_conv(model: nn.Module) -> None:
    _block(model).conv2 = nn.Sequential(_block(model).conv2)


def _set_class(model: nn.Module) -> None:
    class Own(timm.models.resnet.BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    _block(model).__class__ = Own


def _hook(part: str, kind: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        getattr(_block(model).get_submodule(part), kind)(lambda *_: None)

    return change


CHANGES = {
    "se": _set_se,
    "drop_path": _set_drop_path,
    "act": _set_act,
    "norm": _set_norm,
    "conv": _set_conv,
    "class": _set_class,
    **{
        f"{kind} on {part or 'block'}": _hook(part, f"register_{kind}")
        for part in ("bn2", "act2", "", "mrla.norm", "mrla")
        for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
        # The plain block adds and rectifies in place, which torch forbids behind a backward hook.
        if not (part in ("bn2", "act2") and "backward" in kind)
    },
}


@pytest.mark.parametrize("option", ["light", "base"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_block_with_something_more_keeps_its_end(change, option, tails):
    model, x = attached("timm resnet18", option).train(), image()
    all_of_them = used(copy.deepcopy(model), x, tails)
    change(model)
    assert used(copy.deepcopy(model), x, tails) == all_of_them - 1
    found, expected = run(model, x), run(model, x, "reference")
    for name, one in expected.items():
        assert off_by(found[name], one) <= 2e-3 * float(one.double().norm()) + 1e-5, name


@pytest.mark.parametrize("make", ["resnet18", "resnet50"])
def test_torchvisions_own(make, tails):
    model = mrla.attach(getattr(torchvision.models, make)(num_classes=3), "light").eval()
    with torch.no_grad():
        assert used(model, image(1, 32), tails) == len(mixers(model))


def test_options_that_the_kernels_do_not_know(tails, launched):
    x = image()
    for method, options in (
        ("light", {"carry": "output"}),
        ("light", {"norm": "layer"}),
        ("light", {"value_act": "gelu"}),
        ("base", {"out_act": "gelu"}),
        ("exact", {}),
        ("dw", {}),
    ):
        assert used(mrla.attach(NETWORKS["timm test_resnet"](), method, **options), x, tails) == 0
    assert not launched


@pytest.mark.parametrize("option", ["light", "base"])
def test_channels_last_double_and_reference_go_by_torch(option, tails, launched):
    model, x = attached("timm test_resnet", option).eval(), image()
    expected = {}
    with torch.no_grad():
        with use("reference"):
            assert used(model, x, tails) == 0
            expected = model(x)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        found = last(x.contiguous(memory_format=torch.channels_last))
        wide = copy.deepcopy(model).double()(x.double())
    assert not launched
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(wide.float(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("option", ["light", "base"])
def test_hooks_see_what_they_saw(option):
    model, x = attached("timm resnet50", option).eval(), image()
    seen: dict[str, dict[str, Tensor]] = {"fused": {}, "reference": {}}
    for part in ("conv3", "bn3", "act3", "", "mrla", "mrla.norm", "mrla.drop_path"):
        for path, found in seen.items():
            module = _block(model).get_submodule(part)
            keep = lambda _, __, out, found=found, part=part: found.update(  # noqa: E731
                {part: (out[0] if isinstance(out, tuple) else out).clone()}
            )
            handle = module.register_forward_hook(keep)
            with torch.no_grad(), use(path):
                model(x)
            handle.remove()
    assert (
        seen["fused"].keys()
        == seen["reference"].keys()
        == {"conv3", "bn3", "act3", "", "mrla", "mrla.norm", "mrla.drop_path"}
    )
    for part, expected in seen["reference"].items():
        torch.testing.assert_close(seen["fused"][part], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("option", ["light", "base"])
def test_pruned_kernels_of_a_mixer_train(option):
    """torch's pruning is a hook before the mixer's call; without it, the second step would go through a dead graph."""
    model, x = attached("timm resnet18", option).train(), image()
    for mixer in mixers(model):
        prune.l1_unstructured(mixer, "value_weight", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("option", ["light", "base"])
@pytest.mark.parametrize("folded", [True, False])
def test_a_branch_that_somebody_holds_is_not_written_to(option, folded):
    model = attached("timm resnet18", option).eval()
    if folded:
        model = mrla.fuse(model, example=(1, 3, 64, 64))
    held: list[tuple[Tensor, Tensor]] = []
    handles = [
        block.conv2.register_forward_hook(lambda _, __, out: held.append((out, out.clone())))
        for block in model.modules()
        if isinstance(block, timm.models.resnet.BasicBlock)
    ]
    x = image(9)
    with torch.no_grad():
        found = model(x)
    assert len(held) == len(handles) > 1
    assert all(torch.equal(one, before) for one, before in held)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        assert torch.equal(model(x), found)
        with use("reference"):
            torch.testing.assert_close(model(x), found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("option", ["light", "base"])
def test_inputs_of_a_block_are_never_written_to(option):
    for folded in (False, True):
        for training in (False,) if folded else (False, True):
            model = attached("timm resnet18", option).train(training)
            model = mrla.fuse(model, example=(1, 3, 64, 64)) if folded else model
            for grad in (False, True):
                for size in (1, 9):
                    x = torch.randn(size, 64, 16, 16, requires_grad=grad)  # as the stem gives
                    for block in model.layer1.children():
                        before = x.detach().clone()
                        with torch.set_grad_enabled(grad):
                            out = block(x)
                        assert torch.equal(x, before), (folded, training, grad)
                        x = out


@pytest.mark.parametrize("option", ["light", "base"])
def test_twice_backward_and_checkpoints(option):
    model, x = attached("timm resnet18", option).train(), image()
    expected = run(model, x)
    again = copy.deepcopy(model)
    out = again(x).square().mean()
    parameters = list(again.parameters())
    first, second = (torch.autograd.grad(out, parameters, retain_graph=True, materialize_grads=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    saving = copy.deepcopy(model)
    saving.set_grad_checkpointing()
    found = run(saving, x)
    for name, one in expected.items():
        if name.startswith("grad") or name == "out":
            assert torch.equal(found[name], one), name
    by_hand, leaf = copy.deepcopy(model), x.clone().requires_grad_()
    checkpoint(by_hand, leaf, use_reentrant=False).square().mean().backward()
    assert torch.equal(leaf.grad, expected["grad of the image"])


@pytest.mark.parametrize("option", ["light", "base"])
def test_a_second_derivative_is_refused_or_right(option):
    model, x = attached("timm test_resnet", option).eval(), image(2, 32).requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()
    with use("reference"):
        (grad,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
        grad.square().sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("option", ["light", "base"])
def test_copies_and_detach_after_a_fused_forward(option):
    model, x = attached("timm resnet18", option), image()
    plain = mrla.detach(copy.deepcopy(model))
    model(x).sum().backward()
    with torch.no_grad():
        plain(x)
        model.eval()
        plain.eval()
        expected = model(x)
        for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(one(x), expected)
        before = {key: one for key, one in model.state_dict().items() if ".mrla." not in key}
        mrla.detach(model)
        assert model.state_dict().keys() == before.keys() == plain.state_dict().keys()
        assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("option", ["light", "base"])
def test_errors_in_training_of_one_value_a_channel_are_as_before(option):
    model = attached("timm resnet18", option).train()
    outcomes = []
    for path in ("fused", "reference"):
        with use(path), pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
            copy.deepcopy(model)(image(1, 32))
        outcomes.append(str(caught.value))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("option", ["light", "base"])
def test_a_feature_extractor_gives_the_networks_features(option):
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = attached("torchvision basic", option).eval(), image()
    extractor = create_feature_extractor(model, ["layer1", "layer4"])
    with torch.no_grad():
        found = extractor(x)
        x = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))
        torch.testing.assert_close(found["layer1"], x, atol=1e-5, rtol=1e-5)
        x = model.layer4(model.layer3(model.layer2(x)))
        torch.testing.assert_close(found["layer4"], x, atol=1e-4, rtol=1e-4)


# --- compiling


@pytest.mark.unchecked
@pytest.mark.sweep
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("option", ["light", "base"])
def test_compiled_without_a_break_is_eager(option, training, tails):
    torch._dynamo.reset()
    model, x = attached("timm test_resnet", option).train(training), image()
    expected = run(model, x)
    tails.clear()
    compiled, leaf = copy.deepcopy(model), x.clone().requires_grad_()
    explained = torch._dynamo.explain(copy.deepcopy(model))(x)
    assert explained.graph_break_count == 0
    out = torch.compile(compiled, fullgraph=True, backend="aot_eager")(leaf)
    out.square().mean().backward()
    assert not tails
    found = {"out": out.detach(), "grad of the image": leaf.grad}
    found |= {f"grad of {name}": p.grad for name, p in compiled.named_parameters() if p.grad is not None}
    found |= dict(compiled.named_buffers())
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert off_by(found[name], one) <= 2e-4 * float(one.double().norm()) + 1e-6, name
    torch._dynamo.reset()


@pytest.mark.unchecked
@pytest.mark.parametrize("option", ["light", "base"])
def test_exported_networks_have_no_operator_of_ours(option, tails, launched):
    model, x = attached("timm test_resnet", option).eval(), image(2)
    exported = torch.export.export(model, (x,))
    assert not any("mrla." in str(node.target) for node in exported.graph.nodes if node.op == "call_function")
    assert not launched
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), model(x), atol=1e-4, rtol=1e-4)
