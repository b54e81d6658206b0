"""A name stands for one thing wherever a network is named, in one order; where two share it, a warning says so."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import timm

import mrla
from mrla.analysis.benchmarking.arms import Arm, build_network, check_network, read_arm
from mrla.analysis.catalogue import describe_chains
from mrla.cli import main
from mrla.dense import detector
from mrla.models import (
    NETWORKS,
    CheckpointFile,
    SavedNetwork,
    TimmModel,
    TorchvisionModel,
    build,
    resolve,
)
from mrla.models.dry_run import input_sizes
from mrla.train.arms import build_arm, resolve_defaults
from mrla.train.recipes import get_recipe
from mrla.train.trained import load_trained

NOTE = r"{0} is the name of a model and of a folder here: the model is taken; \./{0} is the folder"
PLACES = (SavedNetwork, CheckpointFile)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(folder: Path, classes: int = 10) -> Path:
    """A saved network whose number of classes shows that it was taken."""
    return mrla.save(timm.create_model("test_resnet", num_classes=classes), folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", TimmModel("resnet18")),
        ("resnet50.a1_in1k", TimmModel("resnet50.a1_in1k")),
        ("resnet18_cifar_mrla_light", TimmModel("resnet18_cifar_mrla_light")),
        ("torchvision/resnet18", TorchvisionModel("resnet18")),
        ("hf-hub:me/resnet18@v2", SavedNetwork("hf-hub:me/resnet18@v2")),
        ("mine", SavedNetwork("mine")),
        ("./mine", SavedNetwork("./mine")),
        ("mine/", SavedNetwork("mine/")),
        (Path("mine"), SavedNetwork("mine")),
        (".", SavedNetwork(".")),
    ],
    ids=str,
)
def test_each_kind_is_told_by_its_name(name, expected, here):
    (here / "mine").mkdir()
    assert resolve(name, NETWORKS) == expected


def test_a_file_is_one_only_where_it_may_be(here):
    (here / "last.ckpt").touch()
    assert resolve("last.ckpt", PLACES) == CheckpointFile(Path("last.ckpt"))
    with pytest.raises(ValueError, match=r"model must be .*: got 'last\.ckpt'"):
        resolve("last.ckpt", NETWORKS)


def test_of_a_model_and_a_folder_the_model_is_taken_and_both_are_told(here):
    for name, model in (
        ("resnet18", TimmModel("resnet18")),
        ("resnet50.a1_in1k", TimmModel("resnet50.a1_in1k")),
        ("torchvision/resnet18", TorchvisionModel("resnet18")),
    ):
        (here / name).mkdir(parents=True)
        with pytest.warns(UserWarning, match=NOTE.format(name)):
            assert resolve(name, NETWORKS) == model
        for folder in (f"./{name}", f"{name}/", here / name, str(here / name)):
            assert resolve(folder, NETWORKS) == SavedNetwork(str(folder))
        # Where no folder may be meant there is nothing to tell, and where no model may be, nothing to take before it.
        assert resolve(name, (TimmModel, TorchvisionModel)) == model
        assert resolve(name, PLACES) == SavedNetwork(name)


def test_a_tag_that_timm_has_not_makes_no_name(here):
    """A copy of a run beside it, called ``resnet18.old``."""
    (here / "resnet18.old").mkdir()
    assert resolve("resnet18.old", NETWORKS) == SavedNetwork("resnet18.old")


@pytest.mark.parametrize(
    ("name", "kinds", "message"),
    [
        (
            "resnt50",
            NETWORKS,
            r"^model must be a name that `mrla models` or timm lists, torchvision/NAME or a folder of mrla\.save or "
            r"hf-hub:owner/name: got 'resnt50'; did you mean 'resnet50'\?$",
        ),
        ("resnet50.a1_in2k", NETWORKS, r"got 'resnet50\.a1_in2k'; did you mean 'resnet50\.a1_in1k'\?$"),
        ("torchvison/resnet18", NETWORKS, r"did you mean 'torchvision/resnet18'\?$"),
        ("test_resnett", (TimmModel,), r"^model must be a name that .* lists: got .* mean 'test_resnet'\?$"),
        ("nowhere", PLACES, r"^model must be a folder of .* or a run's \.ckpt: nowhere does not exist$"),
        ("./resnet18", NETWORKS, r"got '\./resnet18'"),
        (
            "resnet50_mrlal",
            NETWORKS,
            r"as the released code calls resnet50_mrla_light; name that, or .* --arch resnet50_mrlal$",
        ),
        ("hf-hub:me/net@", NETWORKS, "a network on the hub is named"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_name_that_is_nothing_is_refused_with_what_was_meant(name, kinds, message):
    with pytest.raises(ValueError, match=message):
        resolve(name, kinds)


def test_what_else_is_known_is_suggested():
    with pytest.raises(ValueError, match=r"^arm must be plain, light, a name .*: got 'lihgt'; did you mean 'light'\?$"):
        resolve("lihgt", NETWORKS, what="arm", known=("plain", "light"))


# Everywhere a network is named.


def test_training_takes_the_model_and_the_folder_by_its_path(here):
    saved(here / "test_resnet", classes=3)
    recipe = replace(get_recipe("digits_resnet18"), model="test_resnet", model_args={}, pretrained=False)
    facts = recipe.data.facts()
    with pytest.warns(UserWarning, match=NOTE.format("test_resnet")):
        resolve_defaults(recipe)
    with pytest.warns(UserWarning, match=NOTE.format("test_resnet")):
        assert input_sizes(build_arm(replace(recipe, arm="plain"), facts))[0][0] == 1
    # The folder's network takes three channels, which these images have not.
    with pytest.raises(ValueError, match=r"the 3 channels that \./test_resnet takes"):
        build_arm(replace(recipe, arm="plain", model="./test_resnet"), facts)
    with pytest.raises(ValueError, match=r"model must be .* did you mean 'test_resnet'"):
        build_arm(replace(recipe, arm="plain", model="test_resnett"), facts)


def test_a_benchmark_takes_the_model_and_the_folder_by_its_path(here):
    saved(here / "test_resnet", classes=3)
    with pytest.warns(UserWarning, match=NOTE.format("test_resnet")):
        assert build_network("test_resnet", "never built").num_classes == 1000
    assert build_network("./test_resnet", "never built").num_classes == 3
    check_network("torchvision/resnet18")


def test_an_arm_s_states_count_before_a_folder_of_that_name(here):
    saved(here / "test_resnet+fused")
    saved(here / "test_resnet+mine")
    assert read_arm("test_resnet+fused") == Arm("test_resnet+fused", "test_resnet", ("fused",))
    assert read_arm("./test_resnet+mine").network == "./test_resnet+mine"
    assert read_arm("test_resnet+mine").network == "test_resnet+mine"


def test_chains_are_those_of_the_model_where_a_folder_is_called_alike(here):
    (here / "convnext_atto").mkdir()  # without a config.json, which was looked for
    with pytest.warns(UserWarning, match=NOTE.format("convnext_atto")):
        assert describe_chains("convnext_atto")[0].name == "stages.0.blocks"
    with pytest.raises(ValueError, match=r"a saved network is a folder with config\.json"):
        describe_chains("./convnext_atto")


def test_a_backbone_and_a_description_are_models_whatever_lies_there(here):
    (here / "test_resnet").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert detector("fcos", "test_resnet", 2, fpn_channels=32) is not None
        assert build("test_resnet", {}, None).num_classes == 1000
        mrla.load(saved(here / "net"))


def test_a_checkpoint_is_a_folder_whatever_models_there_are(here):
    saved(here / "resnet18", classes=3)
    model, _, _ = load_trained("resnet18")
    assert model.num_classes == 3
    with pytest.raises(ValueError, match=r"^a checkpoint must be .*: resnet50 does not exist$"):
        load_trained("resnet50")


@pytest.mark.filterwarnings("default")
def test_the_command_line_says_it_in_one_line(here, capsys):
    (here / "convnext_atto").mkdir()
    assert main(["chains", "convnext_atto"]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("mrla: warning: convnext_atto is the name of a model and of a folder here")
