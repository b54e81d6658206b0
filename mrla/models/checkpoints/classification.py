"""Classifiers, and backbones without a head, as the store writes them down."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .descriptions import build_from, describe
from .tasks import NetworkTask, register_task


@register_task
class ClassificationTask(NetworkTask):
    """Networks from a batch of images to logits; and every network that no other task knows."""

    name = "classification"
    noun = "classifier"
    pipeline_tag = "image-classification"
    facts = ("architecture", "model_args", "class_names", "input_size", "mean", "std")

    def owns(self, model: nn.Module) -> bool:
        """True: other tasks are tried before this one."""
        return True

    def owns_config(self, config: Mapping[str, Any]) -> bool:
        """True: other tasks are tried before this one."""
        return True

    def describe(self, model: nn.Module, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Name and arguments in timm's registry or torchvision, mixers, and what is known of images and classes."""
        told = {"label_names" if name == "class_names" else name: value for name, value in facts.items()}
        config = describe(
            model, weights, architecture=told.pop("architecture", None), model_args=told.pop("model_args", None)
        )
        config["pretrained_cfg"].update({name: list(value) for name, value in told.items()})
        return config

    def rebuild(self, config: Mapping[str, Any]) -> nn.Module:
        """The network of that name, with its mixers."""
        return build_from(config)

    def title(self, model: nn.Module) -> str:
        """Its architecture, or its class where that is not known."""
        known = (getattr(module, "pretrained_cfg", None) or {} for module in model.modules())
        return next((facts["architecture"] for facts in known if facts.get("architecture")), type(model).__name__)

    def config_title(self, config: Mapping[str, Any]) -> str:
        """Its architecture."""
        return config["architecture"]

    def check(self, config: Mapping[str, Any], model: nn.Module, path: Path) -> None:
        """Class names must be as many as outputs."""
        labels, classes = (config.get("pretrained_cfg") or {}).get("label_names"), getattr(model, "num_classes", None)
        if labels is not None and isinstance(classes, int) and len(labels) != classes:
            raise ValueError(
                f"class_names must name every class: {path} has label_names of {len(labels)} for {classes} outputs; "
                f"save the network with all its class_names"
            )

    def restore(self, config: Mapping[str, Any], model: nn.Module) -> None:
        """Class names and normalisation in `pretrained_cfg`, for whoever saves the network again."""
        known = getattr(model, "pretrained_cfg", None) or {}
        model.__dict__["pretrained_cfg"] = {**known, **(config.get("pretrained_cfg") or {})}
