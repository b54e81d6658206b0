import dataclasses
import json
from dataclasses import replace

import pytest

from mrla.messages.suggestions import nearest
from mrla.train import RECIPES, Cifar10, Digits, Folder, Machine, MixerOptions, Optim, get_recipe, known_arms
from mrla.train.recipe import as_dict, from_dict


def test_the_notebooks_settings():
    """Section 1 of the facts: what the notebook's cells set."""
    recipe = get_recipe("cifar10_resnet18")
    assert (recipe.model, recipe.arm, recipe.init, recipe.pretrained) == ("resnet18_cifar", "light", "notebook", False)
    assert isinstance(recipe.data, Cifar10)
    assert (recipe.epochs, recipe.batch_size, recipe.seed) == (100, 256, 42)
    assert recipe.label_smoothing == 0.1
    assert recipe.smooth_validation
    assert recipe.optim == Optim(
        name="sgd",
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-5,
        decay_vectors=True,
        schedule="multistep",
        milestones=(30, 60, 80),
        gamma=0.1,
    )
    assert recipe.mixer == MixerOptions()  # 32 channels a head is the method's own width
    assert recipe.ema_decay is None


def test_the_released_settings():
    """Section 2 of the facts: the released ResNet recipe."""
    recipe = get_recipe("imagenet_resnet50")
    assert (recipe.model, recipe.arm, recipe.init, recipe.pretrained) == ("resnet50", "light", "released", False)
    assert isinstance(recipe.data, Folder)
    assert (recipe.epochs, recipe.batch_size, recipe.label_smoothing) == (100, 256, 0.0)
    optim = recipe.optim
    assert (optim.name, optim.lr, optim.momentum, optim.weight_decay) == ("sgd", 0.1, 0.9, 1e-4)
    assert optim.decay_vectors
    assert (optim.schedule, optim.milestones, optim.gamma, optim.warmup_epochs) == ("multistep", (30, 60, 90), 0.1, 3)
    assert (recipe.mixer.drop_path, recipe.mixer.carry) == (0.2, "shortcut")


def test_the_default_needs_no_download_and_no_gpu():
    recipe = get_recipe("digits_resnet18")
    assert isinstance(recipe.data, Digits)
    assert recipe.machine.accelerator == "cpu"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json(name):
    recipe = RECIPES[name]()
    assert recipe.recipe == name
    for arm in known_arms():
        changed = replace(
            recipe, arm=arm, model_args={"channels": [8, 8, 8, 8]}, ema_decay=0.99, optim=Optim(clip_grad_norm=1.0)
        )
        for one in (recipe, changed):
            back = from_dict(json.loads(json.dumps(as_dict(one))))
            assert back == one
            assert type(back.data) is type(one.data)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_frozen_and_documented(name):
    recipe = RECIPES[name]()
    assert "mrla train" in str(RECIPES[name].__doc__)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.epochs = 3
    for part in (recipe.optim, recipe.machine, recipe.mixer, recipe.data):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.lr = 3


