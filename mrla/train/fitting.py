"""Runs: from a recipe, or from a model and two loaders, to a folder with the trained network and its numbers."""

import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from torch.utils.data import DataLoader

from mrla.models import load, save
from mrla.models.atomic_write import make_folder, read_json, write_json, written_whole
from mrla.models.checkpoints import describe

from .arms import build_arm
from .data import Split, image_facts, loader, open_split
from .history import History
from .randomness import derive_seed
from .recipes import Machine, Optim, Recipe, as_dict, check_numbers
from .sampling import EpochSampler
from .task import Classification, DivergedError

CONFIG, RESULT, CHECKPOINTS, BEST = "run.json", "result.json", "checkpoints", "best"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        folder: Where it is: the last weights as `mrla.save` writes them, the best ones in ``best/``, ``history.csv``,
            ``steps.csv`` and ``result.json``.
        epochs: One row for each epoch: learning rate, training and validation loss and accuracy.
        result: The last epoch's scores, the best epoch's and the seconds it took.
        is_main_process: False in all but one of the processes that trained it together.
    """

    folder: Path
    epochs: list[dict[str, float]]
    result: dict[str, Any]

    is_main_process: bool = True

    @property
    def model(self) -> nn.Module:
        """The network with its last weights, in eval mode."""
        return load(self.folder)


def fit(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader,
    *,
    epochs: int,
    out: str | Path,
    optim: Optim | None = None,
    label_smoothing: float = 0.0,
    smooth_validation: bool = False,
    ema_decay: float | None = None,
    seed: int = 0,
    machine: Machine | None = None,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    architecture: str | None = None,
    progress: bool = True,
) -> Run:
    """Trains a network on your own loaders; what `mrla train` does, from Python.

    Called again with the same folder and settings it goes on after the last finished epoch, or gives the finished run.

    Args:
        model: A network of timm's registry or torchvision, attached or not; trained in place.
        train_loader: Batches of images (b, c, h, w) and labels (b,).
        val_loader: Likewise, for validation.
        epochs: Passes over `train_loader`.
        out: Folder of the run.
        optim: Optimizer and learning rate, `mrla.train.Optim`.
        label_smoothing: Smoothing of the labels in training.
        smooth_validation: Whether the validation loss is smoothed likewise.
        ema_decay: Decay of the moving average of the weights that is validated and saved.
        seed: Decides what is drawn in each step, and the order of a loader that shuffles by the global generator.
        machine: Where and how it is computed, `mrla.train.Machine`.
        class_names: Names of the classes, written beside the weights.
        mean: What images were normalised with, written beside the weights.
        std: Likewise.
        architecture: Name of a network that timm did not make, such as ``"torchvision/resnet18"``.
        progress: Whether a progress bar is shown.

    Returns:
        The run.

    Raises:
        ValueError: If a number is out of range, the network could not be saved, or the folder is another run's.
        DivergedError: If the loss becomes NaN or infinite; the last checkpoint is kept.

    Example:
        >>> import mrla, tempfile, timm
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 2)
        >>> model = mrla.attach(timm.create_model("resnet18", num_classes=2, channels=(8, 8, 8, 8)))
        >>> batches = DataLoader(data, batch_size=4)
        >>> run = mrla.fit(model, batches, batches, epochs=1, out=tempfile.mkdtemp(), progress=False)
        >>> len(run.epochs)
        1
    """
    optim, machine = optim or Optim(), machine or Machine()
    check_numbers(epochs=epochs, optim=optim, label_smoothing=label_smoothing, ema_decay=ema_decay, seed=seed)
    # Asked before the training, not after it: a network that cannot be saved should not be trained for hours.
    network = describe(model, architecture=architecture)
    images, _ = next(iter(val_loader))
    facts = {"class_names": class_names, "mean": mean, "std": std, "input_size": tuple(images.shape[1:])}
    settings = {
        "network": network,
        "optim": asdict(optim),
        "epochs": epochs,
        "label_smoothing": label_smoothing,
        "smooth_validation": smooth_validation,
        "ema_decay": ema_decay,
        "seed": seed,
        "machine": asdict(machine),
    }
    with torch.no_grad():
        was_training = model.training
        classes = model.eval()(images[:1].to(next(model.parameters()).device)).shape[1]
        model.train(was_training)
    task = Classification(
        model.train(),
        classes=classes,
        optim=optim,
        epochs=epochs,
        label_smoothing=label_smoothing,
        smooth_validation=smooth_validation,
        seed=seed,
    )
    loaders = {"datamodule": OwnLoaders(train_loader, val_loader, seed=seed)}
    saved = {**facts, "architecture": architecture}
    return _run(
        task, loaders, saved, Path(out), settings, epochs, optim, ema_decay, machine, progress, own_sampler=False
    )


def train(recipe: Recipe, out: str | Path, *, progress: bool = True) -> Run:
    """Trains the network of a recipe's arm.

    Started again with the same folder and recipe it goes on after the last finished epoch, or gives the finished run.

    Args:
        recipe: Everything that decides the run.
        out: Folder of the run.
        progress: Whether a progress bar is shown.

    Returns:
        The run.

    Raises:
        ValueError: If the data, the network or the folder do not fit the recipe.
        DivergedError: If the loss becomes NaN or infinite; the last checkpoint is kept.
    """
    facts = image_facts(recipe.data)
    task = Classification(
        build_arm(recipe, facts),
        classes=len(facts.class_names),
        optim=recipe.optim,
        epochs=recipe.epochs,
        label_smoothing=recipe.label_smoothing,
        smooth_validation=recipe.smooth_validation,
        seed=recipe.seed,
    )
    images = RecipeImages(recipe)
    saved = {
        "class_names": facts.class_names,
        "mean": facts.mean,
        "std": facts.std,
        "input_size": (facts.in_chans, facts.size, facts.size),
    }
    return _run(
        task,
        {"datamodule": images},
        saved,
        Path(out),
        as_dict(recipe),
        recipe.epochs,
        recipe.optim,
        recipe.ema_decay,
        recipe.machine,
        progress,
        own_sampler=True,
    )


def evaluate(
    model: nn.Module, batches: DataLoader, *, label_smoothing: float = 0.0, machine: Machine | None = None
) -> dict[str, float]:
    """Loss and accuracy of a network over a loader.

    Args:
        model: Network from images to logits.
        batches: Batches of images and labels.
        label_smoothing: Smoothing of the labels in the loss.
        machine: Where it is computed, `mrla.train.Machine`.

    Returns:
        ``loss``, ``accuracy``, ``accuracy_top5`` (fractions) and ``images``.

    Raises:
        ValueError: If the loader has no image.

    Example:
        >>> import mrla, timm
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4))
        >>> model = timm.create_model("test_resnet_basic_cifar_mrla_light", num_classes=4)
        >>> mrla.evaluate(model, DataLoader(data, batch_size=2))["images"]
        4.0
    """
    machine = machine or Machine()
    images, _ = next(iter(batches), (None, None))
    if images is None:
        raise ValueError("the loader must have at least one image: it has none")
    training = model.training
    with torch.no_grad():
        classes = model.eval()(images[:1].to(next(model.parameters()).device)).shape[1]
    task = Classification(model, classes=classes, label_smoothing=label_smoothing, smooth_validation=True)
    with _quiet_lightning(), thread_limit(machine.threads):
        trainer = L.Trainer(**_where(machine), logger=False, enable_progress_bar=False, enable_model_summary=False)
        scores = trainer.validate(task, batches, verbose=False)[0]
    model.train(training)
    return {name.removeprefix("val_"): float(value) for name, value in scores.items()}


class OwnLoaders(L.LightningDataModule):
    """The caller's loaders, the one for training so that a resumed run has the order that it would have had."""

    def __init__(self, train_loader: DataLoader, val_loader: DataLoader, *, seed: int):
        super().__init__()
        self.train_loader, self.val_loader, self.seed = train_loader, val_loader, seed

    def train_dataloader(self) -> Iterable[Any]:
        """For one process seeded in each epoch; with more Lightning's own sampler takes the place of the loader's."""
        assert self.trainer is not None
        return self.train_loader if self.trainer.world_size > 1 else _SeededEpochs(self.train_loader, self._epoch_seed)

    def val_dataloader(self) -> DataLoader:
        """As it is."""
        return self.val_loader

    def _epoch_seed(self) -> int:
        assert self.trainer is not None
        return derive_seed(self.seed, "loader", self.trainer.current_epoch)


