"""Runs: what they leave behind, that they go on as they would have, and how they stop."""

import gc
import json
import multiprocessing
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from tiny_runs import assert_same_run, content, result, rows, tiny
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

import mrla
from mrla.data.images import UndecodableImageError
from mrla.data.samples import loader
from mrla.train import Digits, Folder, Machine, MixerOptions, Optim, engine, fitting
from mrla.train.fitting import train
from mrla.train.history import History, write_csv
from mrla.train.task import Classification, DivergedError, Scores

ADAMW = Optim(name="adamw", lr=0.01, decay_vectors=False, clip_grad_norm=0.5, schedule="multistep", milestones=(2,))
RECIPES = {
    "as it is": tiny(),
    "drop path, moving average": tiny(mixer=MixerOptions(drop_path=0.2), ema_decay=0.9),
    "adamw, clipping": tiny(optim=ADAMW, arm="se", seed=3),
    "two stages": tiny(optim=replace(ADAMW, frozen_epochs=2, old_lr_scale=0.1), init="identity", ema_decay=0.9),
}
CPU = Machine(accelerator="cpu", threads=1)


class Crash(Exception):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Each recipe's run without interruption, made when first asked for."""
    runs: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp("run")
            train(RECIPES[name], runs[name], progress=False)
        return runs[name]

    return run


def digits_val() -> DataLoader:
    return loader(Digits().open("val"), batch_size=64, seed=0, shuffle=False, drop_last=False)


def test_what_a_run_leaves_behind(finished):
    folder = finished("as it is")
    files = {name for name in content(folder) if not name.startswith("tensorboard/")}
    assert files == {
        "run.json",
        "history.csv",
        "steps.csv",
        "log.txt",
        "result.json",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        *(f"{place}{name}" for place in ("", "best/") for name in ("model.safetensors", "config.json")),
    }
    assert any(path.name.startswith("events.") for path in (folder / "tensorboard").iterdir())
    history, final = rows(folder / "history.csv"), result(folder)
    assert history == final["epochs"]
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert [row["lr"] for row in history] == pytest.approx([0.001, 0.1, 0.05])  # warm-up, then half of a cosine
    assert final["last"] == history[-1]
    assert final["best"] == max(history, key=lambda row: row["val_accuracy"])
    # 898 training images are 14 batches of 64: one tenth batch in each epoch.
    assert [(row["step"], row["epoch"]) for row in rows(folder / "steps.csv")] == [(10, 1), (24, 2), (38, 3)]
    assert final["versions"]["torch"] in torch.__version__  # which may also name the build


@pytest.mark.parametrize("name", ["as it is", "drop path, moving average"])
def test_the_saved_networks_score_what_the_history_says(finished, name):
    folder = finished(name)
    final, images = result(folder), digits_val()
    for place, row in ((folder, final["last"]), (folder / "best", final["best"])):
        scores = mrla.evaluate(mrla.load(place), images, machine=CPU)
        assert scores["accuracy"] == pytest.approx(row["val_accuracy"], abs=1e-7)
        assert scores["accuracy_top5"] == pytest.approx(row["val_accuracy_top5"], abs=1e-7)
        assert scores["loss"] == pytest.approx(row["val_loss"], rel=1e-5)
        assert scores["images"] == 449
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["label_names"] == [str(digit) for digit in range(10)]


def test_a_run_is_shown_in_a_few_words(finished):
    run = train(RECIPES["as it is"], finished("as it is"), progress=False)
    text = repr(run)
    assert text.startswith(f"Run(folder={str(run.folder)!r}, epochs=3, best_epoch=")
    assert f"val_accuracy={run.result['last']['val_accuracy']:.4f}".rstrip("0") in text
    assert len(text) < 500
    assert str(run.folder) in run._repr_html_()


def test_training_learns(finished):
    history = result(finished("as it is"))["epochs"]
    assert history[-1]["train_loss"] < history[0]["train_loss"] - 0.3
    assert history[-1]["val_accuracy"] > 0.3


