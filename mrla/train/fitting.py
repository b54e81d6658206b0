"""Runs: from a recipe, or from a model and two loaders, to a folder with the trained network and its numbers."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mrla.files.atomic_write import room_for, write_json
from mrla.files.one_writer import alone_in
from mrla.messages.one_line import one_line
from mrla.models.checkpoints.descriptions import describe
from mrla.models.modes import in_eval_mode

from .arms import resolve_defaults
from .engine import (
    QuietEnd,
    Stops,
    WholeFiles,
    end_other_processes,
    keep_checkpoint,
    quiet_lightning,
    quiet_threads,
    trainer_arguments,
)
from .freezing import FrozenAtFirst
from .history import History
from .loaders import Batches, OwnLoaders, RecipeImages, first_batch
from .packages import need
from .progress_lines import duration
from .recipe import Machine, Optim, Recipe, as_dict, check_numbers
from .recipe_tasks import make_task, packages_of
from .run_progress import RunLog, shown_progress
from .runs import BEST, CHECKPOINTS, RESULT, Run, finished_run, open_run, versions
from .stopping import stopped_in_order
from .task import Classification, DivergedError, Task, check_labels
from .threads import thread_limit
from .trained import network_weights, read_checkpoint


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
    model_args: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Run:
    """Trains a network on your own loaders; what `mrla train` does, from Python.

    Called again with the same folder and settings it goes on after the last finished epoch, or gives the finished run.

    Args:
        model: A network of timm's registry or torchvision, attached or not; trained in place (a finished folder gives
            its run and leaves the model alone).
        train_loader: Batches of images (b, c, h, w) and labels (b,).
        val_loader: Such batches for validation.
        epochs: Passes over `train_loader`.
        out: Folder of the run.
        optim: Optimizer and learning rate, `mrla.train.Optim`; its `frozen_epochs` and `old_lr_scale` are for a network
            that is trained already.
        label_smoothing: Smoothing of the labels in training.
        smooth_validation: Whether the validation loss is smoothed too.
        ema_decay: Decay of the moving average of the weights that is validated and saved.
        seed: Decides what is drawn in each step, and the order of a loader that shuffles by the global generator.
        machine: Where and how it is computed, `mrla.train.Machine`.
        class_names: Names of the classes, written beside the weights.
        mean: What images were normalised with, written beside the weights.
        std: What they were divided by after that, written beside the weights.
        architecture: Name of a network that timm did not make, such as ``"torchvision/resnet18"``.
        model_args: Arguments that such a network was built with, such as ``{"num_classes": 10}``.
        progress: Whether it is seen how far it has come: a bar on a terminal, elsewhere (a pipe, a notebook) a line for
            an epoch, a minute apart at least.

    Returns:
        The run.

    Raises:
        ValueError: If a number is out of range, labels are not one class for each image, the network could not be
            saved, or the folder is another run's.
        DivergedError: If the loss becomes NaN or infinite; the last checkpoint is kept.
        NotWrittenError: If the disk is full; what is finished is kept.
        KeyboardInterrupt: After Ctrl-C; what is finished is kept. After SIGTERM a SystemExit with code 143.

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
    need("tensorboard")
    optim, machine = optim or Optim(), machine or Machine()
    check_numbers(epochs=epochs, optim=optim, label_smoothing=label_smoothing, ema_decay=ema_decay, seed=seed)
    # Asked before the training, not after it: a network that cannot be saved should not be trained for hours.
    network = describe(model, model.state_dict(), architecture=architecture, model_args=model_args)
    if (first := first_batch(val_loader)) is None:
        raise ValueError("val_loader must have at least one image: it has none")
    images, labels = first
    classes = count_classes(model, images)
    check_labels(labels, classes)
    if class_names is not None and len(class_names) != classes:
        raise ValueError(
            f"class_names must be those of the {classes} classes that the network tells apart: got {len(class_names)}"
        )
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
    task = Classification(
        model.train(),
        classes=classes,
        optim=optim,
        epochs=epochs,
        label_smoothing=label_smoothing,
        smooth_validation=smooth_validation,
        seed=seed,
        saved={**facts, "architecture": architecture, "model_args": model_args},
    )
    return _run(
        task,
        OwnLoaders(train_loader, val_loader, seed=seed),
        out=Path(out),
        settings=settings,
        ema_decay=ema_decay,
        machine=machine,
        progress=progress,
        own_sampler=False,
    )


