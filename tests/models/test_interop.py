"""What a plain network survives, the network with mixers survives, and says the same afterwards as before.

The mixers have random weights, so that one that is passed by shows; the measure is the network's own plain forward.
"""

import copy
import functools
import io
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from conftest import randomise_norms
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models import FeatureListNet
from timm.models import create_feature_extractor as timm_feature_extractor
from timm.models._features import FeatureGetterNet
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, ResNet

import mrla
from mrla.models import MixedBlock, is_attached
from mrla.ops import LayerMixer

METHODS = {"light": {}, "light-output": {"carry": "output"}, "base": {}, "exact": {}}


def _timm(architecture: str, **numbers) -> Callable[..., nn.Module]:
    return functools.partial(timm.create_model, architecture, **numbers)


_VIT = _timm("vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=48)
# Each makes a small network for images of 64 by 64 pixels.
TIMM = {
    "resnet": _timm("resnet26", channels=(8, 16, 24, 32)),
    "convnext": _timm("convnext_atto", depths=(2, 2, 2, 1), dims=(8, 16, 24, 32)),
    "regnet": _timm("regnetx_002", w0=16, group_size=8, depth=8),  # stages of a class of their own
    "efficientnet": _timm("tinynet_e"),
    "mobilenetv3": _timm("mobilenetv3_small_050"),
    "vit": _VIT,  # only the class token is read
    "dynamic vit": functools.partial(_VIT, dynamic_img_size=True, global_pool="avg"),
    "eva": _timm(
        "eva02_tiny_patch14_224", img_size=64, patch_size=16, depth=3, embed_dim=48, num_heads=3, global_pool="avg"
    ),
    "swin": _timm(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        embed_dim=16,
        depths=(2, 2, 2, 1),
        num_heads=(1, 2, 2, 4),
    ),
    "pvt": _timm("pvt_v2_b0", embed_dims=(8, 16, 40, 64)),
}
NETWORKS = {
    **TIMM,
    "mvit": functools.partial(
        MultiScaleVit, MultiScaleVitCfg(embed_dim=16, num_heads=1, depths=(1, 2, 2, 2)), img_size=64
    ),  # blocks that return their grid
    "torchvision": lambda **numbers: ResNet(BasicBlock, [2, 2, 1, 1], **numbers),
}
# The others are in the sweep.
KEPT = ("resnet", "vit", "swin", "pvt", "mvit", "torchvision")
# Each network with one method, each method with three networks; and each network with three methods.
ONE_METHOD = list(zip(NETWORKS, list(METHODS) * 3, strict=True))
THREE_METHODS = [
    (name, method)
    for at, name in enumerate(NETWORKS)
    for method in (("light", "light-output")[at % 2], "base", "exact")
]


def over(pairs: list[tuple[str, str]], *without: str) -> pytest.MarkDecorator:
    rows = [
        pytest.param(*pair, id="-".join(pair), marks=() if pair[0] in KEPT else pytest.mark.sweep)
        for pair in pairs
        if pair[0] not in without
    ]
    return pytest.mark.parametrize(("name", "method"), rows)


def image(batch: int = 2, size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.randn(batch, 3, *size)


@contextmanager
def made_from_seed(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def randomized(model: nn.Module) -> nn.Module:
    """Random weights where zeros or ones would hide a mixer or a block: mixers, norms, layer scales, positions."""
    randomise_norms(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("query_weight", "key_weight")):
                parameter.mul_(0.1)  # with larger ones a softmax takes one block, to the last bit
            elif ".mrla." in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif parameter.ndim == 2:
                parameter.mul_(3)  # timm's linear layers begin with a small spread
    return model


@functools.cache
def _attached(name: str, method: str) -> nn.Module:
    with made_from_seed(1):
        network = NETWORKS[name](num_classes=7)
        return randomized(mrla.attach(network, method.partition("-")[0], **METHODS[method])).eval()


def attached(name: str, method: str) -> nn.Module:
    """A network of its own for each test, in eval mode."""
    return copy.deepcopy(_attached(name, method))


def plain_twin(model: nn.Module) -> nn.Module:
    return mrla.detach(copy.deepcopy(model))


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def mixers(model: nn.Module) -> dict[str, LayerMixer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LayerMixer)}


def stages(model: nn.Module) -> dict[str, nn.Module]:
    """The containers of blocks with mixers, by path."""
    parents = [path.rpartition(".")[0] for path, module in model.named_modules() if isinstance(module, MixedBlock)]
    return {path: model.get_submodule(path) for path in dict.fromkeys(parents)}


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    model(x).square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    found, expected = model.state_dict(), other.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# --- that this file sees what it is to see


@over(THREE_METHODS)
def test_a_mixer_or_a_memory_passed_by_would_show(name, method):
    model, x = attached(name, method), image()
    expected = logits(model, x)
    spread = expected.std()
    for path, mixer in mixers(model).items():
        handle = mixer.register_forward_hook(lambda _, inputs, output: (inputs[0], output[1]))
        assert (logits(model, x) - expected).abs().max() > 1e-3 * spread, path
        handle.remove()
        if mixer.place.index > 0 and method != "light":
            handle = mixer.register_forward_pre_hook(lambda _, inputs: (*inputs[:2], None))
            assert not torch.equal(logits(model, x), expected), path
            handle.remove()
    assert torch.equal(logits(model, x), expected)


@over(ONE_METHOD)
def test_it_starts_as_the_plain_network(name, method):
    plain = randomized(NETWORKS[name](num_classes=7)).train()
    model = mrla.attach(copy.deepcopy(plain), method.partition("-")[0], **METHODS[method])
    x = image()
    for _ in range(2):  # in train mode the statistics move: those of a shortcut too, and once
        seed = torch.get_rng_state()
        expected = logits(plain, x)
        torch.set_rng_state(seed)
        assert torch.equal(logits(model, x), expected)
    assert torch.equal(logits(model.eval(), x), logits(plain.eval(), x))


# --- parts of the network, called from outside


@over(THREE_METHODS, "torchvision")
def test_features_and_head_and_going_block_by_block(name, method):
    model, x = attached(name, method), image()
    with torch.no_grad():
        expected = model(x)
        last = model.forward_features(x)
        assert torch.equal(model.forward_head(last), expected)
        final, maps = model.forward_intermediates(x)
        assert torch.equal(final, last)
        _, fewer = model.forward_intermediates(x, indices=[0, 1])
    assert all(torch.equal(a, b) for a, b in zip(fewer, maps, strict=False))


@over(THREE_METHODS)
def test_a_stage_block_by_block_and_in_parts_is_the_whole_stage(name, method):
    model, calls = attached(name, method), []
    for stage in stages(model).values():
        stage.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
    logits(model, image())
    for stage, args, kwargs, output in calls:  # not where the network itself goes block by block
        with torch.no_grad():
            x = args[0]
            for block in stage.children():
                x = block(x, *args[1:], **kwargs)
            assert torch.equal(x, output)
            if isinstance(stage, nn.Sequential):
                assert torch.equal(stage[:](*args, **kwargs), output)
                x = args[0]
                for at in range(len(stage)):
                    x = stage[at](x, *args[1:], **kwargs)
                assert torch.equal(x, output)
    assert calls or name in ("eva", "pvt", "mvit")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["dynamic vit", "pvt"])
def test_mixers_are_given_the_grid_of_the_image(name, method):
    model, seen = attached(name, method), []
    for mixer in mixers(model).values():
        hook = lambda _, inputs, kwargs, __: seen.append((kwargs["grid"], inputs[0].shape[1]))  # noqa: E731
        mixer.register_forward_hook(hook, with_kwargs=True)
    logits(model, image(size=(64, 128)))
    assert len(seen) == len(mixers(model))
    model.prune_intermediate_layers([1], prune_norm=False, prune_head=False)
    model.forward_intermediates(image(size=(64, 128)), indices=[1])
    assert len(seen) > len(set(seen))
    for (rows, columns), tokens in seen:
        assert columns == 2 * rows
        assert rows * columns + (name == "dynamic vit") == tokens


def _hooked_outputs(model: nn.Module, x: Tensor, paths: list[str]) -> list[Tensor]:
    found: list[Tensor] = []
    handles = [model.get_submodule(p).register_forward_hook(lambda *call: found.append(call[-1])) for p in paths]
    logits(model, x)
    for handle in handles:
        handle.remove()
    return found


def as_maps(name: str, features: list[Tensor]) -> list[Tensor]:
    """Swin's features come with the channels last out of timm's wrappers, and first out of `forward_intermediates`."""
    return [one.permute(0, 3, 1, 2) for one in features] if name == "swin" else features


def assert_all_equal(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@over(ONE_METHOD, "torchvision", "mvit")
def test_wrappers_for_features_before_and_after(name, method):
    model, x = attached(name, method), image()
    indices = (0, 1) if name in ("vit", "dynamic vit", "eva") else (2, 3)
    with torch.no_grad():
        _, expected = model.forward_intermediates(x, indices=list(indices))
        assert_all_equal(FeatureGetterNet(copy.deepcopy(model), out_indices=indices)(x), expected)
        wrapped = NETWORKS[name](features_only=True, out_indices=indices).eval()
        plain = wrapped(x)
        mrla.attach(wrapped, method.partition("-")[0], **METHODS[method])
        assert_all_equal(wrapped(x), plain)
        # timm's FeatureListNet has flattened stages into attributes of its own: "stages_0" was "stages.0".
        weights = {key.replace(".", "_"): value for key, value in model.state_dict().items()}
        inner = getattr(wrapped, "model", wrapped)
        inner.load_state_dict({key: weights[key.replace(".", "_")] for key in inner.state_dict()})
        assert_all_equal(as_maps(name, wrapped(x)), expected)


@over(ONE_METHOD, *(name for name in NETWORKS if name not in ("resnet", "convnext", "regnet", "swin", "pvt")))
def test_timms_list_of_features_of_an_attached_network(name, method):
    model, x = attached(name, method), image()
    with torch.no_grad():
        _, expected = model.forward_intermediates(x, indices=[1, 2])
        # A ResNet's stages are lost when they are flattened, without mixers too.
        found = FeatureListNet(model, out_indices=(1, 2), flatten_sequential=name != "resnet")(x)
    assert_all_equal(as_maps(name, found), expected)


@pytest.mark.parametrize("method", METHODS)
def test_torchvisions_getter_and_feature_pyramid(method):
    model, x = attached("torchvision", method), image()
    names = ["layer1", "layer2", "layer3", "layer4"]
    expected = _hooked_outputs(model, x, names)
    found = IntermediateLayerGetter(model, {name: name for name in names})(x)
    assert all(torch.equal(found[name], one) for name, one in zip(names, expected, strict=True))
    pyramid = BackboneWithFPN(model, {name: name for name in names}, [64, 128, 256, 512], out_channels=16).eval()
    levels = pyramid.fpn(dict(zip(names, expected, strict=True)))
    found = pyramid(x)
    assert all(torch.equal(found[name], level) for name, level in levels.items())
    cut = nn.Sequential(*list(model.children())[:-2])
    assert torch.equal(cut(x), expected[-1])


@pytest.mark.unchecked
# mvit and a ViT of any size do not trace without mixers either.
@over(ONE_METHOD, "mvit", "dynamic vit")
@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing:UserWarning")  # as without mixers: dropout
@pytest.mark.filterwarnings("ignore:Detected use of torch.fx._symbolic_trace.is_fx_tracing:UserWarning")
def test_torchs_graph_of_features(name, method):
    model, x = attached(name, method), image(size=(64, 128) if name == "pvt" else (64, 64))
    blocks = [path.removesuffix(".mrla") for path in mixers(model)]
    nodes = {**{block: f"block {block}" for block in blocks}, **{stage: f"stage {stage}" for stage in stages(model)}}
    expected = dict(zip(blocks, _hooked_outputs(model, x, blocks), strict=True))
    graph = create_feature_extractor(model, nodes).eval()
    with torch.no_grad():
        found = graph(x)
    for block in blocks:
        first = expected[block][0] if isinstance(expected[block], (tuple, list)) else expected[block]
        assert torch.equal(found[f"block {block}"], first), block
    for stage in stages(model):
        last = [block for block in blocks if block.startswith(f"{stage}.")][-1]
        if name != "vit":  # its last block has no mixer
            assert torch.equal(found[f"stage {stage}"], expected[last]), stage
    whole = torch.fx.symbolic_trace(model)
    assert torch.equal(logits(whole, x), logits(model, x))


@pytest.mark.unchecked
@pytest.mark.parametrize("method", METHODS)
def test_timms_graph_does_not_look_into_some_blocks(method):
    """It takes a MobileViT's block for one node; the mixer behind it is one more."""
    with made_from_seed(1):
        model = randomized(
            mrla.attach(timm.create_model("mobilevit_xxs"), method.partition("-")[0], **METHODS[method])
        ).eval()
    x, stages = image(1), ["stages.1", "stages.3", "stages.4"]
    with torch.no_grad():
        found = timm_feature_extractor(model, stages)(x)
    assert_all_equal([found[stage] for stage in stages], _hooked_outputs(model, x, stages))


# --- ways of running it


@over(THREE_METHODS, "torchvision")  # its networks have no checkpointing of their own
def test_gradients_under_checkpointing_are_those_without(name, method):
    model, x = attached(name, method).double().train(), image().double()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    seed = torch.get_rng_state()
    expected = gradients(model, x)
    torch.set_rng_state(seed)
    assert_same_gradients(gradients(other, x), expected)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_of_images_of_two_sizes_before_one_backward(method):
    model = attached("dynamic vit", method).double()
    wide, high = image(size=(32, 128)).double(), image(size=(128, 32)).double()

    def both() -> dict[str, Tensor | None]:
        (model(wide).square().sum() + model(high).square().sum()).backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        return found

    expected = both()
    model.set_grad_checkpointing()
    assert_same_gradients(both(), expected)


@over(THREE_METHODS)
def test_autocast_keeps_the_plain_networks_dtype_and_the_answer(name, method):
    model, x = attached(name, method), image()
    expected = logits(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, plain = logits(model, x), logits(plain_twin(model), x)
        assert found.dtype == plain.dtype
        if name != "torchvision":
            last = model.forward_features(x)
            assert last.dtype == plain_twin(model).forward_features(x).dtype
            assert torch.equal(model.forward_head(last), found)
    # 8 bits of a number over the depth of the network: what a lost mixer changes is larger.
    assert (found.float() - expected).abs().max() <= 0.1 * expected.abs().max()


@over(ONE_METHOD)
def test_lower_precision_follows_the_network(name, method):
    model, x = attached(name, method), image()
    expected = logits(model, x)
    for dtype, share in ((torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.05)):
        found = logits(copy.deepcopy(model).to(dtype), x.to(dtype))
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= share * expected.abs().max(), dtype


@over(THREE_METHODS)
def test_channels_last_agrees_and_stays(name, method):
    model, x = attached(name, method), image()
    expected = logits(model, x)
    formats: list[tuple[bool, bool]] = []

    def cam_targets(_: nn.Module, inputs: tuple, output: tuple) -> None:
        if output[0].ndim == 4:
            formats.append(
                tuple(one.is_contiguous(memory_format=torch.channels_last) for one in (inputs[0], output[0]))
            )

    model.to(memory_format=torch.channels_last)
    for mixer in mixers(model).values():
        mixer.register_forward_hook(cam_targets)
    torch.testing.assert_close(
        logits(model, x.to(memory_format=torch.channels_last)), expected, atol=1e-3 * expected.std().item(), rtol=1e-3
    )
    assert all(before == after for before, after in formats)
    assert any(after for _, after in formats) or name in ("vit", "dynamic vit", "eva", "swin", "mvit", "pvt")


@over(THREE_METHODS)
def test_two_threads_cannot_meet(name, method):
    model = attached(name, method)
    sizes = [(64, 64), (32, 128), (128, 32), (64, 96)] if name == "dynamic vit" else [(64, 64)]
    images = [image(1, size) for size in sizes * (6 // len(sizes) + 1)]
    expected = [logits(model, x) for x in images]
    with ThreadPoolExecutor(2) as pool:
        assert_all_equal(pool.map(functools.partial(logits, model), images), expected)


def test_blocks_of_two_images_may_run_in_turns():
    """Memory and grid ride on each image's own tokens."""
    model = attached("dynamic vit", "base")
    wide, high = image(size=(32, 128)), image(size=(128, 64))
    with torch.no_grad():
        expected = [model.forward_features(x) for x in (wide, high)]
        tokens, steps = [], []
        for x in (wide, high):
            tokens.append(model.norm_pre(model._pos_embed(model.patch_embed(x))))
            steps.append(list(model.blocks))
        for pair in zip(*steps, strict=True):
            tokens = [step(x) for step, x in zip(pair, tokens, strict=True)]
        assert_all_equal([model.norm(x) for x in tokens], expected)
        alike = image(size=(128, 32))  # as many tokens: whose are they?
        tokens = [model.norm_pre(model._pos_embed(model.patch_embed(x))) for x in (wide, alike)]
        with pytest.raises(RuntimeError, match=r"images of different grids, \(2, 8\), \(8, 2\), went through"):
            model.blocks(tokens[0])
        assert torch.equal(model.forward_features(wide), expected[0])


@over(ONE_METHOD)
def test_no_grad_and_inference_mode_leave_nothing_that_stops_training(name, method):
    model, x = attached(name, method), image()
    twin = copy.deepcopy(model)
    with torch.inference_mode():
        model(x)
    logits(model, x)
    found, expected = gradients(model, x), gradients(twin, x)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@over(ONE_METHOD)
def test_an_exception_in_a_block_leaves_nothing_behind(name, method):
    model, x = attached(name, method), image()
    expected = logits(model, x)
    path = list(mixers(model))[-1].removesuffix(".mrla")
    inner = next(model.get_submodule(path).children())
    handle = inner.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, image(1))
    handle.remove()
    assert torch.equal(logits(model, x), expected)


@over(ONE_METHOD)
def test_parameters_given_from_outside(name, method):
    model, x = attached(name, method), image()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = logits(model, x)
    empty = copy.deepcopy(model)
    for parameter in empty.parameters():
        parameter.data.zero_()
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(empty, state, (x,)), expected)


@over(ONE_METHOD)
def test_meta_and_assigned_weights(name, method):
    model, x = attached(name, method), image()
    state, expected = model.state_dict(), logits(model, x)
    away = copy.deepcopy(model).to("meta")
    assert logits(away, x.to("meta")).shape == expected.shape
    away.load_state_dict(state, assign=True)
    for module in away.modules():  # what is not saved, such as positions that are made from the grid
        own = dict(module.named_buffers(recurse=False))
        for key in module._non_persistent_buffers_set & own.keys():
            path = next(path for path, one in away.named_modules() if one is module)
            setattr(module, key, getattr(model.get_submodule(path), key))
    assert torch.equal(logits(away, x), expected)


# --- copies


@over(THREE_METHODS)
def test_copies_and_pickles_are_the_same_network_and_detach_alone(name, method):
    model, x = attached(name, method), image()
    expected = logits(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for one in copies:
        assert torch.equal(logits(one, x), expected)
        mrla.detach(one)
        assert not is_attached(one)
        assert not any(module._forward_hooks for module in one.modules())
    assert torch.equal(logits(model, x), expected)


@over(ONE_METHOD)
def test_averaged_weights(name, method):
    model, x = attached(name, method), image()
    average = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    average.update(model)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(1.1 / 1.2)
    torch.testing.assert_close(logits(average.module, x), logits(expected, x), atol=1e-3, rtol=1e-3)


# --- training


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("ddp") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def three_steps(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for step in range(3):
        with made_from_seed(step):
            optimizer.zero_grad()
            model(image()).square().mean().backward()
            optimizer.step()


@over(THREE_METHODS)
@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")  # convnext's, without mixers too
def test_ddp_finds_no_unused_parameter_over_several_steps(name, method, one_process):
    model = attached(name, method).train()
    twin = copy.deepcopy(model)
    three_steps(nn.parallel.DistributedDataParallel(model))
    three_steps(twin)
    assert_same_state(model, twin)


TWO_PROCESSES = """
import sys
import torch
from torch import nn
sys.path[:0] = [{tests!r}, {here!r}]
import test_interop

def train(rank):
    torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
    for name, method in (("resnet", "base"), ("vit", "light-output"), ("pvt", "exact")):
        model = test_interop.attached(name, method).train()
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        for step in range(3):
            torch.manual_seed(2 * step + rank)
            optimizer.zero_grad()
            wrapped(test_interop.image()).square().mean().backward()
            optimizer.step()
        total = sum(p.detach().double().sum() for p in model.parameters())
        both = [torch.zeros_like(total) for _ in range(2)]
        torch.distributed.all_gather(both, total)
        assert torch.equal(*both), name

if __name__ == "__main__":
    # In a function, so that no wrapper outlives the process group: gloo's threads sometimes abort the process then.
    train(int(sys.argv[1]))
    torch.distributed.destroy_process_group()
"""


@pytest.mark.sweep
def test_ddp_with_two_processes(tmp_path):
    script = tmp_path / "two.py"
    here = Path(__file__).parent
    script.write_text(TWO_PROCESSES.format(tests=str(here.parent), here=str(here)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


@over(ONE_METHOD, "torchvision", "mvit")
def test_layer_decay_gives_mixers_their_blocks_layer(name, method):
    model = attached(name, method)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    for path in mixers(model):
        block = model.get_submodule(path.removesuffix(".mrla"))
        assert len({scale[id(parameter)] for parameter in block.parameters()}) == 1, path


@over(THREE_METHODS)
def test_what_is_one_number_a_channel_is_not_decayed(name, method):
    model = attached(name, method)
    decayed = {
        id(parameter)
        for group in param_groups_weight_decay(model, 0.05)
        if group["weight_decay"] > 0
        for parameter in group["params"]
    }
    for mixer in mixers(model).values():
        for key, parameter in mixer.named_parameters():
            assert (id(parameter) in decayed) == key.endswith(("query_weight", "key_weight", "value_weight")), key


# --- changes that are made to a network


@over(THREE_METHODS, "torchvision")
def test_another_head(name, method):
    model, x = attached(name, method), image()
    features = model.forward_features(x)
    model.reset_classifier(5)
    assert logits(model, x).shape == (2, 5)
    assert torch.equal(model.forward_features(x), features)
    model.reset_classifier(0)
    assert torch.equal(model.forward_head(features), model(x))


@pytest.mark.parametrize("method", METHODS)
def test_pooling_by_the_class_token_and_back(method):
    """A last mixer that is no longer read stays: its gradient is zero and not missing, so that DDP goes on."""
    averaging = attached("dynamic vit", method).train()
    x = image()
    averaging.reset_classifier(7, "token")
    last = averaging.blocks.get_submodule("2").mrla
    found = gradients(averaging, x)
    assert all(gradient is not None for gradient in found.values())
    assert all((gradient == 0).all() for name, gradient in found.items() if name.startswith("blocks.2.mrla."))
    handle = last.register_forward_hook(lambda _, inputs, output: (inputs[0], output[1]))
    without = logits(averaging, x)
    handle.remove()
    assert torch.equal(logits(averaging, x), without)
    averaging.reset_classifier(7, "avg")
    assert any((gradient != 0).any() for name, gradient in gradients(averaging, x).items() if "blocks.2.mrla" in name)
    token = attached("vit", method).train()  # here the last block has none, and gets none by another pooling
    token.reset_classifier(7, "avg")
    assert all(gradient is not None for gradient in gradients(token, x).values())
    assert [hasattr(block, "mrla") for block in token.blocks.children()] == [True, True, False]


@over(THREE_METHODS, "torchvision")
def test_pruned_to_the_first_stages(name, method):
    model, x = attached(name, method), image()
    last = 1 if name in ("vit", "dynamic vit", "eva") else 3 if name in ("efficientnet", "mobilenetv3") else 2
    _, expected = model.forward_intermediates(x, indices=[0, last])
    keys, count = list(model.state_dict()), len(mixers(model))
    kept = model.prune_intermediate_layers([0, last], prune_norm=False, prune_head=True)
    _, found = model.forward_intermediates(x, indices=kept)
    assert_all_equal(found, expected)
    assert set(model.state_dict()) <= set(keys)
    assert 0 < len(mixers(model)) <= count
    plain_keys = [key for key in model.state_dict() if ".mrla." not in key]
    assert list(mrla.detach(model).state_dict()) == plain_keys
    assert not any(type(module) is nn.Module for module in model.modules())
    model.forward_intermediates(x, indices=kept)  # the classes are those of before


@over(ONE_METHOD)
def test_frozen_and_synchronised_statistics(name, method):
    model, x = attached(name, method), image()
    expected = logits(model, x)
    synchronised = convert_sync_batchnorm(copy.deepcopy(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in synchronised.modules())
    torch.testing.assert_close(logits(synchronised, x), expected, atol=1e-4, rtol=1e-4)
    frozen = freeze_batch_norm_2d(copy.deepcopy(model))
    spread = expected.std().item()
    torch.testing.assert_close(logits(frozen, x), expected, atol=1e-3 * spread, rtol=1e-3)
    buffers = {key: value.clone() for key, value in frozen.named_buffers()}
    logits(frozen.train(), x)
    assert all(torch.equal(value, buffers[key]) for key, value in frozen.named_buffers())


@over(ONE_METHOD, *(name for name in NETWORKS if name not in ("vit", "eva", "swin")))
@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # of timm's swin, which resamples its biases
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing")  # likewise
def test_another_image_size(name, method):
    model = attached(name, method)
    plain, x = plain_twin(model), image(size=(64, 128))
    logits(model, image())  # nothing of this size is to be kept
    model.set_input_size((64, 128))
    plain.set_input_size((64, 128))
    grids = []
    for mixer in mixers(model).values():
        mixer.register_forward_hook(lambda _, __, kwargs, ___: grids.append(kwargs["grid"]), with_kwargs=True)
    assert logits(model, x).isfinite().all()
    assert set(grids) == ({None} if name == "swin" else {(4, 8)})
    fresh = mrla.attach(plain, method.partition("-")[0], **METHODS[method]).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, x), logits(model, x))


def test_a_part_of_a_stage_has_the_keys_that_a_part_of_the_container_has():
    for name in ("vit", "swin"):
        model = attached(name, "base")
        plain = plain_twin(model)
        for path, stage in stages(model).items():
            keys = [key for key in stage[1:].state_dict() if ".mrla." not in key]
            assert keys == list(plain.get_submodule(path)[1:].state_dict())
            assert type(stage[1:]) is type(plain.get_submodule(path))
    listed = mrla.attach(Listed(), "base", example=(2, 3, 8, 8))
    assert [name for name, _ in listed.blocks[1:].named_children()] == ["0", "1"]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(listed(x), plain_twin(listed)(x))


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleList([Doubling() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_what_is_set_on_a_block_stays_and_blocks_pickle_alone():
    model = attached("resnet", "base")
    block = model.layer2.get_submodule("1")
    model.layer2[1].act3 = nn.Identity()
    assert isinstance(block.act3, nn.Identity)
    blocks = pickle.loads(pickle.dumps(list(model.layer1)))
    with torch.no_grad():
        x = torch.randn(2, 64, 16, 16)
        assert torch.equal(blocks[1](blocks[0](x)), model.layer1(x))


def test_a_stage_of_a_dynamic_transformer_without_its_network():
    """Its grid is that of the last image of the same thread; tokens that it does not hold are refused."""
    model = randomized(mrla.attach(NETWORKS["dynamic vit"](), "base")).eval()
    tokens = torch.randn(1, 17, 48)
    with torch.no_grad():
        square = model.blocks(tokens)  # no image yet: a square
        model(image(size=(32, 128)))
        assert not torch.allclose(model.blocks(tokens), square)
        model(image(size=(64, 64)))
        assert torch.equal(model.blocks(tokens), square)
        model(image(size=(64, 96)))
        with pytest.raises(ValueError, match=r"the grid must hold every patch token: got grid=\(4, 6\) for 17 tokens"):
            model.blocks(tokens)
        in_a_thread: list[Tensor] = []
        thread = threading.Thread(target=lambda: in_a_thread.append(logits(model.blocks, tokens)))
        thread.start()
        thread.join()
    assert torch.equal(in_a_thread[0], square)


# --- other libraries


@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_of_segmentation_models(method):
    x, options = image(), METHODS[method]
    with warnings.catch_warnings():
        unet = smp.Unet(encoder_name="tu-resnet18", encoder_weights=None).eval()
        expected = logits(unet, x)
        whole = mrla.attach(copy.deepcopy(unet), method.partition("-")[0], **options)
    assert torch.equal(logits(whole, x), expected)
    mrla.attach(unet.encoder, method.partition("-")[0], **options)
    assert torch.equal(logits(unet, x), expected)
    assert mixers(unet).keys() == mixers(whole).keys()
    randomized(unet)
    with torch.no_grad():
        stages = [f"encoder.model.layer{at}" for at in range(1, 5)]
        hooked = _hooked_outputs(unet, x, stages)
        assert_all_equal(unet.encoder(x)[-4:], hooked)
        assert not torch.allclose(logits(unet, x), logits(plain_twin(unet), x))


@pytest.mark.parametrize("name", ["resnet18_mrla_light", "resnet18_mrla_base", "test_resnet_bottleneck_mrla_base"])
def test_a_named_encoder_of_segmentation_models(name):
    unet = smp.Unet(encoder_name=f"tu-{name}", encoder_weights=None).eval()
    named = timm.create_model(name).eval()
    named.load_state_dict({**named.state_dict(), **unet.encoder.model.state_dict()})
    x = image()
    _, expected = named.forward_intermediates(x, indices=[1, 2, 3, 4])
    assert_all_equal(unet.encoder(x)[-4:], expected)
    assert logits(unet, x).shape == (2, 1, 64, 64)


# --- compiled and exported


@pytest.mark.unchecked
@over(ONE_METHOD)
def test_it_compiles_in_one_graph(name, method):
    model, x = attached(name, method), image()
    expected = logits(model, x)
    found = logits(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.std().item(), rtol=1e-4)


@pytest.mark.unchecked
@pytest.mark.parametrize(("name", "method"), [("resnet", "base"), ("vit", "light-output"), ("pvt", "exact")])
def test_training_compiles_in_one_graph(name, method):
    model, x = attached(name, method).train(), image()
    twin = copy.deepcopy(model)
    expected = gradients(model, x)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    for key, parameter in twin.named_parameters():
        scale = expected[key].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[key], atol=1e-3 * scale + 1e-6, rtol=1e-3)
    statistics = dict(model.named_buffers())
    for key, buffer in twin.named_buffers():
        torch.testing.assert_close(buffer, statistics[key])


@pytest.mark.unchecked
@over(ONE_METHOD)
def test_it_exports_with_a_batch_of_any_size(name, method):
    """And with images of any size, but for the four that do not without mixers either."""
    model, fixed = attached(name, method), name in ("vit", "eva", "swin", "mvit")
    dim = torch.export.Dim
    sizes = {0: dim("batch", min=2, max=64)}
    if not fixed:
        sizes |= {2: 32 * dim("rows", min=1, max=8), 3: 32 * dim("columns", min=1, max=8)}
    with torch.no_grad():
        program = torch.export.export(model, (image() if fixed else image(size=(64, 96)),), dynamic_shapes=(sizes,))
    three = image(3, (64, 64) if fixed else (96, 160))
    expected = logits(model, three)
    found = logits(program.module(), three)
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.std().item(), rtol=1e-4)


class Pooling(nn.Module):
    """A block of tokens that may shrink their grid, and says what it has become, as MViT's do."""

    def __init__(self, stride: int):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.pool = nn.MaxPool2d(stride)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, grid: list[int]) -> tuple[Tensor, list[int]]:
        maps = self.pool(self.norm(x).transpose(1, 2).unflatten(2, tuple(grid)))
        return self.linear(maps.flatten(2).transpose(1, 2)), [maps.shape[2], maps.shape[3]]


class OfPooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList([Pooling(2), Pooling(1), Pooling(1)])

    def forward(self, x: Tensor) -> Tensor:
        maps = self.stem(x)
        x, grid = maps.flatten(2).transpose(1, 2), [maps.shape[2], maps.shape[3]]
        for block in self.blocks:
            x, grid = block(x, grid)
        return x


@pytest.mark.unchecked
def test_blocks_that_shrink_their_grid_export_with_images_of_any_size():
    model = randomized(mrla.attach(OfPooling(), "base", example=(2, 3, 64, 64))).eval()
    dim = torch.export.Dim
    sizes = {0: dim("batch", min=2), 2: 8 * dim("rows", min=2), 3: 8 * dim("columns", min=2)}
    program = torch.export.export(model, (image(size=(64, 96)),), dynamic_shapes=(sizes,))
    x = image(3, (96, 32))
    torch.testing.assert_close(program.module()(x), model(x))
