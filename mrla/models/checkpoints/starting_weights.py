"""Starting a network from the weights of a trained one that had other classes."""

from collections.abc import Mapping

from torch import Tensor, nn

from ..parameter_groups import classifiers
from .descriptions import differences


def start_from(model: nn.Module, weights: Mapping[str, Tensor], *, keep_classifier: bool) -> nn.Module:
    """Loads a trained network's weights into one of the same architecture, but for a classifier of other classes.

    Args:
        model: The network, changed in place.
        weights: The trained network's state dict.
        keep_classifier: Whether the classifier is taken too, where it has as many classes.

    Returns:
        `model` itself.

    Raises:
        ValueError: If anything but the classifier differs.

    Example:
        >>> import timm
        >>> trained, model = (timm.create_model("resnet18", num_classes=classes) for classes in (1000, 3))
        >>> start_from(model, trained.state_dict(), keep_classifier=True).fc.out_features
        3
    """
    own = model.state_dict()
    inside = {id(tensor) for part in classifiers(model) for tensor in (*part.parameters(), *part.buffers())}
    of_classifier = {
        name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if id(tensor) in inside
    }
    if keep_classifier:  # one that has another shape is made anew
        alike = all(name in weights and weights[name].shape == own[name].shape for name in of_classifier)
        of_classifier = set() if alike else of_classifier
    kept = {name: tensor for name, tensor in weights.items() if name not in of_classifier}
    expected = {name: tensor for name, tensor in own.items() if name not in of_classifier}
    if found := differences(expected, kept):
        raise ValueError(f"the weights are of another network than this {type(model).__name__}: {found}")
    model.load_state_dict(kept, strict=False)
    return model
