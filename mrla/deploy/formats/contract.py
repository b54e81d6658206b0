"""What a format of export is, and the table of all formats that export, verification, benchmarks and commands read."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mrla.messages.registering import IMPORTED, place_of, register
from mrla.messages.suggestions import nearest

from ..export_facts import Facts

INPUT, OUTPUT = "images", "logits"
"""What the first input and output are called in a file; further outputs get ``logits_1`` and so on."""


class Opened(NamedTuple):
    """A file that an engine has read.

    Attributes:
        facts: What `Facts.to_json` gave when it was written; None if the file has nothing of it.
        session: What the engine runs; `ExportFormat.values` is given it.
    """

    facts: str | None
    session: Any


class ExportFormat(ABC):
    """A form of file in which another engine runs a network.

    A subclass that is decorated with `register_format` is known to `mrla.export`, `mrla.deploy.check_export`,
    `mrla.deploy.open_exported`, `mrla export --format`, `mrla predict` and the arms of `mrla bench`. It is made
    without arguments where a name is given; what it can be told besides (such as images to calibrate with) are
    arguments with defaults, and `mrla.export` takes such an object as `format`.

    Attributes:
        name: What it is called, as `mrla.export` takes it.
        suffix: What its files' names end with. Of two formats that fit a file's name the one with the longer suffix
            opens it: ``.int8.onnx`` beside ``.onnx``.
        packages: The outside packages that write and run it.
        extra: The extra of this package that brings them.
        bound: What a file may differ by from its network, of the largest output.

    Example:
        >>> from mrla.deploy.formats import ExportFormat, get_format
        >>> class Traced(ExportFormat):
        ...     name, suffix = "traced", ".trace.pt"
        ...     def write(self, program, path, facts):
        ...         held = {"facts.json": facts.to_json()}
        ...         traced = torch.jit.trace(program.module(), torch.zeros(2, *facts.input_size))
        ...         torch.jit.save(traced, path, _extra_files=held)
        ...     def open(self, path, *, threads, dtype=torch.float32):
        ...         held = {"facts.json": ""}
        ...         session = torch.jit.load(path, _extra_files=held)
        ...         return Opened(held["facts.json"], session)
        ...     def values(self, session, images):
        ...         return [session(images)]
        >>> Traced().files(Path("net.trace.pt"))  # @register_format above the class makes it known
        (PosixPath('net.trace.pt'),)
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = "export"
    # Engines add in another order and use other convolution algorithms. With random norms and mixers the networks of
    # mrla/deploy/README.md differ by 1.4e-6 at most, and folding norms is allowed 1e-4 by `fuse` itself.
    bound: ClassVar[float] = 1e-4

    def prepare(self, model: nn.Module) -> nn.Module:
        """A network with the same outputs in the operators that suit the engine; `model` itself stays as it is.

        Args:
            model: A network in eval mode on the CPU.

        Returns:
            What is traced and written.
        """
        return model

    @abstractmethod
    def write(self, program: ExportedProgram, path: Path, facts: Facts) -> None:
        """Writes a network.

        Args:
            program: The network.
            path: The file; further ones that `files` names may be written beside it.
            facts: What is to stand inside, as `Facts.to_json` gives it.

        Raises:
            ValueError: If the format cannot express the network.
        """

    @abstractmethod
    def open(self, path: Path, *, threads: int, dtype: torch.dtype = torch.float32) -> Opened:
        """Reads a file, to run it on the CPU.

        Args:
            path: The file.
            threads: Threads that the engine takes, where it has its own.
            dtype: What the images come in, and the engine is to compute in, where it could choose.

        Returns:
            The facts in it, and the engine's session.

        Raises:
            Exception: Whatever the engine raises of a damaged file.
        """

    @abstractmethod
    def values(self, session: Any, images: Tensor) -> list[Tensor]:
        """What a file gives.

        Args:
            session: As `open` gave it.
            images: A batch.

        Returns:
            Every output of the network, in its order.
        """

    def layer_values(self, path: Path, image: Tensor) -> Iterable[tuple[str, Tensor]] | None:
        """What is computed inside a file, so that the first layer that differs can be named.

        Args:
            path: The file.
            image: A batch.

        Returns:
            Pairs of a module's path and a value that it computes; None where the format does not keep modules.
        """
        return None

    def files(self, path: Path) -> tuple[Path, ...]:
        """All files that belong to one, itself included; one that is large may have more beside it.

        Args:
            path: The file.

        Returns:
            Their paths.
        """
        return (path,)

    @classmethod
    def check_packages(cls) -> None:
        """Raises a ValueError that names the extra if a package is not installed."""
        if missing := cls.missing_packages():
            raise ValueError(
                f"{cls.name} needs {', '.join(missing)}, not installed here: pip install 'mrla[{cls.extra}]'"
            )

    @classmethod
    def missing_packages(cls) -> tuple[str, ...]:
        """Those of `packages` that are not installed."""
        return tuple(package for package in cls.packages if find_spec(package) is None)


