"""What a network is for, and how networks of each task are written down and rebuilt: the table that the store reads."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from mrla.messages.registering import register

_MODULES = {"dense": "mrla.dense"}
"""Who registers the tasks whose networks have a key of their own below ``mrla`` in config.json, by that key.

By name, for `models` must not import what builds on it; a table in place of entry points, which exist only where a
package was installed with its metadata, so not in a checkout on the path. A task of another package is registered by
importing that package.
"""


class NetworkTask(ABC):
    """What networks are for, such as classification: how the store writes one down, and makes it again.

    A subclass that is decorated with `register_task` is known to `mrla.save`, `mrla.load` and `mrla.push`. What is done
    with such a network (how it is scored, drawn or explained) is found by `name` where it is done.

    Attributes:
        name: The task's name, as ``explain.json`` has it.
        noun: What a network of it is called.
        pipeline_tag: What the Hugging Face Hub calls the task.
        facts: What `mrla.save` may be told besides the weights.
    """

    name: ClassVar[str]
    noun: ClassVar[str]
    pipeline_tag: ClassVar[str]
    facts: ClassVar[tuple[str, ...]] = ("class_names",)

    @abstractmethod
    def owns(self, model: nn.Module) -> bool:
        """Whether a network is of this task; classification may say so of any."""

    @abstractmethod
    def owns_config(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json, as `read_config` gives it, is of this task; classification may say so of any."""

    @abstractmethod
    def describe(self, model: nn.Module, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
        """What `rebuild` needs to make a network again, as config.json holds it; that it does is checked.

        Args:
            model: The network.
            weights: Its weights, or those to be saved in their place.
            facts: What the caller tells of it, of those that `facts` names.

        Returns:
            The content of config.json.

        Raises:
            ValueError: If what is known makes another network, or is not JSON.
        """

    @abstractmethod
    def rebuild(self, config: Mapping[str, Any]) -> nn.Module:
        """The network of a config.json at its random start.

        Args:
            config: As `read_config` gives it.

        Returns:
            The network.

        Raises:
            ValueError: If it cannot be built.
        """

    @abstractmethod
    def title(self, model: nn.Module) -> str:
        """What a network is called in reports."""

    @abstractmethod
    def config_title(self, config: Mapping[str, Any]) -> str:
        """What the network of a config.json is called in errors."""

    @abstractmethod
    def check(self, config: Mapping[str, Any], model: nn.Module, path: Path) -> None:
        """Raises a ValueError where what a config.json tells does not fit the network; called by save and load.

        Args:
            config: Content of config.json.
            model: The network.
            path: The file, for the error.
        """

    @abstractmethod
    def restore(self, config: Mapping[str, Any], model: nn.Module) -> None:
        """Leaves what a config.json tells besides on a network that was loaded.

        Args:
            config: As `read_config` gives it.
            model: The network, changed in place.
        """


TASKS: dict[str, NetworkTask] = {}
"""Every task by its name; `register_task` fills it."""

Task = TypeVar("Task", bound=NetworkTask)


def register_task(task: type[Task]) -> type[Task]:
    """Makes a task known under its `name`; a decorator of its class.

    Args:
        task: A subclass of `NetworkTask`, which is made without arguments.

    Returns:
        `task` itself.

    Raises:
        ValueError: If its name is taken; the error names the class that has it, and that class's file.
        TypeError: If it lacks one of the methods.

    Example:
        A network with an output of its own, known to `mrla.save` and `load`::

            @register_task
            class Depth(NetworkTask):
                name = "depth"
                ...
    """
    register(TASKS, getattr(task, "name", ""), task(), "a task")
    return task


def task_of(model: nn.Module) -> NetworkTask:
    """What a network is for.

    Args:
        model: Any network.

    Returns:
        The task that knows it as its own; classification where none does.

    Example:
        >>> import timm
        >>> task_of(timm.create_model("test_resnet")).name
        'classification'
    """
    # Classification, which takes every network, was registered first.
    return next(task for task in reversed(TASKS.values()) if task.owns(model))


def task_of_config(config: Mapping[str, Any]) -> NetworkTask:
    """What a saved network is for.

    Args:
        config: As `read_config` gives it.

    Returns:
        The task that knows it as its own; classification where none does. The module that registers it is imported.

    Example:
        >>> task_of_config({"architecture": "resnet18"}).name
        'classification'
    """
    for key in config.get("mrla") or {}:
        if key in _MODULES:
            import_module(_MODULES[key])
    return next(task for task in reversed(TASKS.values()) if task.owns_config(config))
