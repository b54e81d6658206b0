import copy
import os
import struct
from collections.abc import Callable

import pytest
import timm
import torch
from conftest import randomise_norms, sweep_but
from torch import Tensor, nn
from torch.nn.functional import interpolate, layer_norm

import mrla
from mrla.analysis.explanation.activation_maps import activation_maps, draw_activation_maps
from mrla.models import find_chains

SMALL = {
    "test_resnet": ({}, (64, 96)),
    "test_vit": ({"depth": 3}, (160, 160)),
    "test_vit avg": ({"depth": 3, "global_pool": "avg"}, (160, 160)),
    "test_vit any size": ({"depth": 3, "dynamic_img_size": True}, (64, 96)),
    "convnext_atto": ({"depths": (1, 1, 2, 2), "dims": (8, 16, 24, 32)}, (64, 96)),
    "swin_tiny_patch4_window7_224": (
        {"embed_dim": 24, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2), "img_size": (64, 96), "window_size": 2},
        (64, 96),
    ),
    "pvt_v2_b0": ({"embed_dims": (8, 16, 24, 32), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 2)}, (64, 96)),
}
"""By layout and by what gives the map: a container, what takes its output in, the last block's input; three grids."""


def make_network(case: str, arm: str = "plain") -> tuple[nn.Module, Tensor]:
    options, size = SMALL[case]
    model = randomise_norms(timm.create_model(case.split()[0], num_classes=5, **options))
    if arm != "plain":
        mrla.attach(model, arm, init="released")
    return model.eval(), torch.randn(2, 3, *size)


