"""The contract of every named model, swept over the tiny twins of all families, and the released counts."""

import copy
import pickle

import pytest
import timm
import torch
from conftest import randomise_norms, sweep_but
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import mrla
from mrla.models import NAMED, MixedBlock, attach_recipe, is_attached
from mrla.ops import LayerMixer

TWINS = [name for name in timm.list_models("test_*") if name in NAMED]
FAMILIES = [name for name in TWINS if "cifar" not in name]
# One of each kind stays in the default lane.
KEPT = (
    "test_resnet_bottleneck_mrla_base",
    "test_resnet_basic_mrla_light",
    "test_resnet_basic_cifar_mrla_light",
    "test_resnext_mrla_base",
    "test_deit_distilled_mrla_light",
    "test_deit_mrla_base",
    "test_efficientnet_mrla_light",
    "test_pvt_v2_mrla_base",
)
COUNTED = ("resnet50_mrla_light", "resnet50_mrla_base", "deit_tiny_patch16_224_mrla_light")
# Trainable parameters, 1000 classes; facts.md section 2, counted by running the released code.
RELEASED = {
    "resnet50_mrla_light": 25_738_452,
    "resnet101_mrla_light": 44_939_646,
    "resnet50_mrla_base": 25_723_348,
    "resnet50c_mrla_base": 25_742_580,
    "resnet101c_mrla_base": 44_926_366,
    "deit_tiny_patch16_224_mrla_light": 5_749_792,
    "deit_small_patch16_224_mrla_light": 22_115_296,
    "deit_base_patch16_224_mrla_light": 86_696_800,
    "deit_tiny_patch16_224_mrla_base": 5_742_880,
    "deit_small_patch16_224_mrla_base": 22_101_472,
    "deit_base_patch16_224_mrla_base": 86_669_152,
}


def image(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 64, 64, dtype=dtype)


def twin(name: str, **arguments) -> nn.Module:
    """A twin with random statistics and norms, so that nothing hides behind a zero."""
    return randomise_norms(timm.create_model(name, num_classes=7, **arguments))


def zero_grad_parameters(model: nn.Module) -> set[str]:
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, LayerMixer)
        for name in module.zero_grad_parameters()
    }


def test_every_family_is_named_with_light_and_base():
    resnets = [*(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)), "resnext50_32x4d", "wide_resnet50_2"]
    transformers = [
        f"deit_{size}{kind}_patch16_224" for size in ("tiny", "small", "base") for kind in ("", "_distilled")
    ]
    others = ["efficientnet_b0", "pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2", "resnet50c", "resnet101c"]
    wanted = {f"{name}_mrla_{method}" for name in (*resnets, *transformers, *others) for method in ("light", "base")}
    assert wanted <= set(timm.list_models("*_mrla_*"))
    assert wanted <= set(NAMED)
    modules = ["resnets", "deits", "efficientnets", "pvts"]
    assert set(timm.list_models(module=modules)) == set(NAMED)


@pytest.mark.parametrize("name", sweep_but(COUNTED, RELEASED))
def test_counts_are_those_of_the_released_code(name):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in timm.create_model(name).parameters()) == RELEASED[name]


def test_efficientnet_has_mixers_on_its_blocks_with_a_residual_and_eight_heads_each():
    with torch.device("meta"):
        model = timm.create_model("efficientnet_b0_mrla_light")
    mixed = {path for path, module in model.named_modules() if isinstance(module, LayerMixer)}
    residual = {f"{path}.mrla" for path, module in model.named_modules() if getattr(module, "has_skip", False)}
    assert mixed == residual
    assert len(mixed) == 9
    assert {module.heads for module in model.modules() if isinstance(module, LayerMixer)} == {8}


@pytest.mark.parametrize("name", sweep_but(KEPT, TWINS))
def test_twins_are_small_and_attached(name):
    model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert is_attached(model)


