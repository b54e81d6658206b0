"""The runs of a comparison: a recipe's, each in a process of its own, or those of a caller's network and loaders."""

import copy
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

from mrla.data.samples import loader
from mrla.files.atomic_write import room_for, write_json
from mrla.models import is_attached
from mrla.models.checkpoints.descriptions import describe
from mrla.ops import METHODS, is_method
from mrla.train.arm_names import parse_arm
from mrla.train.arms import attach_arm, resolve_defaults
from mrla.train.fitting import count_classes, fit
from mrla.train.loaders import RecipeImages, first_batch
from mrla.train.plugins import plugins_for
from mrla.train.recipe import Recipe, as_dict
from mrla.train.recipe_tasks import build_network
from mrla.train.run_progress import LOG
from mrla.train.runs import open_run
from mrla.train.task import check_labels

Folders = Mapping[tuple[str, int], Path]
"""A folder for each arm and seed."""
OnProgress = Callable[[int, int], None]

SAME_ORDER = (
    "train_loader does not shuffle: runs of all seeds see the images in one order and differ, if at all, in the first "
    "weights of the mixers and in dropout. Such runs are near copies of one another, so their spread is too small and "
    "the interval too narrow; compare with DataLoader(..., shuffle=True)."
)
"""Said of a comparison whose seeds do not decide the order of the images."""


class RecipeRuns:
    """Runs of a recipe, several at once.

    Args:
        recipe: The recipe; its `arm` and `seed` do not matter.
        jobs: Runs at once; None for as many as the CPU has cores for, or one where a GPU may be used.

    Raises:
        ValueError: If the images do not fit the recipe.
    """

    def __init__(self, recipe: Recipe, jobs: int | None):
        self.recipe = resolve_defaults(recipe)
        self.settings = as_dict(self.recipe)
        self.notes: list[str] = []  # its loaders shuffle by the seed
        self._jobs = jobs or _default_jobs(recipe)
        self.contents = RecipeImages(self.recipe).contents

    def network(self, arm: str, seed: int) -> nn.Module:
        """An arm at its start."""
        return build_network(self._of(arm, seed))

    def images(self) -> Tensor:
        """A batch for validation; of images that differ in size, those that are as large as the first."""
        part = self.recipe.data.open("val")
        images, _ = next(iter(loader(part, batch_size=min(self.recipe.batch_size, len(part)))))
        if isinstance(images, list):
            images = torch.stack([image for image in images if image.shape == images[0].shape])
        return images

    def make(self, folders: Folders, on_progress: OnProgress) -> None:
        """Makes every run that is not finished."""
        recipes = {folder: self._of(arm, seed) for (arm, seed), folder in folders.items()}
        names = {parse_arm(arm).network for arm, _ in folders}
        methods = [METHODS[name] for name in sorted(names) if is_method(name)]
        plugins = plugins_for([type(self.recipe.data), *methods])
        waiting = deque(
            folder for folder, recipe in recipes.items() if open_run(folder, as_dict(recipe), self.contents) is None
        )
        total = self.recipe.epochs * len(folders)
        running: dict[Path, subprocess.Popen] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._jobs:
                    folder = waiting.popleft()
                    running[folder] = _start(folder, recipes[folder], plugins)
                time.sleep(0.2)
                for folder in [folder for folder, process in running.items() if process.poll() is not None]:
                    process = running.pop(folder)
                    process.communicate()  # closes its standard input
                    if process.returncode:
                        raise ValueError(_why_it_ended(folder, process.returncode))
                on_progress(sum(_epochs_done(folder) for folder in recipes), total)
        finally:
            for process in running.values():
                process.kill()
            for process in running.values():
                process.communicate()

    def _of(self, arm: str, seed: int) -> Recipe:
        return replace(self.recipe, arm=arm, seed=seed)