class _SeededEpochs:
    """Seeds the global generator when the first batch of an epoch is asked for.

    A loader draws the order, and its workers' seeds, from that generator partly when it is iterated and partly when its
    first batch is asked for; Lightning iterates once more or once less in the first epoch after a resume.
    """

    def __init__(self, batches: DataLoader, epoch_seed: Callable[[], int]):
        self.batches, self.epoch_seed = batches, epoch_seed

    @property
    def sampler(self) -> Any:
        """Where Lightning calls `set_epoch`, if it has it."""
        return self.batches.sampler

    @property
    def batch_sampler(self) -> Any:
        """Likewise."""
        return self.batches.batch_sampler

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        torch.manual_seed(self.epoch_seed())
        yield from self.batches


class RecipeImages(L.LightningDataModule):
    """A recipe's loaders, made when the number of processes is known."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        # Opened and sampled here, so that what does not fit is refused before a process is launched.
        self.parts = {part: open_split(recipe.data, part, seed=recipe.seed) for part in ("train", "val")}
        EpochSampler(size=len(self.parts["train"]), batch_size=recipe.batch_size, drop_last=True)

    def train_dataloader(self) -> DataLoader:
        """Shuffled by (seed, epoch); a last, smaller batch is left out."""
        return self._loader("train", shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """In order, every image once."""
        return self._loader("val", shuffle=False, drop_last=False)

    def _loader(self, part: Split, *, shuffle: bool, drop_last: bool) -> DataLoader:
        assert self.trainer is not None
        return loader(
            self.parts[part],
            batch_size=self.recipe.batch_size,
            seed=derive_seed(self.recipe.seed, part),
            shuffle=shuffle,
            drop_last=drop_last,
            workers=self.recipe.data.workers,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )


def open_run(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Makes a run's folder, or finds out how far an earlier run in it has come.

    Args:
        folder: The folder.
        settings: What decides the run.

    Returns:
        The result if the run is finished, else None.

    Raises:
        ValueError: If the folder belongs to a run with other settings, or is not writable.
    """
    path = folder / CONFIG
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        earlier = read_json(path).get("settings")
        if differences := list(_differences(earlier, settings)):
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise ValueError(
                f"{folder} belongs to a run with other settings ({'; '.join(differences[:3])}{more}); "
                f"choose another --out or remove it"
            )
        result = folder / RESULT
        return read_json(result) if result.is_file() else None
    make_folder(folder)
    if any(entry.name in (CHECKPOINTS, RESULT, "model.safetensors") for entry in folder.iterdir()):
        raise ValueError(f"{folder} holds another network and no {CONFIG}; choose another --out")
    write_json(path, {"settings": settings, "versions": versions()})
    return None