@pytest.mark.parametrize("name", sweep_but(KEPT, TWINS))
def test_forward_is_finite_and_shaped(name):
    model = timm.create_model(name, num_classes=7)
    for training in (True, False):
        assert model.train(training)(image(3)).shape == (3, 7)
        assert model(image(3)).isfinite().all()


@pytest.mark.parametrize("init", ["released", "identity"])
@pytest.mark.parametrize("name", sweep_but(KEPT, TWINS))
def test_every_parameter_learns_within_two_steps_but_those_that_the_maths_silences(name, init):
    # In float64: with the released start some gates saturate to exactly 1 in float32.
    model = timm.create_model(name, num_classes=7, init=init).double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    unmoved = set(dict(model.named_parameters()))
    x, labels = image(8, torch.float64), torch.randint(7, (8,))
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        unmoved -= {key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-30}
        optimizer.step()
    assert unmoved == zero_grad_parameters(model)
    assert all(p.grad is not None for p in model.parameters()), "a parameter outside the graph would stall DDP"


@pytest.mark.parametrize("name", sweep_but(KEPT, TWINS))
def test_features_are_what_feature_info_says(name):
    features = timm.create_model(name, features_only=True).eval()
    x = image()
    maps = features(x)
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == features.feature_info.reduction()
    whole = timm.create_model(name).eval()
    theirs = getattr(features, "model", features).state_dict()
    # timm's FeatureListNet has flattened PVT's stages into attributes of its own.
    whole.load_state_dict({**whole.state_dict(), **{key.replace("stages_", "stages."): theirs[key] for key in theirs}})
    for found, index in zip(maps, features.feature_info.out_indices, strict=True):
        (expected,) = whole.forward_intermediates(x, indices=[index], intermediates_only=True)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", sweep_but(KEPT, FAMILIES))
def test_going_block_by_block_gives_what_calling_the_whole_gives(name):
    model = twin(name).eval()
    x = image()
    final, _ = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(model(x), model.forward_head(model.forward_features(x)))


@pytest.mark.parametrize("name", sweep_but(KEPT, FAMILIES))
def test_gradients_under_checkpointing_are_those_without(name):
    model = twin(name).double().train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    x = image(dtype=torch.float64)
    model(x).square().sum().backward()
    other(x).square().sum().backward()
    for (key, parameter), (_, checkpointed) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, checkpointed.grad, msg=key)


@pytest.mark.parametrize("name", sweep_but(KEPT, TWINS))
def test_a_named_model_is_the_attached_one(name):
    named = twin(name).eval()
    recipe, keys = attach_recipe(named), list(named.state_dict())
    assert recipe is not None
    plain = mrla.detach(copy.deepcopy(named))
    assert not any(isinstance(module, MixedBlock) for module in plain.modules())
    again = mrla.attach(plain, **recipe)
    assert list(again.state_dict()) == keys
    again.load_state_dict(named.state_dict())
    x = image()
    assert torch.equal(again(x), named(x))


@pytest.mark.parametrize("name", sweep_but(KEPT, FAMILIES))
def test_it_starts_as_the_plain_network_where_asked(name):
    model = timm.create_model(name, num_classes=7, init="identity")
    recipe = attach_recipe(model)
    assert recipe is not None
    model = mrla.attach(randomise_norms(mrla.detach(model)), **recipe)
    x = image()
    for training in (True, False):
        plain = mrla.detach(copy.deepcopy(model)).train(training)
        assert torch.equal(copy.deepcopy(model).train(training)(x), plain(x))


PLAIN = {
    "resnet18_mrla_base": "resnet18",
    "deit_tiny_patch16_224_mrla_light": "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224_mrla_base": "deit_tiny_distilled_patch16_224",
    "efficientnet_b0_mrla_light": "efficientnet_b0",
    "pvt_v2_b0_mrla_base": "pvt_v2_b0",
}


