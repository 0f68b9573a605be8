"""The way to a store, which a test may cut, or have lead to another one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from support.process import free_port


class Line:
    """The way to the store, which can be cut without a word: nothing passes, nothing is refused.

    ``to`` is where it leads; who is connected has to connect again to be there.
    """

    def __init__(self, port: int) -> None:
        self.port, self.to = free_port(), port
        self.open = asyncio.Event()
        self.open.set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        try:
            yield
        finally:
            server.close()
            await asyncio.sleep(0)  # who was accepted in this turn is told of
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            # A task that is cancelled before its first step runs no line of its own: what it had is closed here.
            for writer in self._writers:
                writer.close()
            await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)

    def cut(self) -> None:
        """From now on nothing passes; said from any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.open.clear)

    def mend(self) -> None:
        """It is as it was; said from any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.open.set)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self._start(self._serve(reader, writer))

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self.open.wait()
            back, forth = await asyncio.open_connection("127.0.0.1", self.to)
        except OSError:
            writer.close()
            return
        self._writers.add(forth)
        self._start(self._pass(reader, forth))
        self._start(self._pass(back, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError):
                while data := await reader.read(65536):
                    await self.open.wait()
                    writer.write(data)
        finally:
            writer.close()


@contextmanager
def line(port: int) -> Iterator[Line]:
    """A line that runs in a thread of its own, for processes; ``to`` may be set from here."""
    made = Line(port)
    ready, over = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with made.running():
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(60)
        yield made
    finally:
        assert made._loop is not None
        made._loop.call_soon_threadsafe(over.set)
        thread.join()
