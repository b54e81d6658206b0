"""Files of a user's own that register methods, sources of images or formats, imported by name."""

import importlib
import sys
from collections.abc import Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from mrla.messages.one_line import one_line
from mrla.messages.registering import file_of
from mrla.ops import METHODS, is_method

_loaded: dict[str, None] = {}


def load_plugins(names: Iterable[str]) -> None:
    """Imports plugins, each once; what they register is known afterwards.

    Args:
        names: Paths of Python files, or names of modules that can be imported.

    Raises:
        ValueError: If there is no such file or module, its import fails, or a module of another file has its name.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                _import_file(Path(name))
            else:
                importlib.import_module(name)
        except ValueError as error:
            raise ValueError(f"the plugin {name} cannot be loaded: {one_line(error)}") from error
        except Exception as error:  # whatever a file of another's raises while it is imported
            raise ValueError(
                f"the plugin {name} cannot be loaded: its import fails with {type(error).__name__}: {one_line(error)}"
            ) from error
        _loaded[str(Path(name).resolve()) if name.endswith(".py") else name] = None


def plugins_for(methods: Iterable[str]) -> list[str]:
    """The plugins that another process has to load to know some methods, those loaded here first.

    Args:
        methods: Names of arms; those that are no method, or one of `mrla`'s, need none.

    Returns:
        Names for `load_plugins`.

    Raises:
        ValueError: If a method is defined where no other process can import it: a notebook or the script that runs.
    """
    plugins = dict(_loaded)
    for method in methods:
        if not is_method(method):
            continue
        mixer = METHODS[method]
        if mixer.__module__.partition(".")[0] == "mrla":
            continue
        # A module of a package by its name, since it may import its siblings; any other by its file.
        module = mixer.__module__
        name = module if "." in module else file_of(mixer)
        if module == "__main__" or not ("." in module or name.endswith(".py")):
            raise ValueError(
                f"the method {method!r} must be in a file of its own, which the processes of a comparison import: "
                f"{mixer.__qualname__} is defined in {module}; move it to a file and import that"
            )
        if not set(_loaded) & {module, name}:
            plugins[name] = None
    return list(plugins)


def _import_file(path: Path) -> None:
    path = path.resolve()
    known = sys.modules.get(path.stem)
    if known is not None:
        if (file := getattr(known, "__file__", None)) is None or Path(file).resolve() != path:
            raise ValueError(f"a module called {path.stem} is imported already, from {file}; rename the file")
        return
    if not path.is_file():
        raise ValueError("there is no such file")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[path.stem] = module  # so that its classes can be pickled
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
