"""Networks written as files that other engines run, each file checked against its network before it gets its name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from mrla.files.atomic_write import scratch_folder
from mrla.messages.brief import Brief
from mrla.messages.one_line import one_line
from mrla.models.dry_run import dry_run

from .export_check import (
    ExportMismatch,
    InputDifference,
    answer,
    bound_of,
    check_shapes,
    compare,
    random_image,
    ready_copy,
)
from .export_facts import DYNAMIC, Facts, collect_facts
from .exported_files import open_exported
from .formats import ExportFormat, checked_format
from .formats.programs import trace
from .fusing import fuse as fused_copy


@dataclass(frozen=True, kw_only=True, repr=False)
class Export(Brief):
    """An exported file and what was found when it was checked.

    Attributes:
        path: The file.
        format: Its format.
        facts: What it says of itself; `facts.dynamic` names the dimensions that may have any size.
        compared: The inputs on which its engine and the network were compared.
        bound: What they were allowed to differ by.
        fixed_because: Why height and width are not dynamic, where that was asked for.
    """

    path: Path
    format: str
    facts: Facts
    compared: tuple[InputDifference, ...]
    bound: float
    fixed_because: str | None = None

    def _brief(self) -> dict[str, object]:
        said = {"path": str(self.path), "format": self.format, "difference": self.difference, "bound": self.bound}
        return {**said, "dynamic": ", ".join(self.facts.dynamic)}

    @property
    def difference(self) -> float:
        """The largest difference over the inputs, of the largest output of each."""
        return max(one.difference for one in self.compared)


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str | ExportFormat = "onnx",
    fuse: bool = False,
    example: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: Sequence[int] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    dynamic_size: bool = True,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> Export:
    """Writes a network as one file for another engine, and runs that file against the network.

    The batch is dynamic; height and width too where the network runs and exports with that. The file is run in ONNX
    Runtime, torch or OpenVINO on three inputs of different sizes. If it says something else than the network did in
    eager mode, before anything was folded, it is renamed to ``NAME.failed``. Classes, normalisation and input size
    travel inside. What is not given of them comes from `model.pretrained_cfg`, where `mrla.load` leaves it.

    Args:
        model: A network of one batch of images, in float32; it stays as it is and is read in eval mode.
        path: The file, ending in ``.onnx``, ``.pt2`` or ``.xml`` (beside which OpenVINO's weights lie in ``.bin``).
        format: ``"onnx"``, ``"torch_export"``, ``"openvino"`` or the name of another that
            `mrla.deploy.register_format` was given; or one made with arguments of its own.
        fuse: Whether norms are folded first, see `mrla.fuse`.
        example: Shape of an input, the batch included, where the network does not tell of it.
        class_names: Names of the classes, in the order of the logits; an empty list for none.
        mean: Mean of each channel that images are normalised with.
        std: Standard deviation of each channel, by which they are divided after that.
        input_size: Image shape (c, h, w) that images are brought to; a network of fixed size takes this one alone.
        crop_pct: Part of an image's side that is cut out and fills the input.
        interpolation: How an image is resized, in timm's words.
        dynamic_size: False to fix height and width even where they need not be.
        tolerance: What may differ, of the largest output; None for the format's own (1e-4).
        overwrite: Whether a file that is there is replaced.

    Returns:
        The file and what was compared.

    Raises:
        ExportMismatch: If the file says something else than the network. It is kept as ``NAME.failed``.
        ValueError: If `path` exists or has another suffix, a package is missing, the network is a detector, wrapped or
            not in float32, does not run on its input, cannot be followed or uses an operator that the format lacks, or
            a fact does not fit.
        NotWrittenError: If there is no room for the file, or the disk can only be read.
        TypeError: If `model` is no module.

    Example:
        >>> import mrla, tempfile, timm
        >>> model = mrla.attach(timm.create_model("test_resnet", num_classes=2), "light")
        >>> made = export(model, f"{tempfile.mkdtemp()}/net.pt2", format="torch_export", class_names=["cat", "dog"])
        >>> made.facts.dynamic, made.difference <= made.bound
        (('batch', 'height', 'width'), True)
    """
    path = Path(path)
    format = checked_format(format, path)
    bound = bound_of(format, tolerance)
    _check_free(format.files(path), overwrite)
    eager = ready_copy(model)
    shape = _shape(eager, example, input_size)
    facts = collect_facts(
        getattr(model, "pretrained_cfg", None),
        shape[1:],
        class_names=class_names,
        mean=mean,
        std=std,
        crop_pct=crop_pct,
        interpolation=interpolation,
    )
    _check_class_names(eager, facts)
    prepared = _prepared(eager, shape, fuse=fuse, format=format)
    # Under its final name, since the files that lie beside one are named inside it.
    with scratch_folder(path) as folder:
        beside = folder / path.name
        facts, reason = _write(eager, prepared, shape, beside, format, facts, dynamic_size)
        try:
            compared = compare(open_exported(beside), eager, bound)
        except ExportMismatch as error:
            failed = _move(folder, path, ".failed")
            message = str(error).replace(str(beside), str(path))
            raise ExportMismatch(f"{message}; it is kept as {failed}", failed, error.compared, error.layer) from error
        _move(folder, path, "")
    return Export(path=path, format=format.name, facts=facts, compared=compared, bound=bound, fixed_because=reason)


def _check_free(files: Sequence[Path], overwrite: bool) -> None:
    for file in files:
        if file.is_dir():
            raise ValueError(f"an exported file must be a file: {file} is a folder; choose another path")
        if file.exists() and not overwrite:
            raise ValueError(
                f"an exported file must be new: {file} exists; choose another path, or overwrite=True (--overwrite on "
                f"the command line)"
            )


def _shape(model: nn.Module, example: Sequence[int] | None, input_size: Sequence[int] | None) -> tuple[int, ...]:
    """Shape of an input, with a batch of 2."""
    if example is not None and input_size is not None and tuple(example)[1:] != tuple(input_size):
        raise ValueError(
            f"example and input_size must be of one shape: got {tuple(example)} and {tuple(input_size)}; pass one"
        )
    if example is not None:
        input_size = tuple(example)[1:]
    if input_size is None:
        given = dry_run(model).calls[0].given
        assert given is not None
        input_size = given.shape[1:]
    if not input_size or not all(isinstance(side, int) and side > 0 for side in input_size):
        raise ValueError(f"an input must have positive sizes: got {tuple(input_size)}; pass example=(batch, c, h, w)")
    return (2, *input_size)


def _check_class_names(model: nn.Module, facts: Facts) -> None:
    """Also that the network runs."""
    outputs = answer(model, random_image((2, *facts.input_size)))
    width = outputs[0].shape[-1] if outputs[0].ndim else 1
    if facts.class_names is not None and len(facts.class_names) != width:
        raise ValueError(
            f"class_names must name each of the network's {width} outputs: got {len(facts.class_names)} (the network's "
            f"own label_names where none are given); pass them in the order of the logits, or () for none"
        )


def _prepared(eager: nn.Module, shape: tuple[int, ...], *, fuse: bool, format: ExportFormat) -> nn.Module:
    """The network as it is written: norms folded where asked, and in the operators that suit the engine."""
    return format.prepare(fused_copy(eager, shape) if fuse else eager)


def _write(
    eager: nn.Module,
    prepared: nn.Module,
    shape: tuple[int, ...],
    path: Path,
    format: ExportFormat,
    facts: Facts,
    dynamic_size: bool,
) -> tuple[Facts, str | None]:
    """Writes with height and width open if that works, else fixed; and says why."""
    reason = None
    if dynamic_size:
        opened = replace(facts, dynamic=tuple(DYNAMIC))
        try:
            if len(shape) != 4:
                raise ValueError(f"an input of {shape} has no height and width")
            for other in check_shapes(opened):
                answer(eager, random_image(other))
            # Not at the network's own size, where a small map may have become one pixel: torch would fix that for ever.
            format.write(_traced(prepared, _largest(check_shapes(opened)), opened), path, opened)
            _check_runs(path, opened)
            return opened, None
        except ValueError as error:
            reason = str(error)
    format.write(_traced(prepared, shape, facts), path, facts)
    return facts, reason


def _largest(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """In every dimension the largest of several shapes."""
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True))


def _check_runs(path: Path, facts: Facts) -> None:
    """Raises a ValueError if a file does not run on a size that it is to take: torch's may have guards against it."""
    exported = open_exported(path)
    for shape in check_shapes(facts):
        try:
            exported.run(random_image(shape))
        except Exception as error:  # each engine has errors of its own
            reason = one_line(error, 200)
            raise ValueError(f"the file does not run on {shape} ({type(error).__name__}: {reason})") from error


def _traced(model: nn.Module, shape: tuple[int, ...], facts: Facts) -> ExportedProgram:
    with torch.random.fork_rng(devices=[]):
        return trace(model, shape, facts.dynamic)


def _move(folder: Path, path: Path, suffix: str) -> Path:
    """Gives every file of a folder its place beside `path`, which comes last: a reader finds the others there."""
    path.with_name(f"{path.name}{suffix}").unlink(missing_ok=True)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
        file.replace(path.with_name(f"{file.name}{suffix}"))
    return path.with_name(f"{path.name}{suffix}")
