"""The signals by which an operator ends `corral up`. Standard library alone: they count from its first moment."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Stopped(BaseException):
    """The operator asked for the end."""


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the foreground as Ctrl-C does, by `Stopped`, until the block ends."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Stopped

    with _handled(stop):
        yield


def say(line: str) -> None:
    """A line for the operator, who may be gone, a closed terminal for one: the end is in order all the same."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


@contextmanager
def unheard() -> Iterator[None]:
    """The block, a short one, is done whole: none of these signals is heard in it."""
    with _handled(signal.SIG_IGN):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in ENDING}
    try:
        yield
    finally:
        for number, earlier in before.items():
            if earlier is not None:  # else it was none of Python's
                signal.signal(number, earlier)
