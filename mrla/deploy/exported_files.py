"""Exported files run by their engines."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mrla.messages.one_line import one_line
from mrla.models import is_saved

from .export_facts import Facts, facts_from_json
from .formats import FORMATS, format_of

Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """A file that `mrla.deploy.export` wrote, ready to be called with a batch.

    Attributes:
        path: The file.
        format: Its format.
        facts: What it says of itself.
        run: One pass, which gives every output in a list.
    """

    path: Path
    format: str
    facts: Facts
    run: Run

    def __call__(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The network's output on a batch of float32 on the CPU, or a tuple where it has several."""
        outputs = self.run(images)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class ExportedNetwork(nn.Module):
    """An exported file as a network in eval mode on the CPU, without parameters of its own.

    It has `pretrained_cfg` in timm's form, with what the file says of its images and classes.

    Args:
        exported: The file.
    """

    def __init__(self, exported: Exported):
        super().__init__()
        facts = exported.facts
        self.exported = exported
        self.in_chans = facts.input_size[0]
        known = {"input_size": facts.input_size, "mean": facts.mean, "std": facts.std, "crop_pct": facts.crop_pct}
        known |= {"interpolation": facts.interpolation, "label_names": facts.class_names}
        self.pretrained_cfg = {name: value for name, value in known.items() if value is not None}
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """The first output on a batch, which may lie on any device."""
        return self.exported.run(images.float().cpu())[0].to(images.device)


def is_exported(path: str | Path) -> bool:
    """Whether a file's name says that `mrla.deploy.export` wrote it: ``.onnx``, ``.pt2``, ``.xml`` and the like.

    Args:
        path: The file; it need not be there.

    Returns:
        Whether a registered format has that ending.

    Example:
        >>> is_exported("network.onnx"), is_exported("runs/network")
        (True, False)
    """
    return format_of(path) is not None and not is_saved(path)


def open_exported(path: str | Path, *, threads: int | None = None) -> Exported:
    """Reads an exported file, to run it on the CPU.

    Args:
        path: A file that `mrla.deploy.export` wrote. Torch may unpickle what is in a ``.pt2``: open your own files
            only.
        threads: Threads that the engine takes; None for as many as torch takes.

    Returns:
        The file, to be called.

    Raises:
        ValueError: If it is missing or damaged, tells nothing of itself, or a package that runs it is not installed.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from mrla.deploy import export
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> path = f"{tempfile.mkdtemp()}/net.pt2"
        >>> made = export(model, path, format="torch_export", class_names=["cat", "dog"])
        >>> exported = open_exported(path)
        >>> exported.facts.class_names, tuple(exported(torch.randn(3, 3, 96, 64)).shape)
        (('cat', 'dog'), (3, 2))
    """
    path = Path(path)
    kind = format_of(path)
    if kind is None:
        suffixes = ", ".join(format.suffix for format in FORMATS.values())
        raise ValueError(f"an exported file must end in one of {suffixes}: got {path}")
    if not path.is_file():
        raise ValueError(f"an exported file must exist: {path} {'is a folder' if path.is_dir() else 'does not'}")
    kind.check_packages()
    format = kind()
    try:
        text, session = format.open(path, threads=threads or torch.get_num_threads())
    except Exception as error:  # each engine has errors of its own
        reason = one_line(error, 200)
        raise ValueError(
            f"{path} is damaged or not a file of {format.name} ({type(error).__name__}: {reason}); export it again"
        ) from error
    if text is None:
        raise ValueError(f"{path} tells nothing of its input and classes; write it with mrla.deploy.export")
    return Exported(path, format.name, facts_from_json(text, str(path)), partial(format.values, session))