def test_two_calls_share_nothing_that_can_change():
    get_recipe("digits_resnet18").model_args["channels"] = [1]
    assert get_recipe("digits_resnet18").model_args == {"channels": [16, 32, 64, 128]}


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"lr": 0.0}, r"optim\.lr must be positive: got 0\.0"),
        ({"lr": -0.1}, r"optim\.lr must be positive: got -0\.1"),
        ({"lr": float("nan")}, r"optim\.lr must be positive: got nan"),
        ({"momentum": 1.0}, r"optim\.momentum must be in \[0, 1\): got 1\.0"),
        ({"weight_decay": -1e-4}, r"optim\.weight_decay must be zero or more"),
        ({"milestones": (0, 30)}, r"optim\.milestones must be positive epochs"),
        ({"milestones": (-3,)}, r"optim\.milestones must be positive epochs"),
        ({"warmup_epochs": -1}, r"optim\.warmup_epochs must be zero or more"),
        ({"min_lr": 0.2}, r"optim\.min_lr must be between 0 and optim\.lr=0\.1: got 0\.2"),
        ({"clip_grad_norm": 0.0}, r"optim\.clip_grad_norm must be positive"),
        ({"name": "adam"}, r"optim\.name must be one of sgd, adamw.*got adam"),
        ({"schedule": "step"}, r"optim\.schedule must be one of multistep, cosine, constant.*got step"),
    ],
    ids=str,
)
def test_a_wrong_optimizer_setting_is_named(wrong, rule):
    with pytest.raises(ValueError, match=rule):
        Optim(**wrong)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"devices": 0}, "machine.devices must be from 1 to 1024, or 'auto': got 0"),
        ({"devices": -1}, "machine.devices must be from 1 to 1024, or 'auto': got -1"),
        ({"devices": 10**400}, "machine.devices must be from 1 to 1024, or 'auto': got 1000"),
        ({"nodes": 0}, "machine.nodes must be from 1 to 1024: got 0"),
        ({"nodes": 2000}, "machine.nodes must be from 1 to 1024: got 2000"),
        ({"threads": 0}, "machine.threads must be from 1 to 1024: got 0"),
        ({"threads": 2000}, "machine.threads must be from 1 to 1024: got 2000"),
    ],
    ids=str,
)
def test_a_wrong_machine_setting_is_named(wrong, rule):
    with pytest.raises(ValueError, match=rule):
        Machine(**wrong)
    assert Machine(devices="auto").devices == "auto"


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"epochs": 0}, "epochs must be positive: got 0"),
        ({"batch_size": 0}, "batch_size must be positive: got 0"),
        ({"batch_size": -64}, "batch_size must be positive: got -64"),
        ({"seed": -1}, "seed must be zero or more: got -1"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\): got 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\): got -0.1"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \(0, 1\): got 1.0"),
        ({"ema_decay": 0.0}, r"ema_decay must be in \(0, 1\): got 0.0"),
        (
            {"arm": "lite"},
            "arm must be one of plain, light, base, exact, dw, eca, se: got 'lite'; did you mean 'light'",
        ),
        (
            {"init": "identiy"},
            "init must be one of released, notebook, identity; did you mean 'identity'?.*got identiy",
        ),
        ({"epochs": 1}, "optim.warmup_epochs must be fewer than epochs=1, such as 0: got 1"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(wrong, rule):
    recipe = replace(get_recipe("digits_resnet18"), optim=Optim(warmup_epochs=1))
    with pytest.raises(ValueError, match=rule):
        replace(recipe, **wrong)
    with pytest.raises(ValueError, match=rule):  # and also as it comes from a file
        from_dict({**as_dict(recipe), **wrong})


def test_an_unknown_recipe_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"got 'cifar_resnet18'; did you mean 'cifar10_resnet18'\?"):
        get_recipe("cifar_resnet18")
    with pytest.raises(ValueError, match="digits_resnet18, cifar10_resnet18, imagenet_resnet50") as caught:
        get_recipe("zzz")
    assert "did you mean" not in str(caught.value)
    assert nearest("zzz", known_arms()) == ""


@pytest.mark.parametrize("path", ["colour", "optim.colour", "machine.colour", "data.colour", "mixer.colour"])
def test_an_unknown_or_missing_field_is_a_value_error(path):
    settings = as_dict(get_recipe("digits_resnet18"))
    *parts, name = path.split(".")
    place = settings[parts[0]] if parts else settings
    place[name] = 1
    with pytest.raises(ValueError, match="colour"):
        from_dict(settings)


@pytest.mark.parametrize("name", ["recipe", "model", "data", "epochs"])
def test_a_missing_field_is_a_value_error(name):
    settings = as_dict(get_recipe("digits_resnet18"))
    del settings[name]
    with pytest.raises(ValueError, match=name):
        from_dict(settings)


def test_an_unknown_kind_of_data_is_a_value_error():
    settings = as_dict(get_recipe("digits_resnet18"))
    settings["data"]["kind"] = "letters"
    with pytest.raises(ValueError, match="letters"):
        from_dict(settings)
