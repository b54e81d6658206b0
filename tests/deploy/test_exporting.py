"""Exported files say what their network says, tell of themselves, and are refused, or caught, where they do not."""

import json
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from conftest import randomise_norms, sweep_but
from onnx import numpy_helper
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import mrla
from mrla.deploy import ExportMismatch, check_export, export, exporting, get_format, open_exported
from mrla.deploy.export_check import random_image, ready_copy
from mrla.deploy.first_difference import first_difference
from mrla.deploy.formats import contract

NAMES = [f"kind {index}" for index in range(7)]
SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2", "openvino": ".xml"}
OPEN = ("batch", "height", "width")
SIZE = (3, 64, 64)


def plain() -> nn.Module:
    """Two residual blocks between a stem and a classifier."""
    torch.manual_seed(0)
    blocks = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
    layers = {"conv1": nn.Conv2d(3, 8, 3, stride=2, bias=False), "bn1": nn.BatchNorm2d(8), "act": nn.ReLU()}
    layers |= {"blocks": blocks, "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(8, 7)}
    return nn.Sequential(OrderedDict(layers)).eval()


def randomized(model: nn.Module) -> nn.Module:
    """Every mixer and norm with numbers, so that each of them can be heard in the output."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".mrla." in f".{name}":
            nn.init.normal_(parameter, std=0.3)
    return randomise_norms(model).eval()


def small(method: str = "light") -> nn.Module:
    return randomized(mrla.attach(plain(), method, example=(2, *SIZE)))


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=32, num_heads=2, num_classes=7)


def toy(middle: nn.Module | None = None) -> nn.Module:
    layers = {"stem": nn.Conv2d(3, 4, 3), "middle": middle or nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1)}
    return nn.Sequential(OrderedDict({**layers, "flat": nn.Flatten()})).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """One network in every format."""
    folder, model = tmp_path_factory.mktemp("exported"), small()
    options = {"input_size": SIZE, "class_names": NAMES}
    return {
        format: export(model, folder / f"net{suffix}", format=format, **options).path  # type: ignore[arg-type]
        for format, suffix in SUFFIXES.items()
    }


# What is written.


@pytest.mark.parametrize("format", SUFFIXES)
def test_a_file_says_what_its_network_says(format, files):
    exported, model = open_exported(files[format], threads=1), small()
    assert exported.facts.dynamic == OPEN
    for shape in ((1, *SIZE), (5, 3, 40, 72)):
        image = torch.randn(shape)
        with torch.inference_mode():
            expected = model(image)
        found = exported(image)
        assert isinstance(found, Tensor)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    compared = check_export(files[format], model)
    assert [one.shape for one in compared] == [(1, 3, 64, 64), (2, 3, 96, 64), (3, 3, 64, 128)]
    assert max(one.difference for one in compared) < 1e-5
    assert (
        first_difference(files[format], get_format(format)(), ready_copy(model), random_image((1, *SIZE)), 1e-4) is None
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...] | None, bool]] = {
    "base": (lambda: small("base"), "onnx", SIZE, True),
    "exact": (lambda: small("exact"), "onnx", SIZE, True),
    "dw": (lambda: small("dw"), "onnx", SIZE, True),
    "base of openvino": (lambda: small("base"), "openvino", SIZE, True),
    "transformer": (lambda: randomized(mrla.attach(vit(), "base")), "onnx", None, False),
    "named": (lambda: randomized(timm.create_model("test_deit_mrla_light")), "torch_export", None, False),
    "torchvision": (
        lambda: randomized(mrla.attach(ResNet(BasicBlock, [2, 1, 1, 1]), "dw")),
        "torch_export",
        SIZE,
        True,
    ),
}


@pytest.mark.parametrize("case", sweep_but(("base",), NETWORKS))
def test_every_method_and_kind_of_network_is_exported(case, tmp_path):
    make, format, input_size, is_open = NETWORKS[case]
    model = make()
    made = export(model, tmp_path / f"net{SUFFIXES[format]}", format=format, input_size=input_size)
    assert made.facts.dynamic == (OPEN if is_open else ("batch",))
    assert (made.fixed_because is None) == is_open
    assert made.difference < 1e-5
    assert sorted(file.name for file in tmp_path.iterdir()) == (
        ["net.bin", "net.xml"] if format == "openvino" else [f"net{SUFFIXES[format]}"]
    )
    # No layer of a good file is said to differ.
    image = random_image((1, *made.facts.input_size))
    assert first_difference(made.path, get_format(format)(), ready_copy(model), image, 1e-4) is None


@pytest.mark.parametrize("make", [plain, vit])
def test_sizes_are_open_where_they_are_without_mixers(make, tmp_path):
    without = export(make(), tmp_path / "plain.pt2", format="torch_export", example=(1, *SIZE))
    model = mrla.attach(make(), example=(2, *SIZE))
    attached = export(model, tmp_path / "net.pt2", format="torch_export", example=(1, *SIZE))
    assert attached.facts.dynamic == without.facts.dynamic == (OPEN if make is plain else ("batch",))


def test_a_size_is_fixed_on_request(tmp_path):
    made = export(toy(), tmp_path / "net.pt2", format="torch_export", input_size=SIZE, dynamic_size=False)
    assert made.facts.dynamic == ("batch",)
    assert [one.shape for one in made.compared] == [(1, *SIZE), (2, *SIZE), (3, *SIZE)]


def test_norms_are_folded_where_asked(tmp_path):
    sizes = {}
    for fuse in (False, True):
        made = export(small(), tmp_path / f"{fuse}.pt2", format="torch_export", input_size=SIZE, fuse=fuse)
        graph = torch.export.load(made.path).graph
        sizes[fuse] = len([node for node in graph.nodes if "batch_norm" in str(node.target)])
        assert made.difference < 1e-5
    assert sizes[True] < sizes[False]


def test_torchs_file_holds_torchs_operators_alone(files):
    graph = torch.export.load(files["torch_export"]).graph
    used = {node.target.namespace for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert used == {"aten"}


def test_an_onnx_file_names_what_it_takes_and_gives(files):
    content = onnx.load(files["onnx"])
    (given,), (taken,) = content.graph.output, content.graph.input
    assert (taken.name, given.name) == ("images", "logits")
    assert [size.dim_param or size.dim_value for size in taken.type.tensor_type.shape.dim] == ["batch", 3, *OPEN[1:]]
    assert [size.dim_param or size.dim_value for size in given.type.tensor_type.shape.dim] == ["batch", 7]


def test_several_outputs(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = toy()

        def forward(self, x):
            return {"a": self.body(x), "b": [self.body(2 * x)]}

    made = export(Two(), tmp_path / "net.onnx", input_size=(3, 16, 16))
    found = open_exported(made.path)(torch.randn(4, 3, 20, 16))
    assert [tuple(value.shape) for value in found] == [(4, 4), (4, 4)]


def test_the_network_stays_as_it_was(tmp_path):
    model = small().train()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    export(model, tmp_path / "net.pt2", format="torch_export", input_size=SIZE, fuse=True)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


# What it tells of itself.


@pytest.mark.parametrize("format", SUFFIXES)
def test_facts_travel_inside(format, files, tmp_path):
    moved = tmp_path / f"other{SUFFIXES[format]}"
    for file in files[format].parent.glob(f"{files[format].stem}.*"):
        if file.suffix in (moved.suffix, ".bin"):
            moved.with_suffix(file.suffix).write_bytes(file.read_bytes())
    facts = open_exported(moved).facts
    assert facts.class_names == tuple(NAMES)
    assert facts.input_size == SIZE
    assert facts.mean == pytest.approx((0.485, 0.456, 0.406))
    assert facts.std == pytest.approx((0.229, 0.224, 0.225))
    assert (facts.crop_mode, facts.interpolation) == ("center", "bicubic")


def test_what_a_saved_network_knows_is_taken_and_what_is_given_counts_more(tmp_path):
    names = ["ä <b>", 'a "b"', "c\nd"]
    model = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8,) * 4, num_classes=3)
    mrla.save(model, tmp_path / "saved", class_names=names, input_size=(3, 48, 40), mean=[0.1, 0.2, 0.3], std=[0.4] * 3)
    loaded, options = mrla.load(tmp_path / "saved"), {"format": "torch_export"}
    facts = export(loaded, tmp_path / "a.pt2", **options).facts
    assert (facts.class_names, facts.input_size) == (tuple(names), (3, 48, 40))
    assert (facts.mean, facts.std) == ((0.1, 0.2, 0.3), (0.4, 0.4, 0.4))
    assert facts == open_exported(tmp_path / "a.pt2").facts
    given = {"class_names": [], "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 0.5, "interpolation": "nearest"}
    facts = export(loaded, tmp_path / "b.pt2", **options, **given).facts
    assert (facts.class_names, facts.mean, facts.std) == (None, (0.0,) * 3, (1.0,) * 3)
    assert (facts.crop_pct, facts.interpolation) == (0.5, "nearest")


# A file that says something else.


def tamper_onnx(file: Path, name: str, by: float) -> None:
    content = onnx.load(file)
    stored = {one.name: one for one in content.graph.initializer}
    # Where the exporter has folded a norm into a weight, it adds to its name.
    weight = stored.get(name) or next(one for other, one in stored.items() if other.startswith(name))
    changed = numpy_helper.to_array(weight) * np.float32(by)
    weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    onnx.save(content, file)


@pytest.mark.parametrize(
    ("weight", "layer"),
    [  # the exporter folds a norm into the convolution before it, and calls what comes out by the norm
        ("conv1.weight", "bn1"),
        ("blocks.1.conv1.weight", "blocks.1.bn1"),
        ("blocks.0.mrla.value", "blocks.0.mrla"),
        ("fc.weight", "fc"),
    ],
)
def test_a_changed_weight_in_an_onnx_file_is_caught_and_named(weight, layer, files, tmp_path):
    file = tmp_path / "net.onnx"
    file.write_bytes(files["onnx"].read_bytes())
    tamper_onnx(file, weight, 1.5)
    with pytest.raises(ExportMismatch, match=r"differs by .* the first layer that differs is ") as caught:
        check_export(file, small())
    assert caught.value.layer == layer
    assert len(caught.value.compared) == 3


@pytest.mark.parametrize(
    ("weight", "layer"),
    [
        pytest.param("blocks.0.conv1.weight", "blocks.0.conv1", marks=pytest.mark.sweep),
        pytest.param("blocks.0.bn2.running_mean", "blocks.0.bn2", marks=pytest.mark.sweep),
        ("blocks.1.mrla.decay", "blocks.1.mrla"),
    ],
)
def test_a_changed_weight_in_a_file_of_torchs_is_caught_and_named(weight, layer, files, tmp_path):
    program = torch.export.load(files["torch_export"])
    program.state_dict[weight].data.mul_(1.5)
    facts = open_exported(files["torch_export"]).facts
    torch.export.save(program, tmp_path / "net.pt2", extra_files={"mrla.json": facts.to_json()})
    with pytest.raises(ExportMismatch) as caught:
        check_export(tmp_path / "net.pt2", small())
    assert caught.value.layer == layer


def test_a_changed_weight_in_openvinos_file_is_caught(files, tmp_path):
    for suffix in (".xml", ".bin"):
        content = bytearray(files["openvino"].with_suffix(suffix).read_bytes())
        if suffix == ".bin":
            weights = torch.frombuffer(content, dtype=torch.float32, count=200)  # of the first convolution
            weights.mul_(1.1)
        (tmp_path / f"net{suffix}").write_bytes(content)
    with pytest.raises(ExportMismatch, match="not looked for in files of openvino"):
        check_export(tmp_path / "net.xml", small())


def test_another_network_is_caught(files):
    with pytest.raises(ExportMismatch, match="differs by inf"):
        check_export(files["torch_export"], toy())


@pytest.mark.parametrize("format", SUFFIXES)
def test_a_file_that_differs_keeps_another_name(format, tmp_path, monkeypatch):
    def wrong(eager: nn.Module, *args: object, **options: object) -> nn.Module:
        model = ready_copy(eager)
        model.stem.weight.data[0] += 0.01
        return model

    path = tmp_path / f"net{SUFFIXES[format]}"
    path.write_text("what was there")
    monkeypatch.setattr(exporting, "_prepared", wrong)
    with pytest.raises(ExportMismatch, match=r"net\.\w+ differs by .*it is kept as .*\.failed") as caught:
        export(toy(), path, format=format, input_size=(3, 16, 16), overwrite=True)
    failed = tmp_path / f"{path.name}.failed"
    assert caught.value.path == failed
    assert caught.value.layer == (None if format == "openvino" else "stem")
    assert failed.is_file()
    assert path.read_text() == "what was there"
    assert all(file.suffix == ".failed" or file == path for file in tmp_path.iterdir())


def test_a_tolerance_may_be_given(tmp_path, files):
    file = tmp_path / "net.onnx"
    file.write_bytes(files["onnx"].read_bytes())
    tamper_onnx(file, "fc.weight", 1.001)
    with pytest.raises(ExportMismatch):
        check_export(file, small())
    assert max(one.difference for one in check_export(file, small(), tolerance=0.1)) > 1e-4


# What is refused.


class BesselI0e(nn.Module):
    def forward(self, x):
        return torch.special.i0e(x)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1, *x.shape[2:])


@torch.library.custom_op("mrla_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Twice(nn.Module):
    def forward(self, x):
        return twice(x)


@pytest.mark.parametrize(
    ("format", "middle", "operator"),
    [
        ("onnx", BesselI0e, r"onnx has no operator prims.bessel_i0e"),
        ("onnx", Twice, r"onnx has no operator mrla_tests.twice"),
        ("openvino", BesselI0e, r"openvino has no operator aten.special_i0e"),
        ("torch_export", Twice, r"torch_export has no operator mrla_tests.twice"),
    ],
)
def test_an_operator_that_the_format_lacks_is_named_with_its_module(format, middle, operator, tmp_path):
    model = toy(nn.Sequential(nn.ReLU(), middle()))
    with pytest.raises(ValueError, match=rf"{operator}.*: it comes from 'middle\.1'; .* choose another format"):
        export(model, tmp_path / f"net{SUFFIXES[format]}", format=format, input_size=(3, 16, 16))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("middle", [Branching, FixedBatch])
def test_what_torch_cannot_follow_is_named(middle, tmp_path):
    with pytest.raises(ValueError, match="must be able to follow a network" if middle is Branching else "does not"):
        export(toy(nn.Sequential(middle())), tmp_path / "net.onnx", input_size=(3, 16, 16))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": "tflite"},
            r"format must be one of onnx, torch_export, openvino, or .* --plugins FILE.py: got 'tflite'",
        ),
        ({"format": "openvino"}, r"must end in \.xml: got .*net\.onnx.*or pass format='onnx'"),
        ({"tolerance": 0.0}, r"tolerance must be above 0"),
        ({"class_names": NAMES}, r"class_names must name each of the network's 4 outputs: got 7"),
        ({"mean": (0.5,)}, r"mean must have one number for each channel: got 1"),
        ({"std": (1.0, 0.0, 1.0)}, r"std must be above 0"),
        ({"example": (2, 3, 8, 8)}, r"example and input_size must be of one shape"),
        ({"input_size": (4, 16, 16)}, r"does not run on \(2, 4, 16, 16\).*pass input_size"),
        ({"input_size": (3, 0, 16)}, r"an input must have positive sizes"),
    ],
)
def test_bad_calls_say_what_to_do(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(toy(), tmp_path / "net.onnx", **{"input_size": (3, 16, 16), **options})
    assert list(tmp_path.iterdir()) == []


def detector() -> nn.Module:
    from mrla.dense import detector

    options = {"fpn_channels": 16, "box_head_dim": 16}
    return detector("faster_rcnn", timm.create_model("test_resnet"), 3, min_size=64, max_size=64, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (detector, "detector or segmenter of mrla.dense.*export its backbone"),
        (lambda: nn.DataParallel(toy()), "export first, then wrap"),
        (lambda: toy().half(), r"float32: got weights of torch.float16; call model.float\(\)"),
        (lambda: toy().to("meta"), "meta device have no numbers"),
        (lambda: toy(nn.Threshold(1e9, float("nan"))), "numbers that are not finite"),
    ],
)
def test_networks_that_are_not_exported(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(make(), tmp_path / "net.pt2", format="torch_export", input_size=(3, 16, 16))


def test_a_path_is_no_network(tmp_path):
    with pytest.raises(TypeError, match=r"load it with mrla\.load first"):
        export("runs/net", tmp_path / "net.onnx")


@pytest.mark.parametrize(("format", "extra"), [("onnx", "export"), ("openvino", "openvino")])
def test_a_missing_package_names_its_extra(format, extra, files, tmp_path, monkeypatch):
    monkeypatch.setattr(contract, "find_spec", lambda name: None)
    for call in (
        lambda: export(toy(), tmp_path / f"net{SUFFIXES[format]}", format=format),
        lambda: open_exported(files[format]),
    ):
        with pytest.raises(ValueError, match=rf"not installed here: pip install 'mrla\[{extra}\]'"):
            call()


def test_what_is_there_is_kept_unless_told_otherwise(tmp_path):
    options = {"format": "torch_export", "input_size": (3, 16, 16)}
    path = tmp_path / "net.pt2"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"net\.pt2 exists; choose another path, or overwrite=True"):
        export(toy(), path, **options)
    assert path.read_text() == "mine"
    export(toy(), path, **options, overwrite=True)
    assert open_exported(path).facts.input_size == (3, 16, 16)
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ValueError, match=r"folder\.pt2 is a folder"):
        export(toy(), tmp_path / "folder.pt2", **options, overwrite=True)


@pytest.mark.parametrize("format", SUFFIXES)
def test_a_damaged_file_is_refused(format, files, tmp_path):
    file = tmp_path / f"net{SUFFIXES[format]}"
    file.write_bytes(files[format].read_bytes()[:300])
    with pytest.raises(ValueError, match=f"is damaged or not a file of {format}"):
        open_exported(file)
    with pytest.raises(ValueError, match=r"must exist: .*nowhere"):
        open_exported(tmp_path / f"nowhere{SUFFIXES[format]}")


def test_a_file_that_tells_nothing_of_itself_is_refused(files, tmp_path):
    content = onnx.load(files["onnx"])
    del content.metadata_props[:]
    onnx.save(content, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="tells nothing of its input and classes"):
        open_exported(tmp_path / "net.onnx")
    onnx.helper.set_model_props(content, {"mrla": json.dumps({"no": "input size"})})
    onnx.save(content, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"must tell of its input and classes as mrla\.deploy\.export writes it"):
        open_exported(tmp_path / "net.onnx")
    with zipfile.ZipFile(tmp_path / "net.pt2", "w") as archive:
        archive.writestr("note", "no network")
    with pytest.raises(ValueError, match="damaged or not a file of torch_export"):
        open_exported(tmp_path / "net.pt2")
    with pytest.raises(ValueError, match=r"must end in one of \.onnx, \.pt2, \.xml"):
        open_exported(tmp_path / "net.tflite")


@pytest.mark.sweep
def test_a_size_that_torchs_file_would_not_take_is_fixed(tmp_path):
    """Of images of 8x8 the last stage is one pixel, and torch notes that it may never be one where it was more."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18_cifar_mrla_light", channels=(8, 8, 8, 8), in_chans=1, num_classes=7)
    made = export(model, tmp_path / "net.pt2", format="torch_export", example=(2, 1, 8, 8))
    assert made.facts.dynamic == ("batch",)
    assert "the file does not run on (1, 1, 8, 8)" in (made.fixed_because or "")
    opened = export(model, tmp_path / "net.onnx", example=(2, 1, 8, 8))
    assert opened.facts.dynamic == OPEN
