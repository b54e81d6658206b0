"""Does fine-tuning with mixers do better than plain fine-tuning? A small experiment on real images, with no download.

    python benchmarks/finetuning_digits.py --out FOLDER [--seeds 8] [--arms plain,light,base]

scikit-learn's scans of the digits 0 to 4 train a narrow ResNet-18; then ``mrla compare --recipe finetune`` starts from
its weights on the digits 5 to 9, which it has never seen. All images lie as PNG files in folders, as a user's would.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from mrla.analysis import compare
from mrla.cli import print_comparison
from mrla.train import Folder, Machine, get_recipe, train

ONE_THREAD = Machine(accelerator="cpu", threads=1)


def write_images(root: Path, digits: Sequence[int]) -> Folder:
    """The scans of some digits as PNG files, two thirds for training and the rest for validation."""
    scans: Any = load_digits()
    chosen = [number for number, label in enumerate(scans.target) if label in digits]
    parts = train_test_split(chosen, train_size=2 / 3, stratify=scans.target[chosen], random_state=0)
    for part, numbers in zip(("train", "val"), parts, strict=True):
        for number in numbers:
            folder = root / part / str(scans.target[number])
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (scans.images[number] * (255 / 16)).round().astype("uint8")
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return Folder(root=str(root), size=16, crop_pct=1.0, workers=0)


def main() -> None:
    """Makes the images, the network to start from, and the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the experiment")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--arms", default="plain,light,base")
    parser.add_argument("--epochs", type=int, default=30, help="of the training that the network starts from")
    parser.add_argument("--tuning_epochs", type=int, default=12, help="of the fine-tuning, as in the recipe")
    options = parser.parse_args()
    digits = get_recipe("digits_resnet18")
    first = write_images(options.out / "digits-0-4", range(5))
    optim = replace(digits.optim, warmup_epochs=min(digits.optim.warmup_epochs, options.epochs - 1))
    start = replace(digits, arm="plain", data=first, epochs=options.epochs, optim=optim, machine=ONE_THREAD)
    run = train(start, options.out / "trained", progress=False)
    print(f"trained on the digits 0 to 4: {100 * run.result['last']['val_accuracy']:.2f} % of the validation part")
    second = write_images(options.out / "digits-5-9", range(5, 10))
    # 597 images to train on: with batches of 64 there would be 9 steps an epoch.
    recipe = replace(get_recipe("finetune"), model=str(run.folder), data=second, batch_size=16, machine=ONE_THREAD)
    recipe = replace(recipe, epochs=options.tuning_epochs)
    result = compare(recipe, arms=options.arms.split(","), seeds=options.seeds, out=options.out / "compared")
    print_comparison(result.content, result.folder)


if __name__ == "__main__":
    main()
