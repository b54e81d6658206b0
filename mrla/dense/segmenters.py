"""torchvision's semantic segmenters on any backbone."""

from torch import nn
from torchvision.models.segmentation import FCN, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from mrla.messages.suggestions import nearest

from .backbones import FeatureBackbone, checked_classes, device_of, network, noted, strides, widths

_FORMS = {"fcn": (FCN, FCNHead), "deeplabv3": (DeepLabV3, DeepLabHead)}
SEGMENTERS = tuple(_FORMS)
"""The names that `segmenter` takes."""


def segmenter(
    name: str,
    backbone: nn.Module | str,
    num_classes: int,
    *,
    aux: bool = False,
    freeze_stages: int = -1,
    norm_eval: bool = False,
) -> nn.Module:
    """One of torchvision's semantic segmenters on a backbone's last level, whatever stride that has.

    It is called as torchvision's are: with a batch of images, ``(b, 3, h, w)``, normalised as the backbone wants them,
    it returns a dict with `out`, logits of shape ``(b, num_classes, h, w)``, and with `aux` also `aux`,
    of the same shape.

    torchvision's own have a last level of stride 8. A timm network has one where it was built with ``output_stride=8``,
    which dilates its last stages instead of striding; one built without it has stride 32, and coarser masks.

    The backbone becomes part of the segmenter, in place: what lies behind its last level, its classifier included, is
    taken off it. Give it its mixers before. The new parts are torchvision's, drawn as torchvision draws them.

    Args:
        name: ``"fcn"`` or ``"deeplabv3"``.
        backbone: A timm network with `feature_info`, plain, named or attached; or the name of one, which is then made
            with new weights.
        num_classes: Classes, the background (class 0) included.
        aux: Whether a second head of the kind that FCN has, for an auxiliary loss, reads the level before the last.
        freeze_stages: How many of the backbone's stages get no gradient and stay in eval mode, mixers included: 0 for
            the stem alone, 1 for the stem and the first stage of stride 4 or more, -1 for nothing.
        norm_eval: Whether every BatchNorm of the backbone, those of mixers included, stays in eval mode in training.
            Other than in detectors it does not by default, as in torchvision's segmentation.

    Returns:
        The segmenter, in training mode, where the backbone's parameters are.

    Raises:
        ValueError: If the name is unknown, the backbone has no `feature_info` or no level for `aux`, or a number does
            not fit.
        TypeError: If `backbone` is not a module.

    Example:
        >>> import mrla, timm, torch
        >>> from mrla.dense import segmenter
        >>> backbone = mrla.attach(timm.create_model("test_resnet", output_stride=8), "light")
        >>> model = segmenter("deeplabv3", backbone, num_classes=5, aux=True).eval()
        >>> {key: tuple(logits.shape) for key, logits in model(torch.randn(1, 3, 64, 96)).items()}
        {'out': (1, 5, 64, 96), 'aux': (1, 5, 64, 96)}
    """
    given = {key: value for key, value in locals().items() if key not in ("name", "backbone")}
    if name not in _FORMS:
        raise ValueError(
            f"a segmenter's name must be one of {', '.join(map(repr, _FORMS))}: got {name!r}{nearest(name, _FORMS)}"
        )
    checked_classes(num_classes)
    body = network(backbone)
    last = len(strides(body)) - 1
    if aux and last == 0:
        raise ValueError(
            f"aux reads the level before the last: this {type(body).__name__} has a single one; leave aux out"
        )
    levels = [last - 1, last] if aux else [last]
    in_channels = widths(body, levels)
    model, head = _FORMS[name]
    features = FeatureBackbone(
        body, ["aux", "out"] if aux else ["out"], levels, freeze_stages=freeze_stages, norm_eval=norm_eval
    )
    auxiliary = FCNHead(in_channels[0], num_classes) if aux else None
    made = model(features, head(in_channels[-1], num_classes), auxiliary).to(device_of(body))
    return noted(made, "segmenter", name, given)