def train(recipe: Recipe, out: str | Path, *, progress: bool = True, command: str | None = None) -> Run:
    """Trains the network of a recipe's arm.

    Started again with the same folder and recipe it goes on after the last finished epoch, or gives the finished run.

    Args:
        recipe: Everything that decides the run.
        out: Folder of the run.
        progress: As in `fit`.
        command: The command line, for the run's ``log.txt``.

    Returns:
        The run.

    Raises:
        ValueError: If the data, the network or the folder do not fit the recipe.
        DivergedError: If the loss becomes NaN or infinite; the last checkpoint is kept.
        NotWrittenError: If the disk is full; what is finished is kept.
        KeyboardInterrupt: After Ctrl-C; what is finished is kept. After SIGTERM a SystemExit with code 143.

    Example:
        A training takes a minute, so this is not run with the tests::

            from mrla.train import get_recipe, train

            run = train(get_recipe("digits_resnet18"), "runs/digits")
            print(run.result["last"]["val_accuracy"])
    """
    need(*packages_of(recipe))
    recipe = resolve_defaults(recipe)
    return _run(
        make_task(recipe),
        RecipeImages(recipe),
        out=Path(out),
        settings=as_dict(recipe),
        ema_decay=recipe.ema_decay,
        machine=recipe.machine,
        progress=progress,
        own_sampler=True,
        command=command,
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
        ``loss``, ``accuracy``, ``accuracy_top5`` (fractions; the last where there are more than five classes) and
        ``images``.

    Raises:
        ValueError: If the loader has no image, or labels are not one class for each image.

    Example:
        >>> import mrla, timm
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4))
        >>> model = timm.create_model("test_resnet_basic_cifar_mrla_light", num_classes=4)
        >>> mrla.evaluate(model, DataLoader(data, batch_size=2))["images"]
        4.0
    """
    machine = machine or Machine()
    first = first_batch(batches)
    if first is None:
        raise ValueError("the loader must have at least one image: it has none")
    classes = count_classes(model, first[0])
    check_labels(first[1], classes)
    task = Classification(model, classes=classes, label_smoothing=label_smoothing, smooth_validation=True)
    return _validate(task, batches, machine)


def evaluate_detector(
    model: nn.Module, batches: DataLoader, *, masks: bool = False, machine: Machine | None = None
) -> dict[str, float]:
    """Average precision of a detector over a loader, as COCO's tools count it.

    Args:
        model: A detector of torchvision's kind, such as `mrla.dense.detector` makes.
        batches: Batches of lists of images and of targets, as `mrla.data.DetectionSamples` are collated for evaluation.
        masks: Whether masks are measured too.
        machine: Where it is computed, `mrla.train.Machine`.

    Returns:
        ``box_ap``, ``box_ap50``, ``box_ap75`` and those by size, the same of ``mask_ap``: fractions, -1 for a size
        that no object has.

    Raises:
        ValueError: If the loader has no image.
    """
    need("pycocotools")
    from .detection_task import Detection

    if first_batch(batches) is None:
        raise ValueError("the loader must have at least one image: it has none")
    return _validate(Detection(model, masks=masks, class_names=()), batches, machine or Machine())


def _validate(task: Task, batches: DataLoader, machine: Machine) -> dict[str, float]:
    with (
        stopped_in_order(lambda: "nothing is written"),
        quiet_lightning(),
        thread_limit(machine.threads),
        in_eval_mode(task.model),
    ):
        trainer = L.Trainer(
            **trainer_arguments(machine), logger=False, enable_progress_bar=False, enable_model_summary=False
        )
        with closing(Batches(batches)) as closable:
            # Of several processes each has a part: Lightning gives it a sampler, if it sees the DataLoader.
            seen = batches if trainer.world_size > 1 else closable
            scores = trainer.validate(task, seen, verbose=False)[0]
    return {name.removeprefix("val_"): float(value) for name, value in scores.items()}


def _run(
    task: Task,
    images: OwnLoaders | RecipeImages,
    *,
    out: Path,
    settings: Mapping[str, Any],
    ema_decay: float | None,
    machine: Machine,
    progress: bool,
    own_sampler: bool,
    command: str | None = None,
) -> Run:
    """Trains a task in a folder, from its start or its last finished epoch."""
    checkpoints, metric = out / CHECKPOINTS, f"val_{task.metric}"
    history = History(out)
    log = RunLog(out, history, _what_runs(settings, command))
    callbacks: list[Callback] = [
        history,
        log,
        keep_checkpoint(checkpoints, "best", monitor=metric),
        keep_checkpoint(checkpoints, "last", monitor=None),
    ]
    if task.optim.frozen_epochs:
        callbacks.append(FrozenAtFirst(task.model, epochs=task.optim.frozen_epochs, new=task.new))
    if ema_decay is not None:
        callbacks.append(EMAWeightAveraging(decay=ema_decay, use_buffers=True))
    if progress:
        callbacks.append(shown_progress(history))
    last = checkpoints / "last.ckpt"
    with (
        stopped_in_order(lambda: _left_in(out, task.epochs)) as handler,
        quiet_threads(),
        quiet_lightning(),
        thread_limit(machine.threads),
        ExitStack() as alone,
    ):
        trainer = L.Trainer(
            **trainer_arguments(machine),
            max_epochs=task.epochs,
            callbacks=[Stops(handler), *callbacks],
            logger=QuietEnd(str(out), name="tensorboard", version=""),
            plugins=[] if machine.strategy.startswith(("fsdp", "deepspeed")) else [WholeFiles()],
            gradient_clip_val=task.optim.clip_grad_norm,
            # Else Lightning would add a bar of its own, for pipes too.
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=not own_sampler,
            log_every_n_steps=10,
        )
        # After the trainer, which refuses what the machine cannot do, and before anything is written.
        contents = images.contents
        result = finished_run(out, settings, contents)
        if result is None:
            if trainer.is_global_zero:  # of several processes that train one network the first writes
                alone.enter_context(alone_in(out, (CHECKPOINTS, BEST)))
            result = open_run(out, settings, contents)  # it may have been finished meanwhile
        if result is not None:
            return Run(
                folder=out,
                epochs=result["epochs"],
                result=result,
                is_main_process=trainer.is_global_zero,
                was_finished=True,
            )
        if last.is_file():
            read_checkpoint(last)
            read_checkpoint(checkpoints / "best.ckpt")
        try:
            # What else is written there names itself.
            with closing(images), room_for(out / "tensorboard"):
                trainer.fit(task, datamodule=images, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
        except (KeyboardInterrupt, SystemExit):
            if trainer.is_global_zero:
                log.write("stopped by a signal")
            raise
        except Exception as error:
            if trainer.is_global_zero:
                log.write(f"stopped: {one_line(error)}")
            if not isinstance(error, DivergedError):
                raise
            kept = f"the last good checkpoint is {last}" if last.is_file() else "there is no finished epoch to keep"
            raise DivergedError(f"{error}; stopped, {kept}; try a smaller learning rate") from error
        result = {
            "epochs": history.epochs,
            "last": history.epochs[-1],
            "best": max(history.epochs, key=lambda row: row[metric]),
            "seconds": history.seconds,
            "versions": versions(),
        }
        try:
            if trainer.is_global_zero:
                _save_weights(task, out)
                write_json(out / RESULT, result)
                log.write(f"end, after {duration(history.seconds)} in epochs")
            trainer.strategy.barrier()
        except BaseException:
            end_other_processes(trainer)
            raise
    return Run(folder=out, epochs=history.epochs, result=result, is_main_process=trainer.is_global_zero)


def _left_in(out: Path, epochs: int) -> str:
    """What a run that was stopped has left, and how to go on."""
    last = out / CHECKPOINTS / "last.ckpt"
    try:
        done = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["epoch"] + 1
    except Exception:  # whatever torch raises for a file that is missing or damaged
        return f"{out} has no finished epoch; the same command starts it anew"
    return f"{out} has {done} of {epochs} epochs; the same command goes on after them"


def _what_runs(settings: Mapping[str, Any], command: str | None) -> dict[str, str]:
    """What a run's log says at its start."""
    words = {"command": command} if command is not None else {}
    if "recipe" in settings:
        words["recipe"] = (
            f"{settings['recipe']}: {settings['model']}, arm {settings['arm']}, seed {settings['seed']}, "
            f"{settings['data']['kind']}, {settings['epochs']} epochs, batches of {settings['batch_size']}"
        )
    else:
        words["network"] = (
            f"{settings['network']['architecture']}, seed {settings['seed']}, {settings['epochs']} epochs"
        )
    return {**words, "versions": ", ".join(f"{name} {value}" for name, value in versions().items())}


def _save_weights(task: Task, out: Path) -> None:
    """The last weights into the run's folder, the best ones into ``best/``, both as `mrla.save` writes them."""
    # From the checkpoints: with the moving average on they hold it, also where a run was stopped at its very end and
    # Lightning has put the weights of the last step into the module.
    for kind, folder in (("best", out / BEST), ("last", out)):
        weights = network_weights(read_checkpoint(out / CHECKPOINTS / f"{kind}.ckpt"))
        task.save(folder, weights)


def count_classes(model: nn.Module, images: Tensor) -> int:
    """The number of classes of a network, by its outputs for an image.

    Args:
        model: Network from images to logits.
        images: A batch, of which the first image is looked at.

    Returns:
        The number.
    """
    with in_eval_mode(model), torch.no_grad():
        return model(images[:1].to(next(model.parameters(), images).device)).shape[1]
