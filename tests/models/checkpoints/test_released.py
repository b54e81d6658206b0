"""Foreign checkpoints in every container, and those that must be refused; foreign names are made by hand here."""

import argparse
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import randomise_norms, sweep_but
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mrla
from mrla.models.checkpoints.released import REFERENCES, convert, load_reference, translate
from mrla.models.checkpoints.store import load

RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
DEIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
ARCHES = {
    "resnet50_mrlal": ("resnet50_mrla_light", RESNET),
    "resnet101_mrlab": ("resnet101c_mrla_base", RESNET),
    "deit_mrlal_tiny_patch16_224": ("deit_tiny_patch16_224_mrla_light", DEIT),
    "deit_mrlab_small_patch16_224": ("deit_small_patch16_224_mrla_base", DEIT),
    "paddle_resnet18_mrla": ("resnet18_cifar_mrla_light", RESNET),
    "paddle_resnext50_32x4d_mrla": ("resnext50_32x4d_cifar_mrla_light", {**RESNET, "cardinality": 4, "base_width": 32}),
    "paddle_resnet18": ("resnet18_cifar", RESNET),
}
# One of each kind of names: released, transformers, Paddle's.
USUAL = ("resnet50_mrlal", "deit_mrlab_small_patch16_224", "paddle_resnet18_mrla")
KINDS = ["mapping", "entry", ".pth", ".pth.tar", "deit.pth", ".safetensors", ".pdparams"]


def network(arch: str, classes: int = 7, **arguments) -> nn.Module:
    name, sizes = ARCHES[arch]
    model = randomise_norms(timm.create_model(name, num_classes=classes, **{**sizes, **arguments})).eval()
    for name, parameter in model.named_parameters():
        if name.startswith(("head.", "pos_embed", "cls_token")):
            nn.init.normal_(parameter, std=0.5)  # where timm starts at zero, nothing would be seen
    return model


def loaded(arch: str, checkpoint, **overrides) -> nn.Module:
    return load_reference(arch, checkpoint, **{**ARCHES[arch][1], **overrides})


def foreign(arch: str, model: nn.Module) -> dict[str, Tensor]:
    """The network's weights as its own code saves them."""
    state = {}
    for name, tensor in model.state_dict().items():
        paddle, base, deit = arch.startswith("paddle"), "mrlab" in arch, "deit" in arch
        tensor = tensor.clone()
        if paddle and name.endswith("num_batches_tracked"):
            continue
        path, _, leaf = name.rpartition(".")
        if path.endswith(".mrla") and leaf in ("query_weight", "key_weight", "value_weight"):
            layer = f"mla.conv{leaf[0]}" if paddle else f"mrla.W{leaf[0]}"
            name = f"{path}.{layer}.weight"
        elif path.endswith(".mrla") and leaf == "decay":
            name = f"{path}.lambda_t"
            tensor = tensor if deit else tensor.reshape((1, -1, 1, 1) if paddle else (-1, 1, 1))
        elif path.endswith(".mrla.input_norm"):
            name = name.replace("input_norm", "normx")
        elif path.endswith(".mrla.shortcut_norm"):
            name = name.replace("shortcut_norm", "normo")
        elif path.endswith(".mrla.norm"):
            name = name.replace(".mrla.norm.", ".mrla_bn." if paddle else ".bn_mrla.")
        elif re.search(r"\.se\.fc[12]$", path):
            name, tensor = f"{path[:-1]}.{(int(path[-1]) - 1) * 2}.weight", tensor.flatten(1)
        elif path.endswith(".se.conv"):
            name = name.replace(".se.", ".eca.")
        if paddle:
            name = name.replace("running_mean", "_mean").replace("running_var", "_variance")
            tensor = tensor.T.contiguous() if name == "fc.weight" else tensor
        if base and name.startswith("layer"):
            name = f"stages.{int(name[5]) - 1}{name[6:]}"
        state[name] = tensor
    return state


