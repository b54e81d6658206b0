"""Whether an exported file says what the network says, on inputs of different sizes."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mrla.messages.one_line import one_line
from mrla.models import task_of

from .export_facts import Facts
from .exported_files import Exported, open_exported
from .first_difference import first_difference
from .formats import ExportFormat, get_format
from .fusing import WRAPPERS, largest_difference, tensors_in

_BATCHES = (1, 2, 3)
_STEP = 32
"""By how much the second and third input are larger: what networks that halve an image five times can take."""


@dataclass(frozen=True)
class InputDifference:
    """One input on which a file and its network were compared.

    Attributes:
        shape: The input's shape.
        difference: The largest difference, of the largest number that the network gives.
    """

    shape: tuple[int, ...]
    difference: float


class ExportMismatch(ValueError):
    """An exported file's outputs differ from its network's.

    Attributes:
        path: The file; `mrla.deploy.export` has renamed it.
        compared: What was compared.
        layer: Path of the first layer that differs, where it was found.
    """

    def __init__(self, message: str, path: Path, compared: Sequence[InputDifference], layer: str | None):
        super().__init__(message)
        self.path, self.compared, self.layer = path, tuple(compared), layer


def check_export(
    path: str | Path, model: nn.Module, *, tolerance: float | None = None, threads: int | None = None
) -> tuple[InputDifference, ...]:
    """Runs an exported file in its engine on three random inputs of different sizes, against the network itself.

    The batches are 1, 2 and 3; where the file takes images of any size, the second is higher and the third is wider.

    Args:
        path: A file that `mrla.deploy.export` wrote; it stays as it is.
        model: The network that it is to be; it is read in eval mode and in float32.
        tolerance: What may differ, of the largest number that the network gives; None for the format's own.
        threads: Threads of the engine; None for as many as torch takes.

    Returns:
        What was compared.

    Raises:
        ExportMismatch: If they differ by more, or in shape.
        ValueError: If the file cannot be read, or the network does not run on the file's inputs.

    Example:
        >>> import tempfile
        >>> from mrla.deploy import export
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> path = export(model, f"{tempfile.mkdtemp()}/net.pt2", format="torch_export").path
        >>> len(check_export(path, model))
        3
    """
    exported = open_exported(path, threads=threads)
    return compare(exported, ready_copy(model), bound_of(get_format(exported.format), tolerance))


def compare(exported: Exported, model: nn.Module, bound: float) -> tuple[InputDifference, ...]:
    """What `check_export` does, of a file that is open and a network that is ready.

    Args:
        exported: The file.
        model: The network, as `ready_copy` gives it.
        bound: What may differ.

    Returns:
        What was compared.

    Raises:
        ExportMismatch: As `check_export`.
        ValueError: As `check_export`.
    """
    compared, worst = [], None
    for shape in check_shapes(exported.facts):
        image = random_image(shape)
        expected = answer(model, image)
        try:
            found = exported.run(image)
        except Exception as error:  # each engine has errors of its own
            reason = one_line(error, 200)
            raise ExportMismatch(
                f"{exported.path} does not run on {shape}, as the network does ({type(error).__name__}: {reason}); "
                f"export with dynamic_size=False, or in another format",
                exported.path,
                compared,
                None,
            ) from error
        same = [value.shape for value in found] == [value.shape for value in expected]
        difference = max(map(largest_difference, found, expected), default=0.0) if same else float("inf")
        compared.append(InputDifference(shape, difference))
        if worst is None or difference > worst[0]:
            worst = (difference, image)
    assert worst is not None
    if worst[0] > bound:
        raise _mismatch(exported, model, worst[1], worst[0], bound, compared)
    return tuple(compared)


def _mismatch(
    exported: Exported,
    model: nn.Module,
    image: Tensor,
    difference: float,
    bound: float,
    compared: list[InputDifference],
) -> ExportMismatch:
    format = get_format(exported.format)()
    layer = first_difference(exported.path, format, model, image, bound)
    if layer is not None:
        place = f"the first layer that differs is {layer}"
    elif type(format).layer_values is ExportFormat.layer_values:
        place = (
            f"where it begins is not looked for in files of {format.name}; the same export with format='onnx' may tell"
        )
    else:
        place = "no layer was found at which it begins"
    return ExportMismatch(
        f"an exported file must say what its network says: {exported.path} differs by {difference:.1e} of the largest "
        f"output on {tuple(image.shape)}, and {bound:.0e} is allowed; {place}; export it again without fuse, or in "
        f"another format",
        exported.path,
        compared,
        layer,
    )


def check_shapes(facts: Facts) -> list[tuple[int, ...]]:
    """Shapes of three inputs that a file says it takes.

    Args:
        facts: What it says.

    Returns:
        The shapes.

    Example:
        >>> check_shapes(Facts(input_size=(3, 64, 64), dynamic=("batch", "height", "width")))
        [(1, 3, 64, 64), (2, 3, 96, 64), (3, 3, 64, 128)]
    """
    shapes = [[batch, *facts.input_size] for batch in _BATCHES]
    if "height" in facts.dynamic:
        shapes[1][2] += _STEP
    if "width" in facts.dynamic:
        shapes[2][3] += 2 * _STEP
    return [tuple(shape) for shape in shapes]


def random_image(shape: tuple[int, ...]) -> Tensor:
    """Numbers as a normalised image has them, always the same ones of a shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def answer(model: nn.Module, image: Tensor) -> list[Tensor]:
    """What a network says, as a list of its outputs.

    Args:
        model: The network.
        image: The input.

    Returns:
        The outputs.

    Raises:
        ValueError: If it does not run, or gives no numbers that could be compared.
    """
    try:
        with torch.inference_mode():
            outputs = tensors_in(model(image.clone()))
    except Exception as error:  # whatever a foreign network raises
        reason = one_line(error, 200)
        raise ValueError(
            f"{type(model).__name__} does not run on {tuple(image.shape)} ({type(error).__name__}: {reason}); pass "
            f"input_size=(channels, height, width), or example=(batch, ...), of what it takes"
        ) from error
    if not outputs or not all(value.isfinite().all() for value in outputs):
        raise ValueError(
            f"an exported file is checked by what the network says to random images: this {type(model).__name__} gives "
            f"{'numbers that are not finite' if outputs else 'no tensor'}; see to that first"
        )
    return outputs


