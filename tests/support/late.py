"""How late this process is woken."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lateness() -> Iterator[list[float]]:
    """How late this process is woken (seconds) while the block runs: what the machine adds, not what is tested."""
    late, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            due = time.monotonic() + 0.005
            time.sleep(0.005)
            late.append(time.monotonic() - due)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield late
    finally:
        over.set()
        thread.join()