def scaled(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    maps = interpolate(maps[:, None].relu(), size, mode="bilinear")[:, 0]
    return maps / maps.amax((1, 2), keepdim=True)


class Quadrants(nn.Module):
    """Class i sees the light in quadrant i alone, as a sum over its pixels."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(PassOn() for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        return x.unflatten(3, (2, columns)).unflatten(2, (2, rows)).sum((1, 3, 5)).flatten(1)


class PassOn(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.inner(x))


@pytest.mark.parametrize("arm", ["plain", "light"])
def test_a_network_that_reads_one_quadrant_is_seen_to_look_there(arm):
    model = Quadrants()
    if arm != "plain":
        mrla.attach(model, arm, head_dim=3, example=(2, 3, 8, 8))
    maps = activation_maps(model, torch.rand(4, 3, 8, 8) + 0.1, targets=[0, 1, 2, 3])
    quadrants = maps.unflatten(2, (2, 4)).unflatten(1, (2, 4)).amax((2, 4)).flatten(1)
    torch.testing.assert_close(quadrants, torch.eye(4))


@pytest.mark.parametrize("arm", ["plain", "light", "base"])
def test_it_is_the_class_activation_map_before_pooling_and_one_linear_layer(arm):
    model, images = make_network("test_resnet", arm)
    with torch.no_grad():
        features = model.forward_features(images)  # behind the last mixer
        target = model(images).argmax(1)
        by_hand = torch.einsum("bc,bchw->bhw", model.get_classifier().weight[target], features)
    torch.testing.assert_close(activation_maps(model, images), scaled(by_hand, images.shape[2:]))


@pytest.mark.parametrize(
    "case", sweep_but(("test_vit", "pvt_v2_b0"), [case for case in SMALL if case != "test_resnet"])
)
@pytest.mark.parametrize("arm", ["plain", "light"])
def test_it_is_gradient_times_features_in_every_layout(case, arm):
    model, images = make_network(case, arm)
    target = torch.tensor([1, 3])
    with torch.no_grad():  # as timm gives them, in its own way to them
        features = intermediates(model, images)
    read, head = head_by_hand(case, model, features)
    read = read.detach().requires_grad_()
    gradient = torch.autograd.grad(head(read).gather(1, target[:, None]).sum(), read)[0]
    spoken = (gradient * read).detach()
    if spoken.ndim == 3:  # without the class token, as a map
        spoken = spoken[:, 1:].transpose(1, 2).unflatten(2, features[0].shape[2:])
    by_hand = spoken.sum(3 if case.startswith(("swin", "pvt")) else 1)
    torch.testing.assert_close(activation_maps(model, images, target), scaled(by_hand, images.shape[2:]))
    torch.testing.assert_close(head(read), model(images))


def intermediates(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What the last block gives, and the one before, as maps; of a transformer with their prefix tokens in front."""
    options = {"return_prefix_tokens": True} if hasattr(model, "cls_token") else {}
    found = model.forward_intermediates(images, indices=2, norm=False, intermediates_only=True, **options)
    if not options:
        return [found[1], found[0]]
    tokens = [torch.cat([prefix, maps.flatten(2).transpose(1, 2)], 1) for maps, prefix in found]
    return [found[1][0], *reversed(tokens)]


def head_by_hand(case: str, model: nn.Module, features: list[Tensor]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The features that the map is of, and what the network makes of them."""
    if case == "test_vit avg":
        return features[1], lambda read: model.forward_head(read)
    if case.startswith("test_vit"):
        block, tokens = list(model.blocks.children())[-1], features[2]

        def behind_the_norm(normed: Tensor) -> Tensor:
            x = tokens + block.ls1(block.attn(normed))
            return model.forward_head(model.norm(x + block.ls2(block.mlp(block.norm2(x)))))

        return block.norm1(tokens), behind_the_norm
    if case.startswith("swin"):
        return model.norm(features[0].permute(0, 2, 3, 1)), lambda read: model.forward_head(read)
    if case.startswith("pvt"):
        normed = model.stages[-1].norm(features[0].permute(0, 2, 3, 1))
        return normed, lambda read: model.forward_head(read.permute(0, 3, 1, 2))
    return features[0], lambda read: model.forward_head(model.norm_pre(read))


@pytest.mark.parametrize("case", sweep_but(("test_resnet", "test_vit", "pvt_v2_b0"), SMALL))
def test_maps_of_every_kind_of_network(case):
    model, images = make_network(case, "base")
    maps = activation_maps(model, images)
    assert maps.shape == (2, *images.shape[2:])
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    assert maps.min() >= 0
    torch.testing.assert_close(maps.amax((1, 2)), torch.ones(2))
    one = activation_maps(model, images[1:])
    torch.testing.assert_close(one[0], maps[1], atol=1e-4, rtol=1e-3)  # no image depends on another
    assert not torch.allclose(activation_maps(model, images, 0), activation_maps(model, images, 1), atol=0.01)


@pytest.mark.parametrize("case", ["test_resnet", "test_vit", "swin_tiny_patch4_window7_224"])
def test_the_mixers_work_is_seen(case):
    model, images = make_network(case)
    plain = activation_maps(model, images, 2)
    mrla.attach(model)
    torch.testing.assert_close(activation_maps(model, images, 2), plain, atol=1e-4, rtol=1e-3)
    *_, last = [module for module in model.modules() if isinstance(module, mrla.ops.LayerMixer)]
    torch.nn.init.normal_(last.norm.weight)
    assert not torch.allclose(activation_maps(model, images, 2), plain, atol=0.01)


@pytest.mark.parametrize("arm", ["plain", "light"])
@pytest.mark.parametrize("case", ["test_resnet", "test_vit any size"])
def test_no_trace_is_left(case, arm):
    model, images = make_network(case, arm)
    model.train()
    model.get_classifier().eval()  # a mode of its own
    frozen = next(model.parameters()).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    images.requires_grad_()
    activation_maps(model, images)
    with pytest.raises(ValueError, match="targets"):
        activation_maps(model, images, 9)
    assert modes == [module.training for module in model.modules()]
    assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter for parameter in model.parameters() if not parameter.requires_grad] == [frozen]
    assert images.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_is_the_same_with_frozen_parameters_and_without_gradients():
    model, images = make_network("test_resnet", "light")
    maps = activation_maps(model, images)
    with torch.no_grad():
        torch.testing.assert_close(activation_maps(model, images), maps)
        assert not torch.is_grad_enabled()
    model.requires_grad_(False)
    torch.testing.assert_close(activation_maps(model, images), maps)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.inference_mode():
        made_there = images.clone()
        with pytest.raises(ValueError, match=r"outside torch.inference_mode"):
            activation_maps(model, images)
    torch.testing.assert_close(activation_maps(model, made_there), maps)


def test_an_earlier_chain():
    model, images = make_network("test_resnet", "light")
    chains = find_chains(mrla.detach(copy.deepcopy(model)))
    last, earlier = (activation_maps(model, images, 1, chain=chains[at]) for at in (-1, -2))
    torch.testing.assert_close(last, activation_maps(model, images, 1))
    assert not torch.allclose(earlier, last, atol=0.01)


def test_a_class_that_does_not_depend_on_the_image_has_no_place():
    model, images = make_network("test_resnet")
    nn.init.zeros_(model.get_classifier().weight)
    assert torch.equal(activation_maps(model, images, 0), torch.zeros(2, 64, 96))


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (5, ValueError, "from 0 to 4, the network's classes: got 5"),
        ([0, -1], ValueError, "got -1"),
        ([0, 1, 2], ValueError, "one for each of 2 images"),
        (torch.tensor([0.5, 1.0]), TypeError, "whole numbers"),
        (torch.tensor([True, False]), TypeError, "whole numbers"),
    ],
)
def test_targets_that_do_not_fit(targets, error, message):
    model, images = make_network("test_resnet")
    with pytest.raises(error, match=message):
        activation_maps(model, images, targets)


def test_networks_and_images_that_do_not_fit():
    model, images = make_network("test_resnet")
    with pytest.raises(ValueError, match=r"images must be \(b, c, h, w\).*image\[None\]"):
        activation_maps(model, images[0])
    with pytest.raises(ValueError, match="none of them 0"):
        activation_maps(model, images[:0])
    with pytest.raises(TypeError, match="uint8"):
        activation_maps(model, images.to(torch.uint8))
    with pytest.raises(ValueError, match="no chain of blocks was found"):
        activation_maps(nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), images)
    with pytest.raises(ValueError, match=r"logits \(b, classes\): this network gives shape \(2, "):
        activation_maps(timm.create_model("test_resnet", num_classes=0, global_pool=""), images)
    with pytest.raises(ValueError, match="this network gives list"):
        activation_maps(timm.create_model("test_resnet", features_only=True), images)
    other = find_chains(timm.create_model("convnext_atto"))[0]
    with pytest.raises(ValueError, match="chain must be one of the network's"):
        activation_maps(model, images, chain=other)
    nn.init.constant_(model.get_classifier().bias, torch.nan)
    with pytest.raises(ValueError, match="finite logits"):
        activation_maps(model, images)


def test_features_whose_size_says_nothing_are_refused():
    class Normed(Quadrants):
        def forward(self, x: Tensor) -> Tensor:
            normed = layer_norm(self.blocks(x).permute(0, 2, 3, 1), (3,))  # by no module
            return normed.flatten(1, 2).mean(1)

    with pytest.raises(ValueError, match="a norm takes them in that was not found"):
        activation_maps(Normed(), 100 * torch.rand(1, 3, 8, 8))


def test_a_network_whose_maps_no_module_gives_or_takes():
    class OneByOne(Quadrants):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(self.blocks)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x.mean((2, 3))

    with pytest.raises(ValueError, match="gives or takes the output of blocks and nothing else"):
        activation_maps(OneByOne(), torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("size", [(8, 8), (48, 64)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_picture_is_one_panel_and_one_for_each_map(tmp_path, size, channels):
    from matplotlib.image import imread

    path = tmp_path / "new" / "maps.png"
    looked = {"with mixers": torch.zeros(size), "without": torch.ones(size)}
    captions = {"image": "a.png", "with mixers": "cat 90 %"}
    assert draw_activation_maps(torch.full((channels, *size), 0.5), looked, path, captions=captions) == path
    assert os.listdir(path.parent) == ["maps.png"]
    wide = path.read_bytes()
    assert wide[:8] == b"\x89PNG\r\n\x1a\n"
    one = draw_activation_maps(
        torch.full((channels, *size), 128, dtype=torch.uint8), {"only": torch.rand(size)}, tmp_path / "one.png"
    )
    assert struct.unpack(">I", wide[16:20])[0] - struct.unpack(">I", one.read_bytes()[16:20])[0] == 480
    middle = imread(path)[imread(path).shape[0] // 2, :, :3]
    colours = [middle[int(share * len(middle))] for share in (0.15, 0.45, 0.75)]  # image, nothing, everything
    assert abs(colours[0] - 0.5).max() < 0.01
    assert colours[1].max() < 0.3
    assert colours[2].min() > 0.55
    assert colours[2][0] - colours[2][2] > 0.15  # the scale's pale yellow


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": {}}, "at least one"),
        ({"maps": {"image": torch.rand(8, 8)}}, "none called 'image'"),
        ({"maps": {"a": torch.rand(4, 8)}}, r"size \(8, 8\): got \(4, 8\) for 'a'"),
        ({"maps": {"a": 2 * torch.ones(8, 8)}}, "from 0 to 1: got"),
        ({"maps": {"a": torch.full((8, 8), torch.nan)}}, "from 0 to 1: got"),
        ({"captions": {"b": "cat"}}, "choose from image, a"),
        ({"picture": torch.rand(8, 8)}, r"\(1, h, w\): got shape \(8, 8\)"),
        ({"picture": torch.randn(3, 8, 8)}, "undo the network's normalisation"),
        ({"path": "maps.svg"}, r"must end in .png: got maps.svg"),
    ],
)
def test_drawings_that_do_not_fit(tmp_path, changes, message):
    arguments = {"picture": torch.rand(3, 8, 8), "maps": {"a": torch.rand(8, 8)}, "captions": {}, **changes}
    path = tmp_path / changes.get("path", "maps.png")
    with pytest.raises(ValueError, match=message):
        draw_activation_maps(arguments["picture"], arguments["maps"], path, captions=arguments["captions"])
    assert not list(tmp_path.iterdir())
