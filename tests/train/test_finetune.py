"""Fine-tuning: what is new learns first, then everything; from published weights, a folder's, or a network in hand."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import lightning as L
import numpy as np
import pytest
import timm
import torch
import torchvision
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mrla
from mrla.data.samples import ImageFacts
from mrla.models import is_attached
from mrla.models.parameter_groups import new_parameters
from mrla.train import Digits, Folder, Optim, fitting, get_recipe
from mrla.train.arms import build_arm, resolve_defaults
from mrla.train.fitting import train
from mrla.train.freezing import FrozenAtFirst
from mrla.train.task import Classification

TINY = {"channels": (8, 8, 8, 8), "num_classes": 4}
OPTIM = Optim(name="adamw", lr=0.01, weight_decay=0.1, frozen_epochs=2, old_lr_scale=0.1, clip_grad_norm=1.0)
FACTS = ImageFacts(in_chans=3, size=32, mean=(0.5,) * 3, std=(0.5,) * 3, class_names=("a", "b", "c", "d"))
DIGITS = Digits().facts()


def network(method: str | None = None) -> nn.Module:
    model = timm.create_model("resnet18", drop_path_rate=0.5, drop_rate=0.5, **TINY)
    return mrla.attach(model, method) if method else model


def batches() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(12, 3, 32, 32), torch.arange(12) % 4), batch_size=6)


class Watch(Callback):
    """What the network is like after each epoch of training."""

    def __init__(self):
        self.states: list[dict[str, Tensor]] = []
        self.training: list[set[str]] = []
        self.optimized: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert isinstance(pl_module, Classification)
        self.training.append({name for name, module in pl_module.model.named_modules() if module.training})

    def on_train_epoch_end(self, trainer, pl_module):
        self.states.append(copy.deepcopy(pl_module.model.state_dict()))
        self.optimized.append(len(trainer.optimizers[0].state))


def run_stages(model: nn.Module, optim: Optim = OPTIM, *, epochs: int = 4, new=()) -> Watch:
    watch = Watch()
    task = Classification(model, classes=4, optim=optim, epochs=epochs, new=new)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[FrozenAtFirst(model, epochs=optim.frozen_epochs, new=new), watch],
        gradient_clip_val=optim.clip_grad_norm,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lightning's advice on workers and log intervals is not what is tested.
    with pytest.warns(), torch.random.fork_rng():
        trainer.fit(task, batches(), batches())
    return watch


def changed(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


def is_new(name: str) -> bool:
    return ".mrla." in name or name.startswith("fc.")


@pytest.mark.parametrize("method", [None, "light", "base"])
def test_what_is_new_learns_first_then_everything(method):
    model = network(method)
    start = copy.deepcopy(model.state_dict())
    watch = run_stages(model)
    first, second, third, _ = watch.states
    silent = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if hasattr(module, "zero_grad_parameters")
        for name in module.zero_grad_parameters()
    }
    fresh = {name for name, _ in model.named_parameters() if is_new(name)} - silent
    for state in (first, second):
        moved = changed(start, state)
        assert moved <= {name for name in start if is_new(name)}, "something old has moved while it was frozen"
    assert fresh <= changed(start, second)
    parameters = {name for name, _ in model.named_parameters()} - silent
    assert parameters <= changed(second, third)
    assert {name for name in start if "running_mean" in name} <= changed(second, third)
    # No moments are kept of what does not learn, so that it starts fresh.
    assert watch.optimized[1] == len([name for name, _ in model.named_parameters() if is_new(name)])
    assert watch.optimized[2] == len(list(model.parameters()))


def test_only_what_is_new_is_in_train_mode_first():
    model = network("light")
    watch = run_stages(model)
    assert watch.training[0] == watch.training[3]
    assert {name for name in watch.training[0] if name} == {
        name for name, _ in model.named_modules() if ".mrla." in f"{name}." or name == "fc"
    }
    assert watch.training[4] == watch.training[-1] == {name for name, _ in model.named_modules()}


def test_a_norm_that_the_caller_froze_stays_frozen():
    model = network("light")
    model.layer1.eval().requires_grad_(False)
    state = copy.deepcopy(model.layer1.state_dict())
    watch = run_stages(model)
    assert not any(name == "layer1" or name.startswith("layer1.") for modes in watch.training for name in modes)
    assert not changed(state, model.layer1.state_dict())
    assert not any(parameter.requires_grad for parameter in model.layer1.parameters())


def test_patterns_count_as_new():
    model = timm.create_model("seresnet18", **TINY)
    start = copy.deepcopy(model.state_dict())
    watch = run_stages(model, new=("*.se.*",))
    assert changed(start, watch.states[0]) == {name for name in start if ".se." in name or name.startswith("fc.")}


def test_a_norm_that_counts_as_new_takes_new_statistics():
    model = network()
    start = copy.deepcopy(model.state_dict())
    watch = run_stages(model, new=("layer4.1.bn2.*",))
    moved = {name for name in changed(start, watch.states[0]) if not name.startswith("fc.")}
    assert moved == {name for name in start if name.startswith("layer4.1.bn2.")}


@pytest.mark.parametrize("arm", ["se", "eca"])
def test_what_an_arm_builds_in_is_new(arm, tmp_path, monkeypatch):
    tasks: list[Classification] = []
    monkeypatch.setattr(fitting, "_run", lambda task, *_, **__: tasks.append(task))
    train(replace(get_recipe("digits_resnet18"), model_args={"channels": [8, 8, 8, 8]}, arm=arm), tmp_path)
    (task,) = tasks
    plain = build_arm(
        replace(get_recipe("digits_resnet18"), model_args={"channels": [8, 8, 8, 8]}, arm="plain"), DIGITS
    )
    added = {name for name, _ in task.model.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert set(new_parameters(task.model, task.new)) == added | {"fc.weight", "fc.bias"}


def test_several_processes_drop_the_gradients_that_ddp_must_see():
    model = network("light")
    callback = FrozenAtFirst(model, epochs=1)
    trainer = SimpleNamespace(current_epoch=0, world_size=2)
    callback.on_train_epoch_start(trainer, None)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    callback.on_before_optimizer_step(trainer, None, None)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        name for name, _ in model.named_parameters() if is_new(name)
    }


def test_a_run_that_fails_gives_the_network_back_trainable(tmp_path):
    class Broken(TensorDataset):
        def __getitem__(self, index):
            raise OSError("gone")

    model = network("light")
    images = Broken(torch.randn(4, 3, 32, 32), torch.arange(4))
    with pytest.raises(OSError, match="gone"):
        mrla.fit(
            model, DataLoader(images), batches(), epochs=3, out=tmp_path, optim=Optim(frozen_epochs=1), progress=False
        )
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_nothing_new_is_refused(tmp_path):
    model = timm.create_model("resnet18", **{**TINY, "num_classes": 0})
    with pytest.raises(ValueError, match=r"optim.frozen_epochs=1 needs something to train .* take 0"):
        FrozenAtFirst(model, epochs=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frozen_epochs": 12}, "optim.frozen_epochs must be fewer than epochs=12, such as 0: got 12"),
        ({"frozen_epochs": -1}, "optim.frozen_epochs must be zero or more: got -1"),
        ({"old_lr_scale": 0.0}, "optim.old_lr_scale must be positive: got 0.0"),
    ],
)
def test_refused_numbers(changes, message):
    recipe = get_recipe("finetune")
    with pytest.raises(ValueError, match=message):
        replace(recipe, optim=replace(recipe.optim, **changes))


# What it starts from.


def tuned(**changes):
    return replace(get_recipe("finetune"), **changes)


def save_network(folder: Path, *, build: Callable[[], nn.Module] = network, **facts) -> nn.Module:
    model = build().eval()
    mrla.save(model, folder, **facts)
    return model


@pytest.mark.parametrize("arm", ["plain", "light", "base", "exact", "dw"])
def test_a_folders_network_says_the_same_at_the_start(arm, tmp_path):
    trained = save_network(tmp_path, class_names=FACTS.class_names)
    model = build_arm(tuned(model=str(tmp_path), arm=arm), FACTS)
    assert model.training
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), trained(images))
    assert is_attached(model) == (arm != "plain")


@pytest.mark.parametrize("arm", ["se", "eca"])
def test_what_is_built_in_is_new_and_the_rest_is_the_folders(arm, tmp_path):
    trained = save_network(tmp_path, class_names=FACTS.class_names).state_dict()
    model = build_arm(tuned(model=str(tmp_path), arm=arm), FACTS)
    start = model.state_dict()
    assert all(torch.equal(start[name], trained[name]) for name in trained)
    assert {name for name in start if name not in trained} == set(new_parameters(model, ("*.se.*",))) - {
        "fc.weight",
        "fc.bias",
    }


@pytest.mark.parametrize(
    ("names", "kept"),
    [(("a", "b", "c", "d"), True), (None, True), (("a", "b", "c", "e"), False), (("a", "b", "c"), False)],
    ids=["same", "not known", "others", "another number"],
)
def test_the_classifier_is_kept_where_it_is_for_these_classes(names, kept, tmp_path):
    classes = len(names or FACTS.class_names)
    build = lambda: timm.create_model("resnet18", **{**TINY, "num_classes": classes})  # noqa: E731
    trained = save_network(tmp_path, build=build, class_names=names)
    starts = [
        build_arm(tuned(model=str(tmp_path), arm=arm, seed=seed), FACTS).state_dict()
        for arm, seed in (("plain", 0), ("light", 0), ("plain", 1))
    ]
    for name, tensor in trained.state_dict().items():
        of_classifier = name.startswith("fc.")
        for start in starts:
            same = start[name].shape == tensor.shape and torch.equal(start[name], tensor)
            assert same == (kept or not of_classifier), name
    assert torch.equal(starts[0]["fc.weight"], starts[1]["fc.weight"])  # of one seed
    assert torch.equal(starts[0]["fc.weight"], starts[2]["fc.weight"]) == kept


def test_a_folder_of_torchvisions_network(tmp_path):
    trained = torchvision.models.mobilenet_v3_small(num_classes=7).eval()
    mrla.save(trained, tmp_path, architecture="torchvision/mobilenet_v3_small", model_args={"num_classes": 7})
    model = build_arm(tuned(model=str(tmp_path), arm="light"), FACTS).eval()
    assert torch.equal(model.features(image := torch.randn(1, 3, 64, 64)), trained.features(image))
    assert model(image).shape == (1, 4)
    again = mrla.save(model, tmp_path / "again")  # it knows what it is
    assert torch.equal(mrla.load(again)(image), model(image))


def test_torchvision_by_name():
    model = build_arm(tuned(model="torchvision/mobilenet_v3_small", pretrained=False, arm="light"), FACTS)
    assert is_attached(model)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4)


def test_a_folder_with_mixers_goes_on_as_it_is_but_gets_no_others(tmp_path):
    trained = save_network(tmp_path, build=lambda: network("light"))
    model = build_arm(tuned(model=str(tmp_path), arm="plain"), FACTS).eval()
    assert torch.equal(model(image := torch.randn(1, 3, 32, 32)), trained(image))
    with pytest.raises(ValueError, match="must be a plain network"):
        build_arm(tuned(model=str(tmp_path), arm="light"), FACTS)


def test_what_the_images_leave_open_is_as_the_network_was_trained(tmp_path):
    save_network(tmp_path / "mine", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=(3, 48, 48))
    data = resolve_defaults(tuned(model=str(tmp_path / "mine"))).data
    assert isinstance(data, Folder)
    assert (data.size, data.mean, data.std) == (48, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    vit = resolve_defaults(tuned(model="vit_tiny_patch16_224")).data
    assert isinstance(vit, Folder)
    assert (vit.size, vit.mean, vit.std, vit.interpolation, vit.crop_pct) == (
        *(224, (0.5,) * 3, (0.5,) * 3),
        *("bicubic", 0.9),
    )
    given = resolve_defaults(tuned(model="vit_tiny_patch16_224", data=Folder(size=32, mean=(0.0, 0.0, 0.0)))).data
    assert isinstance(given, Folder)
    assert (given.size, given.mean, given.std) == (32, (0.0,) * 3, (0.5,) * 3)
    usual = Folder().completed()
    assert isinstance(usual, Folder)
    assert (usual.size, usual.interpolation, usual.crop_pct) == (224, "bilinear", 0.875)
    assert usual.mean == (0.485, 0.456, 0.406)


def test_the_released_recipe_does_not_follow_timms_configuration():
    recipe = get_recipe("imagenet_resnet50")
    assert resolve_defaults(recipe) == recipe


def test_weights_that_cannot_be_fetched_are_one_line():  # conftest: the hub is off
    with pytest.raises(ValueError, match=r"the weights of resnet18 cannot be fetched \(.*pretrained=false") as error:
        build_arm(tuned(model="resnet18"), FACTS)
    assert "\n" not in str(error.value)


def test_torchvisions_weights(monkeypatch):
    """From a stand-in for the download: all of them but the classifier, or one line where they cannot be had."""
    published = torchvision.models.mobilenet_v3_small().state_dict()
    fetch = "torchvision.models._api.load_state_dict_from_url"
    recipe = tuned(model="torchvision/mobilenet_v3_small", arm="light")
    monkeypatch.setattr(fetch, lambda *_, **__: published)
    start = build_arm(recipe, FACTS).state_dict()
    assert all(torch.equal(start[name], published[name]) for name in published if not name.startswith("classifier.3"))
    assert start["classifier.3.weight"].shape[0] == 4
    thousand = replace(FACTS, class_names=tuple(map(str, range(1000))))
    start = build_arm(recipe, thousand).state_dict()
    assert torch.equal(start["classifier.3.weight"], published["classifier.3.weight"])

    def unreachable(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(fetch, unreachable)
    with pytest.raises(
        ValueError, match=r"mobilenet_v3_small cannot be fetched \(.*no route to host.*pretrained=false"
    ):
        build_arm(recipe, FACTS)


def test_images_of_other_channels_are_refused(tmp_path):
    save_network(tmp_path)
    with pytest.raises(ValueError, match=r"must have the 3 channels that .* takes: they have 1"):
        build_arm(tuned(model=str(tmp_path)), replace(FACTS, in_chans=1))
    with pytest.raises(ValueError, match="must have the 3 channels that torchvision/resnet18 takes: they have 1"):
        build_arm(tuned(model="torchvision/resnet18"), replace(FACTS, in_chans=1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("torchvision/resnet1", "torchvision/resnet1 cannot be built"),
        ("mine", "a folder of mrla.save or hf-hub:owner/name: got 'mine'"),
        ("torchvision_resnet18", r"did you mean 'torchvision/resnet18'\?"),
    ],
)
def test_no_such_network(model, message):
    with pytest.raises(ValueError, match=message):
        build_arm(tuned(model=model, pretrained=False), FACTS)


def made_images(root: Path) -> Path:
    """Two classes that are told apart by where a bright square is."""
    from PIL import Image

    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 6)):
        for name, corner in (("left", 2), ("right", 18)):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 90, (32, 32, 3), dtype=np.uint8)
                pixels[8:24, corner : corner + 12] += 150
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


def test_a_whole_run_from_a_folder(tmp_path):
    save_network(tmp_path / "start", mean=(0.2,) * 3, std=(0.3,) * 3, input_size=(3, 32, 32))
    data = Folder(root=str(made_images(tmp_path / "images")), workers=0)
    recipe = tuned(model=str(tmp_path / "start"), data=data, epochs=3, batch_size=6)
    run = train(recipe, tmp_path / "run", progress=False)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["pretrained_cfg"]["label_names"] == ["left", "right"]
    assert config["pretrained_cfg"]["mean"] == [0.2] * 3
    assert config["mrla"]["attach"]["method"] == "light"
    assert data.facts().mean == (0.485, 0.456, 0.406)  # the description itself is as it was
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["data"]["mean"] == [0.2] * 3
    assert settings["data"]["size"] == 32
    assert run.epochs[0]["lr"] == pytest.approx(1e-5)  # a hundredth, in the warm-up
    # And what came of it can be the start of the next.
    again = build_arm(replace(recipe, model=str(tmp_path / "run"), arm="plain"), data.facts()).eval()
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(image), run.model(image))
