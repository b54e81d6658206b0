"""One command is chosen and run, and what it cannot do is said in one line."""

import errno
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version

from jsonargparse import ArgumentError

from mrla.files.atomic_write import NotWrittenError
from mrla.messages.suggestions import nearest
from mrla.train.plugins import load_plugins
from mrla.train.recipes import RECIPES
from mrla.train.stopping import Terminated, stopped_in_order, tell

from .benching import bench_command
from .looking import chains_command, explain_command, models_command, predict_command
from .parsing import PLUGINS, listed, word_after
from .printing import NotPrintedError, drop_unprinted, flush_output, open_streams
from .shipping import convert_command, export_command, prune_command
from .training import compare_command, eval_command, train_command
from .warned import one_line_warnings

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "compare": compare_command,
    "train": train_command,
    "eval": eval_command,
    "bench": bench_command,
    "predict": predict_command,
    "explain": explain_command,
    "prune": prune_command,
    "models": models_command,
    "chains": chains_command,
    "export": export_command,
    "convert": convert_command,
}


_GOES_ON = "the same command goes on after the last finished epoch"
_LEFT = {"train": _GOES_ON, "compare": _GOES_ON, "predict": "what is drawn so far stays"}
"""What a command that is stopped leaves, where it does not say so itself; of the others nothing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Words of the command line after ``mrla``; those of this process if not given.

    Returns:
        The exit code: 0, or after one line on standard error 2, 130 (Ctrl-C) or 143 (SIGTERM).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    open_streams()
    try:
        with stopped_in_order(lambda: _LEFT.get("".join(words[:1]), "nothing is written"), for_good=arguments is None):
            return _run(words)
    except Terminated as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        tell(stop)
        return 130


def _run(words: list[str]) -> int:
    try:
        code = _dispatch(words)
        flush_output()
        return code
    except (ArgumentError, ValueError, TypeError) as error:
        return _fail(str(error))
    except NotWrittenError as error:
        return _fail(str(error.strerror))
    except (NotPrintedError, BrokenPipeError) as error:
        drop_unprinted()
        if error.errno == errno.EPIPE:  # who reads has seen enough, as head has; the work is done
            return 0
        return _fail(f"standard output cannot be written ({error.strerror})")
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except ModuleNotFoundError as error:
        extra = _extra_of((error.name or "").partition(".")[0])
        return _fail(f"{error.name} is not installed, and this command needs it: pip install 'mrla[{extra}]'")


def _extra_of(package: str) -> str:
    """Which extra of ours brings a package."""
    from mrla.deploy import FORMATS

    extras = {package: format.extra for format in reversed(FORMATS.values()) for package in format.packages}
    return {**extras, **dict.fromkeys(("pycocotools", "faster_coco_eval"), "dense")}.get(package, "train")


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        _print_overview()
        return 0
    if words[0] == "--version":
        print(f"mrla {version('mrla')}")
        return 0
    if words[0] not in COMMANDS:
        raise ValueError(
            f"the command must be one of {', '.join(COMMANDS)}: got {words[0]!r}{nearest(words[0], COMMANDS)}"
        )
    try:
        with one_line_warnings():
            load_plugins(listed(word_after(words, PLUGINS) or ""))
            return COMMANDS[words[0]](words[1:])
    except Terminated:
        raise
    except SystemExit as leave:  # --help and --print_config
        return int(leave.code or 0)


def _print_overview() -> None:
    print("usage: mrla COMMAND [OPTIONS]\n\nLayer attention for vision networks: train it, and see whether it helps.\n")
    for name, command in COMMANDS.items():
        print(f"  mrla {name:<8} {(command.__doc__ or '').splitlines()[0]}")
    print("\nRecipes: " + ", ".join(RECIPES) + "\nOptions of a command: mrla COMMAND --help")


def _fail(message: str) -> int:
    with suppress(OSError):  # nobody reads it
        print(f"mrla: error: {' '.join(line.strip() for line in message.splitlines())}", file=sys.stderr, flush=True)
    return 2