FORMATS: dict[str, type[ExportFormat]] = {}
"""Every format by its name; `register_format` fills it."""

Format = TypeVar("Format", bound=type[ExportFormat])


def register_format(format: Format) -> Format:
    """Makes a format known under its `name`; a decorator of its class.

    Args:
        format: A subclass of `ExportFormat` with a name and a suffix that no other has.

    Returns:
        `format` itself.

    Raises:
        ValueError: If its name or suffix is taken, or the suffix does not begin with a dot.
        TypeError: If it is no subclass of `ExportFormat`, or lacks one of its methods.

    Example:
        >>> register_format(type("Another", (get_format("onnx"),), {"suffix": ".other"}))
        Traceback (most recent call last):
        ...
        ValueError: a format of export must have a name of its own: 'onnx' is that of OnnxFormat in ...
    """
    if not (isinstance(format, type) and issubclass(format, ExportFormat)):
        raise TypeError(f"a format of export must be a subclass of mrla.deploy.formats.ExportFormat: got {format!r}")
    if lacking := sorted(format.__abstractmethods__):
        raise TypeError(f"a format of export must have {', '.join(lacking)}: {format.__qualname__} has not")
    suffix = getattr(format, "suffix", None)
    if not isinstance(suffix, str) or not suffix.startswith(".") or len(suffix) < 2:
        raise ValueError(f"a format's suffix must begin with a dot, such as '.onnx': {place_of(format)} has {suffix!r}")
    others = [other for other in FORMATS.values() if other.name != getattr(format, "name", None)]
    if taken := next((other for other in others if other.suffix == suffix), None):
        raise ValueError(
            f"a format's files must have a suffix of their own: {suffix!r} is that of {place_of(taken)}; choose "
            f"another suffix for {place_of(format)}, such as '.{format.__name__.lower()}{suffix}'"
        )
    register(FORMATS, getattr(format, "name", ""), format, "a format of export")
    return format


def get_format(name: str) -> type[ExportFormat]:
    """The format of a name.

    Args:
        name: The name.

    Returns:
        Its class.

    Raises:
        ValueError: If there is no such format.

    Example:
        >>> get_format("openvino").suffix
        '.xml'
    """
    if name not in FORMATS:
        known = f"{', '.join(FORMATS)}, or one of your own, {IMPORTED}"
        raise ValueError(f"format must be one of {known}: got {name!r}{nearest(name, FORMATS)}")
    return FORMATS[name]


def format_of(path: str | Path) -> type[ExportFormat] | None:
    """The format that a file's name tells of.

    Args:
        path: The file, which need not exist.

    Returns:
        The format with the longest suffix that the name ends with; None if there is none.

    Example:
        >>> format_of("net.pt2").name
        'torch_export'
    """
    name = Path(path).name
    fitting = [format for format in FORMATS.values() if name.endswith(format.suffix) and name != format.suffix]
    return max(fitting, key=lambda format: len(format.suffix), default=None)


def checked_format(format: str | ExportFormat, path: Path) -> ExportFormat:
    """The format that a file is to be written in, once it is known that it can be.

    Args:
        format: Its name, or a format made with arguments of its own.
        path: The file to be written.

    Returns:
        The format.

    Raises:
        ValueError: If there is no such format, the path has another suffix, or a package is missing.
    """
    chosen = format if isinstance(format, ExportFormat) else get_format(format)()
    by_name = format_of(path)
    if by_name is not type(chosen):
        remedy = f"or pass format={by_name.name!r}" if by_name else "or another format"
        raise ValueError(f"a file of {chosen.name} must end in {chosen.suffix}: got {path}; call it so, {remedy}")
    chosen.check_packages()
    return chosen