def versions() -> dict[str, str]:
    """Versions and hardware that numbers depend on."""
    packages = ("mrla", "torch", "torchvision", "timm", "lightning")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
    }


def _run(
    task: Classification,
    loaders: dict[str, Any],
    saved: dict[str, Any],
    out: Path,
    settings: Mapping[str, Any],
    epochs: int,
    optim: Optim,
    ema_decay: float | None,
    machine: Machine,
    progress: bool,
    *,
    own_sampler: bool,
) -> Run:
    checkpoints = out / CHECKPOINTS
    history = History(out)
    callbacks: list[Callback] = [
        history,
        _checkpoint(checkpoints, "best", monitor="val_accuracy"),
        _checkpoint(checkpoints, "last", monitor=None),
    ]
    if ema_decay is not None:
        callbacks.append(EMAWeightAveraging(decay=ema_decay, use_buffers=True))
    if progress:
        callbacks.append(RichProgressBar())
    last = checkpoints / "last.ckpt"
    if last.is_file():
        _check_readable(last)
        _check_readable(checkpoints / "best.ckpt")
    with _quiet_lightning(), thread_limit(machine.threads):
        trainer = L.Trainer(
            **_where(machine),
            max_epochs=epochs,
            callbacks=callbacks,
            logger=TensorBoardLogger(str(out), name="tensorboard", version=""),
            plugins=[] if machine.strategy.startswith(("fsdp", "deepspeed")) else [_WholeFiles()],
            gradient_clip_val=optim.clip_grad_norm,
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=not own_sampler,
            log_every_n_steps=10,
        )
        # After the trainer, which refuses what the machine cannot do, and before anything is written.
        if (result := open_run(out, settings)) is not None:
            return Run(folder=out, epochs=result["epochs"], result=result, is_main_process=trainer.is_global_zero)
        start = time.monotonic()
        try:
            trainer.fit(task, **loaders, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
        except DivergedError as error:
            kept = f"the last good checkpoint is {last}" if last.is_file() else "there is no finished epoch to keep"
            raise DivergedError(f"{error}; stopped, {kept}; try a smaller learning rate") from error
        if trainer.interrupted:
            raise KeyboardInterrupt
        seconds = time.monotonic() - start
        if trainer.is_global_zero:
            _save_weights(task, saved, out)
    result = {
        "epochs": history.epochs,
        "last": history.epochs[-1],
        "best": max(history.epochs, key=lambda row: row["val_accuracy"]),
        "seconds": seconds,
        "versions": versions(),
    }
    if trainer.is_global_zero:
        write_json(out / RESULT, result)
    trainer.strategy.barrier()
    return Run(folder=out, epochs=history.epochs, result=result, is_main_process=trainer.is_global_zero)


def _save_weights(task: Classification, saved: dict[str, Any], out: Path) -> None:
    """The last weights into the run's folder, the best ones into ``best/``, both as `mrla.save` writes them."""
    prefix = "model."
    # From the checkpoints: with the moving average on they hold it, also where a run was stopped at its very end and
    # Lightning has put the weights of the last step into the module.
    for kind, folder in (("best", out / BEST), ("last", out)):
        state = torch.load(out / CHECKPOINTS / f"{kind}.ckpt", map_location="cpu", weights_only=True)["state_dict"]
        weights = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        save(task.model, folder, state_dict=weights, **saved)


def _checkpoint(folder: Path, name: str, *, monitor: str | None) -> ModelCheckpoint:
    return _Checkpoint(
        dirpath=folder,
        filename=name,
        monitor=monitor,
        mode="max",
        save_top_k=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def _check_readable(checkpoint: Path) -> None:
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise ValueError(
            f"{checkpoint} is missing or damaged ({type(error).__name__}); put an intact copy there, or remove "
            f"{checkpoint.parent} to start this run anew"
        ) from error


class _Checkpoint(ModelCheckpoint):
    """Knows the best epoch so far also where the run's folder has been moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})


class _WholeFiles(TorchCheckpointIO):
    """Checkpoints written beside and renamed; Lightning moves a file over from the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with written_whole(Path(path)) as beside:
            torch.save(checkpoint, beside)


def _where(machine: Machine) -> dict[str, Any]:
    return {
        "accelerator": machine.accelerator,
        "devices": machine.devices,
        "num_nodes": machine.nodes,
        "strategy": machine.strategy,
        "precision": machine.precision,
        "sync_batchnorm": machine.sync_batchnorm,
    }


def _differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from _differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield f"{path} is {one} there, {other} here"


@contextmanager
def thread_limit(number: int | None) -> Iterator[None]:
    """The body on `number` threads of the CPU, or on as many as there are if it is None."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's lines on devices and its advice on workers and log intervals, which a recipe has decided."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
        # Scores are already those of all processes.
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning 2.6 under torch 2.14
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