def contained(kind: str, weights: dict[str, Tensor], folder: Path) -> Any:
    """The weights in a container of this kind: a mapping, or the path of a file in `folder`."""
    parallel = {f"module.{name}": tensor for name, tensor in weights.items()}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    path = folder / (kind if kind == "deit.pth" else f"net{kind}")
    if kind == "mapping":
        return weights
    if kind == "entry":
        return {"epoch": 3, "state_dict": parallel}
    if kind == ".pth":
        torch.save(weights, path)
    elif kind == ".pth.tar":
        torch.save({"epoch": 3, "state_dict": parallel, "best_acc1": torch.tensor(0.1), "optimizer": optimizer}, path)
    elif kind == "deit.pth":
        arguments = argparse.Namespace(lr=5e-4, model="deit", input_size=224)
        torch.save({"model": weights, "optimizer": optimizer, "epoch": 299, "args": arguments}, path)
    elif kind == ".safetensors":
        save_file(weights, path)
    else:
        arrays = {name: tensor.numpy() for name, tensor in weights.items()}
        table = {"StructuredToParameterName@@": {name: f"conv2d_{at}.w_0" for at, name in enumerate(weights)}}
        path.write_bytes(pickle.dumps({**arrays, **table}, protocol=4))
    return path


def refused(arch: str, checkpoint, pattern: str, **overrides) -> str:
    with pytest.raises(ValueError, match=pattern) as caught:
        loaded(arch, checkpoint, **overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("arch", sweep_but(USUAL, ARCHES))
def test_every_container_gives_the_same_logits(arch, tmp_path):
    model = network(arch)
    weights = foreign(arch, model)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    assert expected.std(0).min() > 1e-4  # the images are told apart
    for kind in KINDS:
        found = loaded(arch, contained(kind, weights, tmp_path))
        assert not found.training
        assert found.num_classes == 7
        assert torch.equal(found(x), expected), kind


@pytest.mark.parametrize("arch", sweep_but(USUAL, ARCHES))
def test_the_foreign_names_made_here_are_foreign(arch):
    model = network(arch)
    theirs, own = foreign(arch, model), model.state_dict()
    assert len(theirs) >= len(own) - sum("num_batches" in name for name in own)
    if arch != "paddle_resnet18":
        assert any(name.endswith("lambda_t") for name in theirs) != ("mrlab" in arch)
        assert not any(word in name for name in theirs for word in ("query_weight", "value_weight", "mrla.norm."))


def test_a_square_paddle_head_is_transposed_all_the_same():
    """Classes equal to features: the shape does not say that Paddle stores [in, out]."""
    arch = "paddle_resnet18"
    model = network(arch, classes=16)
    assert model.fc.weight.shape == (16, 16)
    weights = foreign(arch, model)
    assert not torch.equal(weights["fc.weight"], model.fc.weight)
    x = torch.randn(2, 3, 32, 32)
    found = loaded(arch, weights)
    assert torch.equal(found(x), model(x))
    assert found.fc.weight.is_contiguous()


@pytest.mark.parametrize("arch", ["resnet50_mrlal", "deit_mrlab_small_patch16_224", "paddle_resnet18_mrla"])
def test_the_number_of_classes_is_the_heads_and_another_is_refused(arch):
    weights = foreign(arch, network(arch, classes=3))
    assert loaded(arch, weights).num_classes == 3
    assert loaded(arch, weights, num_classes=3)(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    pattern = rf"the checkpoint of {arch} has 3 classes: got num_classes=10; load it without, then call reset_class"
    refused(arch, weights, pattern, num_classes=10)
    refused(arch, weights, "has 3 classes: got num_classes=0", num_classes=0)


def test_an_unknown_architecture_is_refused_with_a_near_name():
    for arch, near in (("resnet50_mrla", "resnet50_mrlal"), ("paddle_resnet_18_mrla", "paddle_resnet18_mrla")):
        with pytest.raises(ValueError, match=rf"arch must be one of .* got '{arch}'; did you mean '{near}'\?$"):
            load_reference(arch, {"w": torch.ones(1)})
    with pytest.raises(ValueError, match=r"got 'convmixer_1536'$"):
        load_reference("convmixer_1536", "/nowhere.pth")


def test_every_documented_architecture_is_known_and_builds_its_twin():
    networks = {
        **{f"resnet{depth}_mrlal": f"resnet{depth}_mrla_light" for depth in (50, 101)},
        **{f"resnet{depth}_mrlab": f"resnet{depth}c_mrla_base" for depth in (50, 101)},
        **{f"paddle_resnet{depth}_mrla": f"resnet{depth}_cifar_mrla_light" for depth in (18, 34, 50, 101, 152)},
        "paddle_resnext50_32x4d_mrla": "resnext50_32x4d_cifar_mrla_light",
        "paddle_wide_resnet50_2_mrla": "wide_resnet50_2_cifar_mrla_light",
        "paddle_resnet18": "resnet18_cifar",
    }
    for size in ("tiny", "small", "base"):
        networks[f"deit_mrlal_{size}_patch16_224"] = f"deit_{size}_patch16_224_mrla_light"
        networks[f"deit_mrlab_{size}_patch16_224"] = f"deit_{size}_patch16_224_mrla_base"
    assert {arch: reference.network for arch, reference in REFERENCES.items()} == networks


def test_the_layer_attention_of_the_older_released_file_is_renamed():
    """No network of the table has it; the golden blocks do."""
    theirs = {
        f"layer1.0.la.W{letter}.weight": torch.full((1, 1, 3), float(at)) for at, letter in enumerate("qkv", start=1)
    }
    theirs["layer1.0.bn_la.weight"] = torch.full((4,), 4.0)
    ours = translate(theirs, REFERENCES["resnet50_mrlal"].names)
    names = ("query_weight", "key_weight", "value_weight", "norm.weight")
    assert [(name, tensor.mean().item()) for name, tensor in ours.items()] == [
        (f"layer1.0.mrla.{name}", at) for at, name in enumerate(names, start=1)
    ]


def listed(message: str) -> list[str]:
    (inside,) = re.findall(r"\(\d+ differences: (.*)\)", message)
    return inside.split("; ")


@pytest.mark.parametrize(
    ("source", "arch", "sizes", "first"),
    [
        ("resnet101_mrlab", "resnet50_mrlal", RESNET, "conv1.weight is missing"),
        ("resnet50_mrlal", "resnet101_mrlab", RESNET, "layer1.0.conv1.weight is no name of that code"),
        ("paddle_resnext50_32x4d_mrla", "paddle_resnet18", RESNET, "layer1.0.bn3.weight is not in the network"),
        ("paddle_resnet18", "paddle_resnet18_mrla", RESNET, "layer1.0.mrla.query_weight is missing"),
        ("paddle_resnet18_mrla", "paddle_resnet18", RESNET, "layer1.0.mrla.decay is not in the network"),
        ("deit_mrlab_small_patch16_224", "deit_mrlal_tiny_patch16_224", DEIT, "blocks.0.mrla.decay is missing"),
        ("paddle_resnet18", "deit_mrlal_tiny_patch16_224", DEIT, "cls_token is missing"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused_with_five_differences(source, arch, sizes, first):
    weights = foreign(source, network(source))
    message = refused(arch, weights, rf"^the checkpoint is not one of {arch} \(\d+ differences: ", **sizes)
    differences = listed(message)
    assert len(differences) == 5
    assert first in differences
    assert message.endswith("; name the architecture that it was saved from")


@pytest.mark.sweep
def test_full_size_checkpoints_of_other_networks_are_refused():
    with torch.device("meta"):
        plain = timm.create_model("resnet50", num_classes=10).state_dict()
    plain = {name: torch.zeros(tensor.shape) for name, tensor in plain.items()}
    with pytest.raises(ValueError, match=r"the checkpoint is not one of resnet50_mrlal \(\d+ diff") as caught:
        load_reference("resnet50_mrlal", plain)
    assert len(listed(str(caught.value))) == 5
    assert all("mrla" in difference and difference.endswith("missing") for difference in listed(str(caught.value)))
    with pytest.raises(
        ValueError, match=r"\(1 differences: conv1\.weight is \(64, 3\), the network's is \(64, 3, 7, 7\)\)"
    ):
        load_reference("resnet50_mrlal", {**foreign("resnet50_mrlal", _light50()), "conv1.weight": torch.ones(64, 3)})


def _light50() -> nn.Module:
    return timm.create_model("resnet50_mrla_light", num_classes=10)


@pytest.mark.parametrize("arch", ["resnet50_mrlal", "resnet101_mrlab"])
@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ({"se": True}, "; it has squeeze-and-excitation: pass se=True"),
        ({"eca": (3, 3, 5, 5)}, "; it has efficient channel attention: pass eca=(5, 5, 5, 7) or its kernel sizes"),
    ],
    ids=["se", "eca"],
)
def test_channel_attention_must_be_asked_for(arch, option, hint):
    model = network(arch, **option)
    weights = foreign(arch, model)
    theirs = ".se.fc.2.weight" if "se" in option else ".eca.conv.weight"
    assert sum(name.endswith(theirs) for name in weights) == 4
    assert refused(arch, weights, "differences").endswith(hint)
    x = torch.randn(2, 3, 32, 32)
    found = loaded(arch, weights, **option)
    assert torch.equal(found(x), model(x))
    without = foreign(arch, network(arch))
    assert refused(arch, without, "differences", **option).endswith("; name the architecture that it was saved from")


@pytest.mark.parametrize("arch", [arch for arch in ARCHES if arch.startswith("deit")])
@pytest.mark.parametrize("size", [64, (48, 32), 16])
def test_another_image_size_resamples_the_position_embedding(arch, size):
    model = network(arch)
    weights = foreign(arch, model)
    height, width = size if isinstance(size, tuple) else (size, size)
    found = loaded(arch, weights, img_size=size)
    assert found.pos_embed.shape == (1, 1 + height // 8 * width // 8, 32)
    assert torch.equal(found.pos_embed[:, :1], model.pos_embed[:, :1])
    assert found(torch.randn(1, 3, height, width)).isfinite().all()
    patches = model.pos_embed[:, 1:].detach().transpose(1, 2).unflatten(2, (4, 4))
    grid = (height // 8, width // 8)
    expected = nn.functional.interpolate(patches, grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.pos_embed[:, 1:].detach(), expected)
    same = loaded(arch, weights, img_size=32)
    assert torch.equal(same.pos_embed, model.pos_embed)


def test_another_number_of_patches_is_refused_where_no_image_size_is_given():
    arch = "deit_mrlal_tiny_patch16_224"
    weights = foreign(arch, network(arch))
    sizes = {name: value for name, value in DEIT.items() if name != "img_size"}
    with pytest.raises(ValueError, match=r"1 differences: pos_embed is \(1, 17, 32\), the network's is \(1, 785, 32\)"):
        load_reference(arch, weights, **sizes)


def test_an_image_size_does_not_hide_another_width():
    arch = "deit_mrlal_tiny_patch16_224"
    weights = foreign(arch, network(arch))
    message = refused(arch, weights, r"not one of deit_mrlal_tiny_patch16_224 \(", img_size=64, embed_dim=64)
    assert "pos_embed is (1, 17, 32), the network's is (1, 65, 64)" in message


def test_an_argument_that_the_network_does_not_take_is_refused():
    weights = foreign("paddle_resnet18", network("paddle_resnet18"))
    refused("paddle_resnet18", weights, "paddle_resnet18 cannot be built with .*'img_size'", img_size=64)


@pytest.mark.parametrize("arch", ["resnet50_mrlal", "deit_mrlal_tiny_patch16_224", "paddle_resnet18_mrla"])
@pytest.mark.parametrize("kind", [".pth", ".safetensors", ".pdparams"])
def test_half_precision_weights_are_read_as_the_networks_float32(arch, kind, tmp_path):
    model = network(arch).half()
    weights = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in _items(arch, model)}
    found = loaded(arch, contained(kind, weights, tmp_path))
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(found(x), model.float()(x))


def _items(arch: str, model: nn.Module):
    return foreign(arch, model).items()


@pytest.mark.parametrize("arch", ["resnet50_mrlal", "resnet101_mrlab"])
def test_counts_of_batches_may_be_missing(arch):
    model = network(arch)
    weights = foreign(arch, model)
    fewer = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    assert len(fewer) < len(weights)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(arch, fewer)(x), model(x))


def test_statistics_may_not_be_missing():
    weights = foreign("resnet50_mrlal", network("resnet50_mrlal"))
    del weights["layer3.0.bn_mrla.running_var"]
    refused("resnet50_mrlal", weights, r"\(1 differences: layer3\.0\.mrla\.norm\.running_var is missing\)")


@pytest.mark.parametrize("arch", sweep_but(USUAL, ARCHES))
def test_a_key_that_is_left_over_is_refused_and_named(arch):
    weights = {**foreign(arch, network(arch)), "ema.decay": torch.tensor(0.9)}
    refused(arch, weights, rf"not one of {arch} \(1 differences: ema\.decay is not in the network\)")


@pytest.mark.parametrize("arch", sweep_but(USUAL, ARCHES))
@pytest.mark.parametrize("kind", ["mapping", "entry"])
def test_the_given_mapping_is_not_changed_and_shares_no_memory_with_the_network(arch, kind, tmp_path):
    checkpoint = contained(kind, foreign(arch, network(arch)), tmp_path)
    inner = checkpoint["state_dict"] if kind == "entry" else checkpoint
    before = {name: (id(tensor), tensor.clone()) for name, tensor in inner.items()}
    found = loaded(arch, checkpoint, **({"img_size": 64} if "deit" in arch else {}))
    with torch.no_grad():
        for tensor in found.state_dict().values():
            tensor.zero_()
    assert list(inner) == list(before)
    for name, tensor in inner.items():
        assert id(tensor) == before[name][0]
        assert torch.equal(tensor, before[name][1])


@pytest.mark.parametrize("arch", sweep_but(USUAL, ARCHES))
def test_a_converted_file_is_read_by_timm(arch, tmp_path):
    model = network(arch)
    source = contained(".pdparams" if arch.startswith("paddle") else ".pth.tar", foreign(arch, model), tmp_path)
    name, sizes = ARCHES[arch]
    target = tmp_path / "deeper" / "net.safetensors"
    converted = convert(source, target, arch, **sizes)
    read = timm.create_model(name, num_classes=7, checkpoint_path=str(target), **sizes).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(read(x), model(x))
    assert torch.equal(converted(x), model(x))
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert metadata["architecture"] == name
    # What is written beside the name is enough to build the network again.
    again = timm.create_model(metadata["architecture"], **json.loads(metadata["model_args"])).eval()
    again.load_state_dict(load_file(target))
    assert torch.equal(again(x), model(x))
    assert list(target.parent.iterdir()) == [target]
    assert load_file(target).keys() == model.state_dict().keys()


@pytest.mark.parametrize("arch", ["paddle_resnet18_mrla", "deit_mrlab_small_patch16_224"])
def test_a_folder_is_one_of_save(arch, tmp_path):
    model = network(arch)
    source = contained(".pdparams" if arch.startswith("paddle") else ".pth.tar", foreign(arch, model), tmp_path)
    folder = tmp_path / "deeper" / "net"
    convert(source, folder, arch, **ARCHES[arch][1])
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(folder)(x), model(x))
    with pytest.raises(ValueError, match="the folder to write must be new or empty"):
        convert(source, folder, arch, **ARCHES[arch][1])
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json"}


def test_options_that_no_weight_shows_may_be_given():
    # The first block of a stage asks itself alone; each stage is wider than the one before, as released.
    deeper = {"layers": (2, 2, 2, 2), "channels": (8, 16, 24, 32)}
    state = foreign("resnet101_mrlab", network("resnet101_mrlab", **deeper))
    plain, narrow = (load_reference("resnet101_mrlab", state, **deeper, mixer=one) for one in (None, {"head_dim": 1}))
    dilated = load_reference("resnet101_mrlab", state, **deeper, output_stride=8)
    x = torch.randn(1, 3, 64, 64)
    assert not torch.equal(plain(x), narrow(x))
    assert dilated.forward_features(x).shape[-1] == 4 * plain.forward_features(x).shape[-1]


@pytest.mark.parametrize("target", ["net.pth", "net.safetensors.tmp", "net.SAFETENSORS"])
def test_a_target_of_another_kind_is_refused(target, tmp_path):
    with pytest.raises(ValueError, match=r"is a \.safetensors file, or a folder without an ending: got .*net"):
        convert(tmp_path / "missing.pth", tmp_path / target, "resnet50_mrlal")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", ["missing", "truncated", "other", "payload"])
def test_a_bad_checkpoint_leaves_nothing_of_the_target(bad, tmp_path):
    folder, mark = tmp_path / "out", tmp_path / "mark"
    folder.mkdir()
    source = tmp_path / "net.pth"
    torch.save(foreign("resnet101_mrlab", network("resnet101_mrlab")), source)
    if bad == "missing":
        source.unlink()
    elif bad == "truncated":
        source.write_bytes(source.read_bytes()[:-1000])
    elif bad == "payload":
        torch.save({"state_dict": Payload(mark)}, source)
    with pytest.raises(ValueError, match=re.escape(str(source)) if bad != "other" else "not one of resnet50_mrlal"):
        convert(source, folder / "net.safetensors", "resnet50_mrlal", **RESNET)
    assert list(folder.iterdir()) == []
    assert not mark.exists()


def test_a_bad_checkpoint_leaves_the_file_that_was_there(tmp_path):
    target = tmp_path / "net.safetensors"
    target.write_bytes(b"old")
    with pytest.raises(ValueError, match="cannot be read"):
        convert(tmp_path / "missing.pth", target, "resnet50_mrlal")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


class Payload:
    """Pickles as a command that makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize(
    ("arch", "suffix"),
    [("resnet50_mrlal", ".pth"), ("resnet50_mrlal", ".pth.tar"), ("paddle_resnet18_mrla", ".pdparams")],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_file_is_refused_and_its_code_not_run(arch, suffix, legacy, tmp_path):
    mark, path = tmp_path / "mark", tmp_path / f"net{suffix}"
    weights = foreign(arch, network(arch))
    if suffix == ".pdparams":
        arrays = {name: tensor.numpy() for name, tensor in weights.items()}
        path.write_bytes(pickle.dumps({**arrays, "extra": Payload(mark)}, protocol=2 if legacy else 4))
    else:
        content = {"state_dict": weights, "extra": Payload(mark)}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    refused(arch, path, r"system")
    assert not mark.exists()
    os.system(f"touch {mark}")  # the payload does what it says where it is run
    assert mark.exists()


@pytest.mark.parametrize("kind", [".pth", ".pth.tar", ".safetensors", ".pdparams"])
def test_a_truncated_file_is_refused(kind, tmp_path):
    arch = "paddle_resnet18_mrla" if kind == ".pdparams" else "resnet50_mrlal"
    path = contained(kind, foreign(arch, network(arch)), tmp_path)
    whole = path.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 100, 0):
        path.write_bytes(whole[:kept])
        refused(arch, path, rf"^{re.escape(str(path))} is (damaged|empty)")


def test_the_door_has_both(tmp_path):
    assert mrla.load_reference is load_reference
    arrays = {name: np.asarray(tensor) for name, tensor in _items("paddle_resnet18", network("paddle_resnet18"))}
    assert mrla.load_reference("paddle_resnet18", arrays, **RESNET).num_classes == 7


@pytest.mark.parametrize("arch", ["resnet50_mrlal", "paddle_resnet18_mrla", "paddle_resnet18"])
def test_our_own_names_are_not_the_foreign_codes(arch):
    """A converted file that is given once more would have its square Paddle head transposed again, in silence."""
    ours = network(arch).state_dict()
    with pytest.raises(ValueError, match=r"is not one of .* differences: .* is no name of that code"):
        loaded(arch, ours)


def test_two_names_for_one_are_refused():
    model = network("resnet50_mrlal")
    weights = foreign("resnet50_mrlal", model)
    weights["layer1.0.mrla.norm.weight"] = torch.zeros_like(weights["layer1.0.bn_mrla.weight"])
    with pytest.raises(ValueError, match=r"two names of the checkpoint stand for layer1\.0\.mrla\.norm\.weight"):
        loaded("resnet50_mrlal", weights)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pretrained": True}, "the weights are the checkpoint's: got pretrained too"),
        ({"checkpoint_path": "/nowhere"}, "the weights are the checkpoint's: got checkpoint_path too"),
        ({"layers": (1,)}, "cannot be built with"),
    ],
)
def test_overrides_that_make_no_network_are_refused(overrides, message):
    weights = foreign("paddle_resnet18", network("paddle_resnet18"))
    with pytest.raises(ValueError, match=message):
        load_reference("paddle_resnet18", weights, **overrides)


def test_the_global_random_state_is_left_alone():
    weights = foreign("paddle_resnet18", network("paddle_resnet18"))
    before = torch.get_rng_state()
    loaded("paddle_resnet18", weights)
    assert torch.equal(torch.get_rng_state(), before)