@pytest.mark.parametrize("name", PLAIN)
def test_pretrained_takes_plain_weights_and_starts_as_the_identity(name):
    """The weights cannot be downloaded here: timm's own loading runs on a state dict in their place."""
    plain = randomise_norms(timm.create_model(PLAIN[name])).eval()
    overlay = {"state_dict": plain.state_dict()}
    named = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(named(x), plain(x))
    fewer = timm.create_model(name, pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay).eval()
    assert fewer(x).shape == (1, 5)
    configs = timm.models.get_arch_pretrained_cfgs(name)
    assert len(configs) == len(timm.models.get_arch_pretrained_cfgs(PLAIN[name])) > 0


@pytest.mark.parametrize("name", sweep_but(KEPT, FAMILIES))
def test_saved_and_loaded_copied_and_pickled_it_is_the_same(name, tmp_path):
    model = twin(name).eval()
    x = image()
    expected = model(x)
    assert torch.equal(mrla.load(mrla.save(model, tmp_path))(x), expected)
    local = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(local(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


@pytest.mark.parametrize("name", sweep_but(KEPT, FAMILIES))
def test_lower_precision_and_channels_last_agree_with_float32(name):
    model = twin(name).eval()
    x = image()
    with torch.no_grad():
        expected = model(x)
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, expected, atol=1e-4, rtol=1e-4)
        low = model.bfloat16()(x.bfloat16()).float()
    # bfloat16 carries 8 bits; over the depth of these twins the logits keep 5 % of their spread.
    assert (low - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", sweep_but(KEPT, FAMILIES))
def test_new_parameters_are_in_their_blocks_layer_group_and_lambda_is_not_decayed(name):
    model = timm.create_model(name)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    by_id = {id(parameter): group for group in groups for parameter in group["params"]}
    for path, module in model.named_modules():
        if isinstance(module, LayerMixer):
            block = model.get_submodule(path.removesuffix(".mrla"))
            scales = {by_id[id(parameter)]["lr_scale"] for parameter in block.parameters()}
            assert len(scales) == 1, path
            vectors = [parameter for parameter in module.parameters() if parameter.ndim == 1]
            assert {by_id[id(parameter)]["weight_decay"] for parameter in vectors} <= {0.0}


@pytest.mark.unchecked
@pytest.mark.parametrize("name", sweep_but(KEPT, FAMILIES))
def test_compile_and_export_give_the_same_logits(name):
    model = twin(name).eval()
    x = image()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, atol=1e-4, rtol=1e-4)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        three = image(3)
        torch.testing.assert_close(program.module()(three), model(three), atol=1e-4, rtol=1e-4)


def test_features_may_be_fewer():
    for name in ("test_resnet_basic_mrla_light", "test_deit_mrla_base", "test_pvt_v2_mrla_light"):
        features = timm.create_model(name, features_only=True, out_indices=(1, 2))
        assert len(features(image())) == 2


def test_an_incomplete_plain_checkpoint_is_refused():
    weights = timm.create_model("resnet18").state_dict()
    del weights["layer2.0.conv1.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*layer2\.0\.conv1\.weight"):
        timm.create_model("resnet18_mrla_light", pretrained=True, pretrained_cfg_overlay={"state_dict": weights})


def test_plain_checkpoints_in_their_first_authors_form_are_read_as_timm_reads_them():
    plain = timm.create_model("deit_tiny_patch16_224").eval()
    overlay = {"state_dict": {"model": plain.state_dict()}}  # as the DeiT files are
    named = timm.create_model(
        "deit_tiny_patch16_224_mrla_light", pretrained=True, pretrained_cfg_overlay=overlay
    ).eval()
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(named(x), plain(x))


def test_weights_point_at_the_plain_networks_repository():
    config = timm.models.get_arch_pretrained_cfgs("pvt_v2_b0_mrla_light")["pvt_v2_b0_mrla_light.in1k"]
    assert config.hf_hub_id == "timm/pvt_v2_b0.in1k"
    assert config.architecture == "pvt_v2_b0_mrla_light"


def test_efficientnet_takes_a_head_width_or_the_control():
    by_width = timm.create_model("test_efficientnet_mrla_light", mixer={"head_dim": 4})
    widths = {m.channels // m.heads for m in by_width.modules() if isinstance(m, LayerMixer)}
    assert widths == {4}
    assert timm.create_model("test_efficientnet_mrla_light", method="dw")(image()).isfinite().all()


def test_released_se_has_a_sixteenth_of_the_channels_whatever_they_are():
    model = timm.create_model("test_resnet_bottleneck_mrla_light", se=True, channels=(4, 8, 20, 28))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        block = stage.get_submodule("0")
        assert block.se.fc1.out_channels == block.se.fc1.in_channels // 16
        assert block.se.fc1.bias is None


def test_detach_works_on_timms_wrapper_of_features():
    features = timm.create_model("test_resnet_basic_mrla_base", features_only=True)
    mrla.detach(features)
    assert not is_attached(features)
    inner = timm.create_model("test_deit_mrla_base", features_only=True)
    assert attach_recipe(mrla.detach(inner).model) is None


@pytest.mark.parametrize(
    ("network", "arguments", "classes", "pool"),
    [
        ("resnet18", {}, 9, None),
        ("resnet18", {"num_classes": 5}, 5, "max"),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 3, "num_classes": 5, "global_pool": "avg"}, 7, "max"),
        ("efficientnet_b0", {}, 0, None),
        ("pvt_v2_b0", {}, 3, None),
    ],
)
def test_a_new_head_and_pooling_survive_saving(network, arguments, classes, pool, tmp_path):
    model = mrla.attach(timm.create_model(network, **arguments)).eval()
    model.reset_classifier(classes, *([pool] if pool else []))
    again = mrla.load(mrla.save(model, tmp_path))
    x = image()
    assert torch.equal(again(x), model.eval()(x))


