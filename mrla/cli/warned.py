"""Our warnings as a user meets them: one line each, without the place in the code."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mrla.messages.one_line import one_line

_PACKAGE = str(Path(__file__).parents[1])


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Prints what this package warns of as ``mrla: warning: ...``, on standard error; other warnings as ever."""
    before = warnings.showwarning

    def show(message: Any, category: type[Warning], filename: str, *more: Any) -> None:
        if filename.startswith(_PACKAGE):
            print(f"mrla: warning: {one_line(message)}", file=sys.stderr)
        else:
            before(message, category, filename, *more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