def ready_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode on the CPU, whose parameters require no gradient.

    Args:
        model: The network.

    Returns:
        The copy.

    Raises:
        ValueError: If it is a detector or segmenter, wrapped, not in float32, on the meta device or cannot be copied.
        TypeError: If it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is exported: got {type(model).__name__}; load it with mrla.load first")
    kind = type(model).__name__
    if task_of(model).name != "classification":
        raise ValueError(
            f"only networks of one batch of images are exported so far: this {kind} is a detector or segmenter of "
            f"mrla.dense, which takes lists of images or gives a dict; export its backbone"
        )
    if isinstance(model, torch.jit.ScriptModule) or kind in WRAPPERS:
        raise ValueError(f"export before wrapping: {kind} hides the layers; export first, then wrap")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_meta:
            raise ValueError(f"weights on the meta device have no numbers to export: load those of this {kind} first")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"networks are exported in float32: got weights of {tensor.dtype}; call model.float()")
    try:
        return copy.deepcopy(model).cpu().eval().requires_grad_(False)
    except Exception as error:  # whatever a foreign attribute raises
        raise ValueError(
            f"{kind} cannot be copied ({type(error).__name__}: {str(error)[:200]}), and a copy is exported; make "
            f"copy.deepcopy(model) work"
        ) from error


def bound_of(format: ExportFormat | type[ExportFormat], tolerance: float | None) -> float:
    """What may differ in a format; raises a ValueError if it is not above 0."""
    if tolerance is not None and not 0 < tolerance < float("inf"):
        raise ValueError(
            f"tolerance must be above 0, of the largest output: got {tolerance}; leave it out for {format.bound}"
        )
    return format.bound if tolerance is None else tolerance