SIZES = [((64, 96), {"img_size": (64, 96)}), ((96, 64), {"img_size": (96, 64)}), ((128, 128), {"img_size": 128})]


@pytest.mark.parametrize(("size", "arguments"), SIZES, ids=str)
@pytest.mark.parametrize("name", sweep_but(KEPT, [name for name in FAMILIES if "deit" in name]))
def test_a_deit_takes_images_of_any_size(name, size, arguments):
    fixed = twin(name, **arguments).eval()
    dynamic = twin(name, **arguments, dynamic_img_size=True).eval()
    dynamic.load_state_dict(fixed.state_dict())
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(dynamic(x), fixed(x))
    for other in ((64, 64), (32, 96), (96, 32)):
        assert dynamic(torch.randn(2, 3, *other)).isfinite().all()


def test_the_grid_of_a_dynamic_deit_is_that_of_the_image_and_not_a_square():
    """32x128 and 64x64 images have 64 patches each: only their grids differ, and the values with them."""
    model = twin("test_deit_mrla_light", dynamic_img_size=True).eval()
    seen = []
    mixer = model.blocks.get_submodule("0").mrla
    handle = mixer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["grid"]), with_kwargs=True)
    for size in ((64, 64), (32, 128), (128, 32)):
        model(torch.randn(1, 3, *size))
    assert seen == [(8, 8), (4, 16), (16, 4)]
    handle.remove()
    plain = mrla.detach(model)
    assert not plain.patch_embed._forward_hooks


def test_two_threads_with_images_of_different_sizes_cannot_meet():
    from concurrent.futures import ThreadPoolExecutor

    model = twin("test_deit_mrla_base", dynamic_img_size=True).eval()
    images = [torch.randn(1, 3, *size) for size in ((64, 64), (32, 128), (128, 32), (64, 96)) * 4]
    with torch.no_grad():
        expected = [model(x) for x in images]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(torch.no_grad()(model), images))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.unchecked
def test_a_dynamic_deit_compiles_for_images_of_several_sizes():
    model = twin("test_deit_mrla_light", dynamic_img_size=True).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for size in ((64, 64), (32, 96), (96, 32)):
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)


def test_memory_begins_anew_every_four_blocks_in_the_released_base_deit():
    model = timm.create_model("test_deit_mrla_base")
    places = [tuple(block.mrla.place) for block in model.blocks.children()]
    assert places == [(0, 4, 0), (1, 4, 0), (2, 4, 0), (3, 4, 0), (0, 2, 1), (1, 2, 1)]


