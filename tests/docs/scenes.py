"""What the reader of a page has already, made small: photographs, networks, runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from golden_cases import model_case
from PIL import Image

import mrla
from mrla.data import Shapes
from mrla.data.sources.shapes import write_coco
from mrla.train import Machine, get_recipe
from mrla.train.fitting import train
from mrla.train.recipe import Recipe

_COLOURS = {"cat": (200, 120, 60), "dog": (60, 120, 200), "horse": (80, 190, 90)}


def photos(folder: str = "photos", per_class: int = 8, classes: int = 2) -> None:
    """``train/`` and ``val/`` with a folder a class: noisy patches of a colour of their own, 48x40 pixels."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, colour in list(_COLOURS.items())[:classes]:
            place = Path(folder, split, name)
            place.mkdir(parents=True)
            for index in range(per_class):
                pixels = np.clip(draw.normal(colour, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.jpg")


def network(folder: str = "small", classes: int = 2) -> None:
    """A folder of `mrla.save`: an untrained plain ResNet of narrow stages, for images of 32x32."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", channels=(8, 8, 16, 16), num_classes=classes)
    names = [*_COLOURS, *(f"kind {index}" for index in range(classes))][:classes]
    mrla.save(model, folder, class_names=names, input_size=(3, 32, 32))


def short_recipe(arm: str = "light") -> Recipe:
    """One epoch on the digits, of a narrow network."""
    recipe = get_recipe("digits_resnet18")
    optim = replace(recipe.optim, warmup_epochs=0)
    machine = Machine(accelerator="cpu", threads=1)
    model_args = {"channels": [8, 8, 8, 8]}
    return replace(recipe, arm=arm, model_args=model_args, epochs=1, optim=optim, machine=machine)


def run(folder: str, arm: str = "light") -> None:
    """A finished run of `short_recipe`."""
    train(short_recipe(arm), folder, progress=False)


def run_on_photos(folder: str, root: str = "photos", arm: str = "light") -> None:
    """A finished run of the recipe for one's own images, from the network of `network`."""
    recipe = get_recipe("finetune")
    network(f"{folder}-start")
    changes = {"model": f"{folder}-start", "arm": arm, "epochs": 1, "batch_size": 4}
    optim = replace(recipe.optim, warmup_epochs=0, frozen_epochs=0)
    data = replace(recipe.data, root=root, workers=0)
    machine = Machine(accelerator="cpu", threads=1)
    train(replace(recipe, optim=optim, data=data, machine=machine, **changes), folder, progress=False)


def coco(folder: str = "coco") -> None:
    """A COCO folder of drawn images."""
    write_coco(Shapes(images=8, val_images=4, image_size=64, max_objects=3), folder)


def picture(name: str = "photo.jpg", size: int = 32) -> None:
    """One image."""
    pixels = np.random.default_rng(1).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(name)


def released_checkpoint(name: str = "r50.pth.tar", architecture: str = "resnet50_mrlal") -> None:
    """A checkpoint as the released code saves one, of weights with which the released network was run."""
    torch.save({"state_dict": model_case(architecture).state}, name)
