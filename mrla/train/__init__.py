"""Training: data, recipes, schedules and runs on Lightning.

Recipes and data descriptions load at once; what needs Lightning loads when first used.
"""

from typing import TYPE_CHECKING, Any

from mrla.data import DATA_KINDS as DATA_KINDS
from mrla.data import Cifar10 as Cifar10
from mrla.data import Cifar100 as Cifar100
from mrla.data import Digits as Digits
from mrla.data import Folder as Folder

from .arm_names import known_arms as known_arms
from .recipe import Machine as Machine
from .recipe import MixerOptions as MixerOptions
from .recipe import Optim as Optim
from .recipe import Recipe as Recipe
from .recipes import RECIPES as RECIPES
from .recipes import get_recipe as get_recipe
from .runs import Run as Run

if TYPE_CHECKING:
    from .fitting import evaluate as evaluate
    from .fitting import fit as fit
    from .fitting import train as train


_LATER = ("evaluate", "fit", "train")


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'mrla.train' has no attribute {name!r}")
    from . import fitting

    return getattr(fitting, name)
