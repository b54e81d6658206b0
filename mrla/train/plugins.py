"""Files of a user's own that register methods, sources of images or formats, imported by name."""

import importlib
import sys
from collections.abc import Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from mrla.messages.one_line import one_line
from mrla.messages.registering import is_ours, plugin_of

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


def plugins_for(classes: Iterable[type]) -> list[str]:
    """The plugins that another process has to load to know some classes, those loaded here first.

    Args:
        classes: Registered classes, such as those of methods and of images; those of `mrla` need no plugin.

    Returns:
        Names for `load_plugins`.

    Raises:
        ValueError: If a class is defined where no other process can import it: a notebook or the script that runs.
    """
    plugins = dict(_loaded)
    for kind in classes:
        if is_ours(kind):
            continue
        name = plugin_of(kind)
        if name is None:
            raise ValueError(
                f"{kind.__qualname__} must be in a file of its own, which the processes of a comparison import: it is "
                f"defined in {kind.__module__}; move it to a file and import that"
            )
        if not set(_loaded) & {kind.__module__, name}:
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