def test_the_general_form_spares_the_last_block_that_only_feeds_its_class_token():
    plain = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64)
    model = mrla.attach(plain, "base")
    assert [hasattr(block, "mrla") for block in model.blocks.children()] == [True, True, False]
    averaged = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64, global_pool="avg")
    assert all(hasattr(block, "mrla") for block in mrla.attach(averaged, "base").blocks.children())


@pytest.mark.parametrize("method", sweep_but(["light"], ["light", "base", "exact", "dw"]))
@pytest.mark.parametrize(
    "network",
    ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "efficientnet_b0", "pvt_v2_b0"],
)
def test_attach_and_detach_keep_their_promises_on_the_new_families(network, method):
    arguments = {"img_size": 64, "depth": 3} if "patch16" in network else {}
    plain = randomise_norms(timm.create_model(network, num_classes=7, **arguments))
    attached = mrla.attach(copy.deepcopy(plain), method)
    x = image()
    torch.manual_seed(0)  # EfficientNet's stochastic depth
    for training in (True, False):
        assert torch.equal(attached.train(training)(x), plain.train(training)(x))
    missing, unexpected = attached.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".mrla." in key for key in missing)
    restored = mrla.detach(attached)
    assert [(key, type(module)) for key, module in restored.named_modules()] == [
        (key, type(module)) for key, module in plain.named_modules()
    ]
    assert {key: vars(module).keys() for key, module in restored.named_modules()} == {
        key: vars(module).keys() for key, module in plain.named_modules()
    }


def test_se_and_eca_work_together_with_mrla():
    for attn_layer in ("se", "eca"):
        model = twin("test_resnet_bottleneck_mrla_light", block_args={"attn_layer": attn_layer}).eval()
        assert model(image()).isfinite().all()
    with torch.device("meta"):
        squeezed = timm.create_model("resnet50_mrla_light", se=True)
        efficient = timm.create_model("resnet50_mrla_light", eca=(5, 5, 5, 7))
    assert sum(parameter.numel() for parameter in squeezed.parameters()) == 28_253_396
    assert sum(parameter.numel() for parameter in efficient.parameters()) == 25_738_538


def test_se_is_on_the_branch_before_the_add():
    model = twin("test_resnet_bottleneck_mrla_light", eca=(3, 3, 3, 5)).eval()
    block = model.layer2.get_submodule("1")
    seen = []
    block.se.register_forward_hook(lambda _, __, output: seen.append(output.clone()))  # the add is in place
    block.mrla.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model(image())
    branch, (x, shortcut, _) = seen
    torch.testing.assert_close(x, torch.relu(branch + shortcut))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("test_resnet_basic_mrla_light", {"eca": (5, 5)}, "eca gives one odd kernel size for each of the 4 stages"),
        ("test_resnet_basic_mrla_light", {"eca": (5, 5, 5, 4)}, "eca gives one odd kernel size"),
        ("test_resnet_basic_mrla_light", {"eca": (5, 5, 5, 7), "se": True}, "one channel attention"),
        ("test_deit_mrla_base", {"mixer": {"chain_length": 0}}, "chain_length must be at least 1 block"),
        ("test_deit_mrla_light", {"mixer": {"head_dim": 12}}, "head_dim must divide the channels"),
        ("test_pvt_v2_mrla_base", {"init": "zero"}, "init must be one of"),
        ("test_efficientnet_mrla_light", {"mixer": {"heads": 7}}, "heads must divide the channels"),
    ],
)
@pytest.mark.unchecked
def test_bad_arguments_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **arguments)


def test_dropped_patches_leave_no_grid():
    model = timm.create_model("test_deit_mrla_light", patch_drop_rate=0.5).train()
    with pytest.raises(ValueError, match=r"the grid must hold every patch token: got grid=\(8, 8\) for 33 tokens"):
        model(image())
