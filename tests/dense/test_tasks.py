"""One store for all tasks: detectors and segmenters, folders of version 0.1.0, a task of one's own."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import mrla
import mrla.dense
from mrla.dense import detector, segmenter
from mrla.models import TASKS, NetworkTask, read_config, register_task, task_of, task_of_config
from mrla.models.checkpoints.hub import model_card

OF_0_1_0 = {
    "architecture": "test_resnet",
    "model_args": {"num_classes": 0},
    "pretrained_cfg": {
        "input_size": [3, 160, 160],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "label_names": ["cat", "dog"],
    },
    "mrla": {
        "version": "0.1.0",
        "attach": {
            "method": "light",
            "head_dim": None,
            "heads": None,
            "blocks": None,
            "example": None,
            "chain_length": None,
            "init": "released",
            "drop_path": 0.0,
        },
        "dense": {
            "made_by": "detector",
            "name": "faster_rcnn",
            "arguments": {
                "num_classes": 3,
                "min_size": 64,
                "max_size": 96,
                "image_mean": None,
                "image_std": None,
                "levels": None,
                "freeze_stages": -1,
                "norm_eval": True,
                "score_thresh": None,
                "nms_thresh": None,
                "detections_per_image": 10,
                "fpn_channels": 16,
                "box_head_dim": 16,
                "mask_head_dim": None,
                "mask_head_layers": None,
            },
        },
    },
}
"""What `mrla.dense.save` of version 0.1.0 wrote for `small_detector`."""


def small_detector() -> nn.Module:
    torch.manual_seed(0)
    body = mrla.attach(timm.create_model("test_resnet"), "light", init="released")
    sizes = {"min_size": 64, "max_size": 96, "fpn_channels": 16, "box_head_dim": 16, "detections_per_image": 10}
    return detector("faster_rcnn", body, 3, **sizes).eval()


def small_segmenter() -> nn.Module:
    torch.manual_seed(0)
    return segmenter("fcn", mrla.attach(timm.create_model("test_resnet"), "light"), 3).eval()


@pytest.fixture(scope="module")
def of_0_1_0(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("of_0_1_0")
    (folder / "config.json").write_text(json.dumps(OF_0_1_0, indent=2) + "\n")
    save_file(small_detector().state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("make", "task"), [(small_detector, "detection"), (small_segmenter, "segmentation")], ids=["detector", "segmenter"]
)
def test_one_store_takes_every_task(make, task, tmp_path):
    model = make()
    assert task_of(model).name == task
    folder = mrla.save(model, tmp_path / "net", class_names=["cat", "dog"])
    assert task_of_config(read_config(folder)).name == task
    for loaded in (mrla.load(folder), mrla.dense.load(folder)):
        assert task_of(loaded).name == task
        assert loaded.class_names == ("cat", "dog")
        assert not loaded.training
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    same = mrla.dense.save(model, tmp_path / "same", class_names=["cat", "dog"])
    assert (same / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_classifiers_and_backbones_are_of_classification(tmp_path):
    for model in (timm.create_model("test_resnet"), timm.create_model("test_resnet", num_classes=0), nn.Linear(2, 2)):
        assert task_of(model).name == "classification"
    folder = mrla.save(timm.create_model("test_resnet"), tmp_path)
    assert task_of_config(read_config(folder)).name == "classification"
    assert set(TASKS) == {"classification", "detection", "segmentation"}


def test_a_folder_of_version_0_1_0_loads(of_0_1_0, tmp_path):
    model, loaded = small_detector(), mrla.load(of_0_1_0)
    assert loaded.class_names == ("cat", "dog")
    image = [torch.rand(3, 48, 64)]
    with torch.inference_mode():
        one, other = model(image)[0], loaded(image)[0]
    assert all(torch.equal(one[name], other[name]) for name in one)
    again = read_config(mrla.save(loaded, tmp_path, class_names=loaded.class_names))
    del again["mrla"]["weights_sha256"]  # since 0.1.0
    again["mrla"]["version"] = "0.1.0"
    assert again == OF_0_1_0
    assert json.dumps(again) == json.dumps(OF_0_1_0)  # the order of the keys, too


def test_it_loads_where_nothing_of_dense_is_imported(of_0_1_0):
    code = (
        "import sys, mrla; before = 'mrla.dense' in sys.modules; model = mrla.load(sys.argv[1]); "
        "print(before, type(model).__name__, mrla.models.task_of(model).name)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(of_0_1_0)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "FasterRCNN", "detection"]


@pytest.mark.parametrize(
    "dense",
    [{"made_by": "poser", "name": "fcn", "arguments": {}}, {}, [], "detector", {"made_by": "segmenter", "name": "fcn"}],
)
def test_a_description_of_no_known_kind_is_refused(dense, of_0_1_0, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**OF_0_1_0, "mrla": {**OF_0_1_0["mrla"], "dense": dense}}))
    (tmp_path / "model.safetensors").write_bytes((of_0_1_0 / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="the description of the network is not of this version"):
        mrla.load(tmp_path)


def test_its_card_says_what_it_is(of_0_1_0):
    card = model_card(read_config(of_0_1_0), "me/cats")
    assert "pipeline_tag: object-detection" in card
    assert "| detector | faster_rcnn |" in card
    assert "| architecture | test_resnet (timm) |" in card
    assert "timm reads it too" not in card


class Heights(nn.Module):
    """A network of a task of one's own: a height for each pixel of a map."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.body = timm.create_model("test_resnet", num_classes=0)
        self.head = nn.Conv2d(self.body.num_features, width, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body.forward_features(images))


class HeightsTask(NetworkTask):
    """In this test alone: no file of `mrla` knows it."""

    name, noun, pipeline_tag = "heights", "height map", "depth-estimation"

    def owns(self, model: nn.Module) -> bool:
        return isinstance(model, Heights)

    def owns_config(self, config: Mapping[str, Any]) -> bool:
        return "heights" in (config.get("mrla") or {})

    def describe(self, model: nn.Module, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
        built: Any = {"architecture": "test_resnet", "model_args": {"num_classes": 0}, "pretrained_cfg": {}}
        return {**built, "mrla": {"version": "0", "attach": None, "heights": model.width}}

    def rebuild(self, config: Mapping[str, Any]) -> nn.Module:
        return Heights(config["mrla"]["heights"])

    def title(self, model: nn.Module) -> str:
        return "heights"

    def config_title(self, config: Mapping[str, Any]) -> str:
        return "heights"

    def check(self, config: Mapping[str, Any], model: nn.Module, path: Path) -> None:
        if config["mrla"]["heights"] > 8:
            raise ValueError(f"{path} must have 8 heights at most")

    def restore(self, config: Mapping[str, Any], model: nn.Module) -> None:
        model.__dict__["restored"] = True


def test_a_task_of_ones_own_is_saved_and_loaded(tmp_path):
    register_task(HeightsTask)
    try:
        model = Heights(2)
        assert task_of(model).name == "heights"
        loaded = mrla.load(mrla.save(model, tmp_path))
        assert isinstance(loaded, Heights)
        assert loaded.restored
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
        with pytest.raises(ValueError, match=r"config\.json must have 8 heights at most"):
            mrla.save(Heights(9), tmp_path)
        with pytest.raises(ValueError, match="a height map is saved with what it was built with: got mean too"):
            mrla.save(model, tmp_path, mean=(0, 0, 0))
        with pytest.raises(ValueError, match=r"'heights' is that of HeightsTask in .*test_tasks\.py; choose another"):
            register_task(HeightsTask)
    finally:
        del TASKS["heights"]
