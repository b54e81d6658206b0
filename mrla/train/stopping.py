"""How work ends that is stopped from outside: by Ctrl-C or SIGTERM, once, in order, with a word on what is left."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(SystemExit):
    """SIGTERM has come. Uncaught, it ends the process with exit code 143.

    Attributes:
        left: What there is for who goes on, in words.
    """

    def __init__(self, left: str = ""):
        super().__init__(128 + signal.SIGTERM)
        self.left = left


Stop = KeyboardInterrupt | Terminated


class StopOnce:
    """A signal handler that raises at the first signal. Those that follow are ignored: the work is ending already."""

    def __init__(self) -> None:
        self.stop: Stop | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.stop is None:
            self.stop = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
            raise self.stop

    def check(self) -> None:
        """Raises again what has come: what is raised inside a `__del__` is lost there."""
        if self.stop is not None:
            raise self.stop


@contextmanager
def stopped_in_order(left: Callable[[], str], *, for_good: bool = False) -> Iterator[StopOnce]:
    """The body, which SIGTERM and Ctrl-C end by one exception: `Terminated` or `KeyboardInterrupt`.

    Whatever a library makes of that exception on its way, it is what leaves the body. Signals that come while the body
    ends are ignored. Handlers are put back as they were; one that is not Python's own, the caller's, stays throughout.
    Where such bodies lie in one another, the innermost one's word is what is told; of SIGTERM it is told here.

    Args:
        left: What there is for who goes on, in words; called when a signal has come.
        for_good: Whether signals are ignored after a stop until the process ends.

    Yields:
        The handler.

    Raises:
        KeyboardInterrupt: After Ctrl-C, with what is left as its text.
        Terminated: After SIGTERM, with what is left as its text.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    outer = next((handler for handler in before.values() if isinstance(handler, StopOnce)), None)
    handler = outer or StopOnce()
    after = dict(before)
    try:
        if in_main_thread:
            for number, present in before.items():
                if present in (signal.default_int_handler, signal.SIG_DFL):
                    signal.signal(number, handler)
        yield handler
    except BaseException as error:
        if (stop := _stop_of(error, handler)) is None:
            raise
        handler.stop = stop
        if for_good:
            after = dict.fromkeys(before, signal.SIG_IGN)
        _say_what_is_left(stop, left)
        if outer is None and isinstance(stop, Terminated):
            tell(stop)
        if stop is error:
            raise
        raise stop from None
    finally:
        if in_main_thread:
            for number, wanted in after.items():
                if wanted is not None:  # it was not set from Python
                    signal.signal(number, wanted)


def tell(stop: Stop) -> None:
    """Says on standard error what has come and what is left, in one line; of several processes the first does."""
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    if rank == "0" and sys.stderr is not None:
        what = "stopped by SIGTERM" if isinstance(stop, Terminated) else "interrupted"
        print(f"mrla: {what}; {_left_of(stop)}", file=sys.stderr, flush=True)


def _stop_of(error: BaseException, handler: StopOnce) -> Stop | None:
    """The stop that an error comes from, if it does."""
    if handler.stop is not None:
        return handler.stop
    if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
        return error.__context__  # Lightning makes that of it
    return error if isinstance(error, Stop) else None


def _say_what_is_left(stop: Stop, left: Callable[[], str]) -> None:
    if not _left_of(stop):
        words = left()
        stop.args = (words,) if isinstance(stop, KeyboardInterrupt) else stop.args
        if isinstance(stop, Terminated):
            stop.left = words


def _left_of(stop: Stop) -> str:
    return stop.left if isinstance(stop, Terminated) else str(stop)