class OwnRuns:
    """Runs of a caller's network and loaders, one after the other in this process.

    Args:
        recipe: What is not the network's or the images': optimizer, epochs, mixers, seed, machine.
        model: A plain network, left as it is.
        train_loader: Batches for training.
        val_loader: Batches for validation.
        architecture: The network's name, where timm did not make it.
        model_args: What it was built with, where timm did not make it.

    Raises:
        ValueError: If one of the three is missing, the network has mixers or could not be saved, or the recipe asks
            for several devices.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module | None,
        train_loader: DataLoader | None,
        val_loader: DataLoader | None,
        architecture: str | None,
        model_args: Mapping[str, Any] | None,
    ):
        given = {"model": model, "train_loader": train_loader, "val_loader": val_loader}
        if missing := [name for name, value in given.items() if value is None]:
            raise ValueError(f"model, train_loader and val_loader go together: give {' and '.join(missing)} too")
        assert model is not None
        assert train_loader is not None
        assert val_loader is not None
        if is_attached(model):
            raise ValueError("model must be a plain network, since the arms differ in their mixers: call mrla.detach")
        if recipe.machine.devices not in (1, "auto") or recipe.machine.nodes != 1:
            raise ValueError(
                f"a comparison of your own model runs in this process, on one device: got machine.devices="
                f"{recipe.machine.devices}, machine.nodes={recipe.machine.nodes}; compare a recipe for several"
            )
        if (first := first_batch(val_loader)) is None:
            raise ValueError("val_loader must have at least one image: it has none")
        self._images: Tensor = first[0]
        network = describe(model, model.state_dict(), architecture=architecture, model_args=model_args)
        check_labels(first[1], count_classes(model, first[0]))
        self.recipe = replace(recipe, machine=replace(recipe.machine, devices=1))
        self.settings = {
            **as_dict(self.recipe),
            "model": network["architecture"],
            "model_args": network["model_args"],
            "pretrained": False,
            "data": {"kind": "loaders"},
            "batch_size": getattr(train_loader, "batch_size", None),
        }
        self.contents = None  # what a caller's loaders give is not known
        self.notes = [SAME_ORDER] if _keeps_its_order(train_loader) else []
        self._model, self._loaders = model, (train_loader, val_loader)
        self._named = {"architecture": architecture, "model_args": model_args}

    def network(self, arm: str, seed: int) -> nn.Module:
        """An arm at its start: a copy of the caller's network, with the arm's mixers."""
        if arm != "plain" and not is_method(parse_arm(arm).network):
            raise ValueError(
                f"arms of your own model must be plain or of {', '.join(METHODS)}: got {arm!r}, which is built into a "
                f"network; compare a recipe for it"
            )
        twin = copy.deepcopy(self._model)
        return twin if arm == "plain" else attach_arm(twin, replace(self.recipe, arm=arm, seed=seed))  # type: ignore[arg-type]

    def images(self) -> Tensor:
        """A batch for validation."""
        return self._images

    def make(self, folders: Folders, on_progress: OnProgress) -> None:
        """Makes every run that is not finished."""
        recipe = self.recipe
        for done, ((arm, seed), folder) in enumerate(folders.items(), start=1):
            fit(
                self.network(arm, seed),
                *self._loaders,
                epochs=recipe.epochs,
                out=folder,
                optim=recipe.optim,
                label_smoothing=recipe.label_smoothing,
                smooth_validation=recipe.smooth_validation,
                ema_decay=recipe.ema_decay,
                seed=seed,
                machine=recipe.machine,
                progress=False,
                **self._named,
            )
            on_progress(done * recipe.epochs, len(folders) * recipe.epochs)


def _keeps_its_order(loader: Any) -> bool:
    """Whether a loader is known to give the same order always; of a sampler of the caller's it is not known."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))
    return isinstance(sampler, SequentialSampler) or isinstance(loader, Sequence)


def _default_jobs(recipe: Recipe) -> int:
    if recipe.machine.accelerator != "cpu" or recipe.machine.threads is None:
        return 1
    return max(1, (os.cpu_count() or 1) // recipe.machine.threads)


def _why_it_ended(folder: Path, code: int) -> str:
    log = folder / LOG
    number = -code if code < 0 else code - 128 if code > 128 else 0  # a shell's or our own way to tell of a signal
    kept = "its finished epochs are kept, and the same command goes on after them"
    if number in (signal.SIGTERM, signal.SIGINT):
        return f"the run {folder.name} was stopped by {signal.Signals(number).name}; {kept}"
    if number == signal.SIGKILL:
        return (
            f"the run {folder.name} was ended by signal 9 (SIGKILL), most likely because memory ran out; take fewer "
            f"--jobs or a machine with more: {kept}"
        )
    if number in signal.valid_signals():
        return f"the run {folder.name} was ended by signal {number} ({signal.Signals(number).name}, see {log}); {kept}"
    told = log.read_text(errors="replace").strip().splitlines() or ["no message"]
    return f"the run {folder.name} failed: {told[-1]} (see {log})"


def _start(folder: Path, recipe: Recipe, plugins: Sequence[str]) -> subprocess.Popen:
    write_json(folder / "recipe.json", as_dict(recipe))
    # The run itself says in this file what it does.
    with room_for(folder / LOG), (folder / LOG).open("a") as log:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mrla.analysis.comparison.worker",
                str(folder / "recipe.json"),
                str(folder),
                *plugins,
            ],
            stdin=subprocess.PIPE,  # never written to: it closes when this process is gone
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _epochs_done(folder: Path) -> int:
    history = folder / "history.csv"
    return max(0, len(history.read_text().splitlines()) - 1) if history.is_file() else 0