def test_the_best_epoch_is_kept_where_it_is_not_the_last(tmp_path, monkeypatch):
    compute, fake = Scores.compute, iter([0.3, 0.9, 0.5])
    monkeypatch.setattr(
        Classification,
        "on_validation_epoch_start",
        lambda self: (self.val_scores.reset(), setattr(self.val_scores, "fake", next(fake)))[0],
    )
    monkeypatch.setattr(
        Scores,
        "compute",
        lambda self: {**compute(self), **({"accuracy": self.fake} if hasattr(self, "fake") else {})},
    )
    run = train(tiny(), tmp_path / "run", progress=False)
    assert (run.result["best"]["epoch"], run.result["last"]["epoch"]) == (2, 3)
    monkeypatch.undo()
    scores = mrla.evaluate(mrla.load(tmp_path / "run" / "best"), digits_val(), machine=CPU)
    assert scores["loss"] == pytest.approx(run.result["best"]["val_loss"], rel=1e-5)
    assert scores["loss"] != pytest.approx(run.result["last"]["val_loss"], rel=1e-2)


def test_a_finished_run_is_given_and_not_repeated(finished):
    folder = finished("as it is")
    before = content(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run = train(RECIPES["as it is"], folder, progress=False)
    assert run.epochs == result(folder)["epochs"]
    assert run.model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert content(folder) == before
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_two_runs_of_one_recipe_are_equal_and_of_two_seeds_are_not(finished, tmp_path):
    train(RECIPES["as it is"], tmp_path / "again", progress=False)
    assert_same_run(finished("as it is"), tmp_path / "again")
    other = train(tiny(seed=1, epochs=2), tmp_path / "other", progress=False)
    assert other.epochs[0] != result(finished("as it is"))["epochs"][0]


def crash_at_epoch_start(monkeypatch):
    def start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise Crash
        original(self, trainer, pl_module)

    original = History.on_train_epoch_start
    monkeypatch.setattr(History, "on_train_epoch_start", start)


def crash_mid_epoch(monkeypatch, epoch: int = 1, batch: int = 11):
    stop = epoch, batch

    def step(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == stop:
            raise Crash
        return original(self, batch, batch_idx)

    original = Classification.training_step
    monkeypatch.setattr(Classification, "training_step", step)


def crash_between_best_and_last(monkeypatch):
    def write(self, checkpoint, path, storage_options=None):
        if checkpoint["epoch"] == 1 and Path(path).stem == "last":
            raise Crash
        original(self, checkpoint, path, storage_options)

    original = engine.WholeFiles.save_checkpoint
    monkeypatch.setattr(engine.WholeFiles, "save_checkpoint", write)


def crash_while_a_checkpoint_is_written(monkeypatch):
    def write(checkpoint, path):
        if checkpoint["epoch"] == 1:
            Path(path).write_bytes(b"half a file")
            raise Crash
        original(checkpoint, path)

    original = torch.save
    monkeypatch.setattr(torch, "save", write)


def crash_before_the_result(monkeypatch):
    def write(path, content):
        if Path(path).name == "result.json":
            raise Crash
        original(path, content)

    original = fitting.write_json
    monkeypatch.setattr(fitting, "write_json", write)


def crash_before_the_weights(monkeypatch):
    def save(*arguments):
        raise Crash

    monkeypatch.setattr(fitting, "_save_weights", save)


CRASHES = [
    ("two stages", crash_at_epoch_start),
    ("drop path, moving average", crash_mid_epoch),
    ("as it is", crash_between_best_and_last),
    ("as it is", crash_before_the_result),
]
MORE_CRASHES = [
    *((name, crash_at_epoch_start) for name in RECIPES if name != "two stages"),
    ("as it is", crash_while_a_checkpoint_is_written),
    ("drop path, moving average", crash_before_the_weights),
]


@pytest.mark.parametrize(
    ("name", "crash"),
    [*CRASHES, *(pytest.param(*row, marks=pytest.mark.sweep) for row in MORE_CRASHES)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_an_interrupted_run_ends_as_the_uninterrupted_one(finished, name, crash, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        crash(patch)
        with pytest.raises(Crash):
            train(RECIPES[name], tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "result.json").exists()
    torch.manual_seed(123)  # a new process has another state
    train(RECIPES[name], tmp_path / "run", progress=False)
    assert_same_run(finished(name), tmp_path / "run")


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from mrla.train.fitting import train
from mrla.train.task import Classification
from test_fitting import RECIPES

def step(self, batch, batch_idx):
    if (self.current_epoch, batch_idx) == (2, 3):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, batch, batch_idx)

original, Classification.training_step = Classification.training_step, step
train(RECIPES["drop path, moving average"], sys.argv[1], progress=False)
"""


@pytest.mark.sweep
def test_a_killed_process_is_gone_on_with(finished, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent)))
    killed = subprocess.run([sys.executable, str(script), str(tmp_path / "run")], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [row["epoch"] for row in rows(tmp_path / "run" / "history.csv")] == [1, 2]
    train(RECIPES["drop path, moving average"], tmp_path / "run", progress=False)
    assert_same_run(finished("drop path, moving average"), tmp_path / "run")


def test_a_moved_run_is_gone_on_with_and_keeps_its_best_epoch(finished, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        crash_at_epoch_start(patch)
        with pytest.raises(Crash):
            train(RECIPES["as it is"], tmp_path / "here", progress=False)
    (tmp_path / "here").rename(tmp_path / "there")
    train(RECIPES["as it is"], tmp_path / "there", progress=False)
    assert_same_run(finished("as it is"), tmp_path / "there")
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_checkpoints_hold_no_code(finished, name):
    for kind in ("last", "best"):
        checkpoint = torch.load(finished(name) / "checkpoints" / f"{kind}.ckpt", weights_only=True)
        assert {"state_dict", "optimizer_states", "lr_schedulers", "callbacks", "epoch"} <= set(checkpoint)


def test_the_moving_average_is_what_is_saved(finished):
    folder = finished("drop path, moving average")
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    saved = mrla.load(folder).state_dict()
    averaged = {name.removeprefix("model."): tensor for name, tensor in checkpoint["state_dict"].items()}
    assert all(torch.equal(saved[name], averaged[name]) for name in saved)
    raw = checkpoint["current_model_state"]
    assert not torch.equal(saved["conv1.weight"], raw["model.conv1.weight"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 7}, "seed is 0 there, 7 here"),
        ({"optim": replace(tiny().optim, lr=0.05)}, r"optim\.lr is 0\.1 there, 0\.05 here"),
        ({"arm": "plain"}, "arm is light there, plain here"),
        ({"epochs": 4}, "epochs is 3 there, 4 here"),
    ],
    ids=["seed", "lr", "arm", "epochs"],
)
def test_the_folder_of_another_configuration_is_left_alone(finished, changes, named):
    folder = finished("as it is")
    before = content(folder)
    with pytest.raises(ValueError, match=named):
        train(tiny(**changes), folder, progress=False)
    assert content(folder) == before


def test_a_folder_with_somebody_elses_network_is_left_alone(tmp_path):
    mrla.save(timm.create_model("resnet18", channels=(8, 8, 8, 8)), tmp_path)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"holds another network and no run\.json"):
        train(tiny(), tmp_path, progress=False)
    assert content(tmp_path) == before


@pytest.mark.parametrize("damage", ["{", "[]", ""])
@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_a_damaged_json_file_is_named(finished, tmp_path, name, damage):
    (tmp_path / "run.json").write_bytes((finished("as it is") / "run.json").read_bytes())
    (tmp_path / name).write_text(damage)
    with pytest.raises(ValueError, match=rf"{name} is .*damaged.*put an intact copy there, or choose another"):
        train(tiny(), tmp_path, progress=False)
    assert (tmp_path / name).read_text() == damage


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999, None])
@pytest.mark.parametrize("name", ["last", "best"])
def test_a_damaged_checkpoint_is_named_with_a_remedy(finished, tmp_path, name, kept):
    (tmp_path / "checkpoints").mkdir()
    for file in ("run.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt"):
        (tmp_path / file).write_bytes((finished("as it is") / file).read_bytes())
    damaged = tmp_path / "checkpoints" / f"{name}.ckpt"
    whole = damaged.read_bytes()
    if kept is not None:
        damaged.write_bytes(whole[: int(kept * len(whole))])
    elif name == "best":
        damaged.unlink()
    else:
        damaged.write_bytes(b"x" * len(whole))
    before = content(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{name}\.ckpt (is damaged or not a checkpoint|cannot be read).*; .*move .*checkpoints aside"
    ) as caught:
        train(tiny(), tmp_path, progress=False)
    assert "\n" not in str(caught.value)
    assert content(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "training_step", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"the output folder must be writable: got .*file"):
        train(tiny(), tmp_path / "file" / "run", progress=False)
    assert content(tmp_path) == {"file": b"mine"}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    recipe = tiny(optim=Optim(lr=1e20, schedule="constant"))
    with pytest.raises(DivergedError, match=r"NaN or infinite at step \d+; stopped, there is no finished epoch"):
        train(recipe, tmp_path / "run", progress=False)
    assert set(content(tmp_path / "run")) - {"run.json", "log.txt"} == {
        name for name in content(tmp_path / "run") if name.startswith("tensorboard/")
    }


@pytest.mark.parametrize("bad", [17, 27])  # in the middle of the second epoch, and in its last step
def test_the_last_good_checkpoint_outlives_a_loss_that_becomes_nan(finished, tmp_path, monkeypatch, bad):
    def poisoned(logits, labels, **options):
        loss = cross_entropy(logits, labels, **options)
        return loss * float("nan") if logits.requires_grad and next(steps) == bad else loss

    steps = iter(range(1000))
    monkeypatch.setattr("mrla.train.task.cross_entropy", poisoned)
    with pytest.raises(DivergedError, match=rf"at step {bad}; stopped, the last good checkpoint is .*last\.ckpt"):
        train(tiny(), tmp_path / "run", progress=False)
    monkeypatch.undo()
    for kind in ("last", "best"):
        checkpoint = torch.load(tmp_path / "run" / "checkpoints" / f"{kind}.ckpt", weights_only=True)
        assert checkpoint["epoch"] == 0
        assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())
    assert not {"model.safetensors", "best/model.safetensors", "result.json"} & set(content(tmp_path / "run"))
    assert [row["epoch"] for row in rows(tmp_path / "run" / "history.csv")] == [1]
    train(tiny(), tmp_path / "run", progress=False)  # and it can be gone on with
    assert_same_run(finished("as it is"), tmp_path / "run")


def test_a_validation_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    def step(self, batch, batch_idx):
        original(self, batch, batch_idx)
        self.val_scores.loss_sum += float("inf")

    original = Classification.validation_step
    monkeypatch.setattr(Classification, "validation_step", step)
    with pytest.raises(DivergedError, match="validation loss became inf after step 14"):
        train(tiny(), tmp_path / "run", progress=False)


@pytest.mark.parametrize("threads", [1, None])
def test_the_number_of_threads_is_given_back(tmp_path, monkeypatch, threads):
    before, seen = torch.get_num_threads(), []
    other = before + 1
    torch.set_num_threads(other)
    try:
        monkeypatch.setattr(Classification, "on_validation_epoch_start", lambda _: seen.append(torch.get_num_threads()))
        machine = replace(tiny().machine, threads=threads)
        optim = Optim(warmup_epochs=0)
        train(tiny(epochs=1, machine=machine, optim=optim), tmp_path / "run", progress=False)
        assert torch.get_num_threads() == other
        assert seen == [threads or other]
    finally:
        torch.set_num_threads(before)


def test_mixed_precision_runs(tmp_path):
    machine = Machine(accelerator="cpu", precision="bf16-mixed", threads=1)
    run = train(tiny(epochs=2, machine=machine), tmp_path / "run", progress=False)
    assert run.epochs[1]["train_loss"] < run.epochs[0]["train_loss"]
    assert {tensor.dtype for tensor in run.model.parameters()} == {torch.float32}


# From Python: a model and two loaders.


def own_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return mrla.attach(timm.create_model("resnet18_cifar", num_classes=7, channels=(8, 8, 8, 8)), init="released")


def own_loaders(workers: int = 0) -> tuple[DataLoader, DataLoader]:
    draw = torch.Generator().manual_seed(2)
    labels = torch.randint(7, (50,), generator=draw)
    images = torch.randn(50, 3, 8, 8, generator=draw) + labels[:, None, None, None] / 4
    data = TensorDataset(images, labels)
    shuffled = DataLoader(data, batch_size=8, shuffle=True, drop_last=True, num_workers=workers)
    return shuffled, DataLoader(data, batch_size=16)


OWN = {"epochs": 4, "optim": Optim(lr=0.05), "seed": 4, "machine": CPU, "progress": False}


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.sweep), 1])
def test_fit_goes_on_to_the_same_numbers(tmp_path, workers):
    whole = mrla.fit(own_network(), *own_loaders(workers), out=tmp_path / "whole", **OWN)
    assert len(whole.epochs) == 4
    assert whole.epochs[-1]["train_loss"] < whole.epochs[0]["train_loss"]
    with pytest.MonkeyPatch.context() as patch:
        crash_at_epoch_start(patch)
        with pytest.raises(Crash):
            mrla.fit(own_network(), *own_loaders(workers), out=tmp_path / "run", **OWN)
    torch.manual_seed(99)
    mrla.fit(own_network(), *own_loaders(workers), out=tmp_path / "run", **OWN)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    scores = mrla.evaluate(whole.model, own_loaders()[1], machine=CPU)
    assert scores["loss"] == pytest.approx(whole.result["last"]["val_loss"], rel=1e-5)


class WithOneBroken(Dataset):
    """24 images, of which one does not open."""

    def __init__(self, broken: int | None):
        self.broken = broken

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == self.broken:
            raise Crash
        return torch.full((3, 8, 8), float(index)), index % 7


def with_workers(broken: int | None, persistent: bool) -> DataLoader:
    return DataLoader(WithOneBroken(broken), batch_size=8, num_workers=1, persistent_workers=persistent)


@pytest.fixture
def no_collector():
    """The garbage collector, which ends forgotten workers, does not come by."""
    gc.disable()
    yield
    gc.enable()


# The tests hold the error while they count workers, as whoever reports it does.


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("where", ["train", "val", "first of val", "step", "nowhere"])
def test_fit_leaves_no_worker(tmp_path, monkeypatch, where, persistent):
    train_loader = with_workers(9 if where == "train" else None, persistent)
    val_loader = with_workers({"val": 9, "first of val": 0}.get(where), persistent)
    if where == "step":
        crash_mid_epoch(monkeypatch, epoch=0, batch=1)
    with nullcontext() if where == "nowhere" else pytest.raises(Crash) as caught:
        mrla.fit(own_network(), train_loader, val_loader, out=tmp_path / "run", **OWN)
    assert multiprocessing.active_children() == []
    if caught is None:  # the loaders are the caller's and start other workers when they are iterated again
        assert [len(labels) for _, labels in train_loader] == [len(labels) for _, labels in val_loader] == [8] * 3


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("broken", [0, 9])
def test_evaluate_leaves_no_worker(broken):
    with pytest.raises(Crash) as caught:
        mrla.evaluate(own_network(), with_workers(broken, persistent=False), machine=CPU)
    assert multiprocessing.active_children() == []
    assert "worker process" in str(caught.value)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_recipes_run_leaves_no_worker(tmp_path, part):
    for folder in ("train/0", "train/1", "val/0", "val/1"):
        (tmp_path / folder).mkdir(parents=True)
        for name in "ab":
            Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{name}.png")
    broken = tmp_path / part / "1" / "b.png"
    broken.write_bytes(b"not an image")
    images = Folder(root=str(tmp_path), size=8, workers=1)
    with pytest.raises(UndecodableImageError) as caught:
        train(tiny(data=images, batch_size=2, machine=CPU), tmp_path / "run", progress=False)
    assert multiprocessing.active_children() == []
    assert str(broken) in str(caught.value)


def test_fit_trains_the_given_network_in_place(tmp_path):
    model = own_network()
    run = mrla.fit(model, *own_loaders(), out=tmp_path / "run", class_names=list("abcdefg"), **OWN)
    saved = run.model.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["pretrained_cfg"]["label_names"] == list("abcdefg")
    assert config["pretrained_cfg"]["input_size"] == [3, 8, 8]


def test_fit_does_not_go_on_with_another_network_or_setting(tmp_path):
    mrla.fit(own_network(), *own_loaders(), out=tmp_path / "run", **{**OWN, "epochs": 1})
    with pytest.raises(ValueError, match="epochs is 1 there, 4 here"):
        mrla.fit(own_network(), *own_loaders(), out=tmp_path / "run", **OWN)
    with pytest.raises(ValueError, match=r"network\.mrla\.attach"):
        mrla.fit(mrla.detach(own_network()), *own_loaders(), out=tmp_path / "run", **{**OWN, "epochs": 1})


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"epochs": 0}, "epochs must be positive: got 0"),
        ({"optim": Optim(warmup_epochs=4)}, "warmup_epochs must be fewer than epochs=4"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\): got 1.0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \(0, 1\): got 1.0"),
        ({"seed": -1}, "seed must be zero or more: got -1"),
    ],
    ids=str,
)
def test_fit_names_a_wrong_setting(tmp_path, wrong, rule):
    with pytest.raises(ValueError, match=rule):
        mrla.fit(own_network(), *own_loaders(), out=tmp_path / "run", **{**OWN, **wrong})
    assert content(tmp_path) == {}


def test_a_network_that_cannot_be_saved_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "training_step", lambda *_: pytest.fail("trained"))
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 7))
    with pytest.raises(ValueError, match="timm did not make this Sequential"):
        mrla.fit(network, *own_loaders(), out=tmp_path / "run", **OWN)
    assert content(tmp_path) == {}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_evaluate_against_a_loop_written_by_hand(training, smoothing):
    model, batches = own_network().train(training), own_loaders()[1]
    images, labels = batches.dataset.tensors
    with torch.no_grad():
        logits = model.eval()(images)
    ranked = logits.argsort(dim=1, descending=True)
    expected = {
        "loss": cross_entropy(logits, labels, label_smoothing=smoothing).item(),
        "accuracy": (ranked[:, 0] == labels).float().mean().item(),
        "accuracy_top5": (ranked[:, :5] == labels[:, None]).any(dim=1).float().mean().item(),
        "images": 50.0,
    }
    assert 0 < expected["accuracy"] < expected["accuracy_top5"] < 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train(training)
    assert mrla.evaluate(model, batches, label_smoothing=smoothing, machine=CPU) == pytest.approx(expected, rel=1e-6)
    assert model.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("classes", "named"), [(5, False), (6, True)])
def test_top5_is_left_out_where_every_image_would_count(classes, named):
    network = timm.create_model("resnet18", channels=(8, 8, 8, 8), num_classes=classes)
    batches = DataLoader(TensorDataset(torch.randn(6, 3, 16, 16), torch.arange(6) % classes), batch_size=3)
    assert ("accuracy_top5" in mrla.evaluate(network, batches, machine=CPU)) == named


def test_a_run_begun_by_a_version_with_other_scores_has_a_history(tmp_path):
    of_before, of_now = {"epoch": 1, "val_accuracy": 0.5, "val_accuracy_top5": 1.0}, {"epoch": 2, "val_accuracy": 0.6}
    for order in ([of_before, of_now], [of_now, of_before]):
        write_csv(tmp_path / "history.csv", order)
        heading, *lines = (tmp_path / "history.csv").read_text().splitlines()
        assert heading == "epoch,val_accuracy,val_accuracy_top5"
        assert sorted(lines) == ["1,0.5,1.0", "2,0.6,"]


def test_evaluate_needs_an_image():
    data = TensorDataset(torch.randn(0, 3, 8, 8), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="the loader must have at least one image"):
        mrla.evaluate(own_network(), DataLoader(data))


def test_a_frozen_norm_stays_frozen_through_evaluate():
    from mrla.train.arms import build_arm

    model = build_arm(tiny(), Digits().facts()).train()
    model.bn1.eval()
    mrla.evaluate(model, loader(Digits().open("val"), batch_size=64))
    assert not model.bn1.training
    assert model.layer1.training


LABELS = {
    "of several classes": (
        torch.tensor([[0.0, 1, 1], [1, 0, 0]]),
        r"labels must be one class .* float32 of shape .2, 3.:?",
    ),
    "chances": (torch.tensor([0.2, 0.8]), r"labels must be one class .* float32 of shape \(2,\)"),
    "one of many": (torch.tensor([[0, 1, 0], [1, 0, 0]]), r"labels must be one class .* int64 of shape \(2, 3\)"),
    "beyond": (torch.tensor([0, 3]), r"labels must be from 0 to 2, .* 3 classes apart: got 3"),
    "below": (torch.tensor([-1, 0]), r"labels must be from 0 to 2, .* got -1"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_are_not_one_class_are_refused(name, tmp_path):
    labels, message = LABELS[name]
    model = timm.create_model("test_resnet", num_classes=3)
    given = DataLoader(TensorDataset(torch.randn(2, 3, 32, 32), labels), batch_size=2)
    right = DataLoader(TensorDataset(torch.randn(2, 3, 32, 32), torch.tensor([0, 2])), batch_size=2)
    with pytest.raises(ValueError, match=message):
        mrla.evaluate(model, given, machine=CPU)
    with pytest.raises(ValueError, match=message):
        mrla.fit(model, right, given, epochs=1, out=tmp_path / "run", machine=CPU, progress=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):  # found when it is come by
        mrla.fit(model, given, right, epochs=1, out=tmp_path / "run", machine=CPU, progress=False)


def test_class_names_are_counted_before_training(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    batches = DataLoader(TensorDataset(torch.randn(2, 3, 32, 32), torch.tensor([0, 2])), batch_size=2)
    with pytest.raises(ValueError, match=r"class_names must be those of the 3 classes .*: got 2"):
        mrla.fit(model, batches, batches, epochs=1, out=tmp_path / "run", class_names=("cat", "dog"))
    assert not list(tmp_path.iterdir())
