"""How the notebook's whole networks start; the mixers' own starts are in `mrla.ops`."""

import math

import torch
from torch import nn

from mrla.ops import LayerMixer


@torch.no_grad()
def initialise_as_notebook(model: nn.Module) -> None:
    """Draws a whole ResNet anew as the Paddle notebook starts it, with or without mixers.

    Convolutions are normal with standard deviation sqrt(2 / (k in_channels)), k the kernel's elements and groups
    ignored; norms start at weight 1, bias 0, the last one of a block too; the classifier is Xavier-uniform with bias 0;
    mixers as their ``init="notebook"``. Measured on Paddle's defaults (`facts.md`, section 2).

    Args:
        model: The network, changed in place. Random numbers come from torch's global generator, the backbone's first,
            so that a plain and an attached network start with the same backbone.

    Example:
        >>> import timm
        >>> model = timm.create_model("resnet18_cifar")
        >>> initialise_as_notebook(model)
        >>> model.layer1[0].bn2.weight.unique().tolist()
        [1.0]
    """
    modules = [module for name, module in model.named_modules() if "mrla" not in name.split(".")]
    for module in modules:
        if isinstance(module, nn.Conv2d):
            elements = module.kernel_size[0] * module.kernel_size[1]
            module.weight.normal_(std=math.sqrt(2 / (elements * module.in_channels)))
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, LayerMixer):
            module.reset_parameters("notebook")
