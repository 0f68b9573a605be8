"""What a store carried out, in its order, with what it answered: MONITOR, joined with a relay's record of the replies.

MONITOR shows each command when it is carried out, and below a script's what it calls; replies it does not show. All
connections of a test lead through a relay that pairs each command with its reply, and MONITOR names the relay's end of
the connection: so the n-th EVALSHA of a connection in the one is the n-th in the other.
"""

from __future__ import annotations

import ast
import asyncio
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hiredis

from corral.store.valkey import encode

SCRIPTED = (b"EVALSHA", b"EVAL")
_LINE = re.compile(rb"\+(\d+\.\d+) \[\d+ ([^\]]+)\] (.*)", re.DOTALL)
_WORD = re.compile(rb'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_ESCAPED = re.compile(rb"\\(x[0-9a-f]{2}|.)", re.DOTALL)
_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b"}
_DUMP = """
local found = {}
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. '*')) do
  local kind, value = redis.call('TYPE', key).ok, nil
  if kind == 'hash' then value = redis.call('HGETALL', key)
  elseif kind == 'zset' then value = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  elseif kind == 'set' then value = redis.call('SMEMBERS', key)
  else value = { redis.call('GET', key) } end
  found[#found + 1] = { key, value }
end
return found
"""


@dataclass
class Call:
    """A command that was carried out.

    ``who`` is a connection ("address:port"), ``inner`` what a script called, ``reply`` what a script answered.
    """

    stamp: float
    who: str
    words: list[str]
    inner: list[list[str]] = field(default_factory=list)
    reply: Any = None


def write(calls: Iterable[Call], path: Path) -> None:
    """Keep calls for `read`, one on a line."""
    with path.open("w") as file:
        for one in calls:
            reply = str(one.reply) if isinstance(one.reply, Exception) else one.reply
            file.write(f"{(one.stamp, one.who, one.words, one.inner, reply)!r}\n")


def read(path: Path) -> Iterator[Call]:
    """The calls of a file of `write`."""
    with path.open() as file:
        for line in file:
            yield Call(*ast.literal_eval(line))


class Witness:
    """Sees all that a store does while it is entered; gateways connect to ``url``.

    ``heard`` has, by channel, the messages that reached a connection.
    """

    def __init__(self, url: str) -> None:
        self._store = int(url.rpartition(":")[2].partition("/")[0])
        self.url = ""
        self.heard: dict[str, list[str]] = defaultdict(list)
        self._lines: list[bytes] = []
        self._replies: dict[str, list[tuple[list[bytes], Any]]] = defaultdict(list)
        self._taken: dict[str, int] = defaultdict(int)
        self._shown: dict[str, int] = defaultdict(int)
        self._read = self._until = 0
        self._own = asyncio.Lock()
        self._mark, self._marked = b"mark 0", asyncio.Event()
        self._clients: set[asyncio.StreamWriter] = set()
        self._works: set[asyncio.Task[None]] = set()

    # -- what a test does to the store beside its gateways

    async def do(self, *commands: tuple[bytes, ...]) -> list[Any]:
        """Commands of this test's own connection, and their replies."""
        async with self._own:
            self._writer.write(b"".join(encode(*parts) for parts in commands))
            replies = []
            for parts in commands:
                reply = await _reply(self._reader, self._parser)
                if parts[0] in SCRIPTED:
                    self._replies[self._name].append((list(parts), reply))
                replies.append(reply)
            return replies

    async def look(self, prefix: bytes) -> None:
        """Have the state below a prefix stand among the calls, as it is at one moment."""
        await self.do((b"EVAL", _DUMP.encode(), b"0", prefix))

    async def seen(self) -> None:
        """Wait until all is recorded that was carried out by now."""
        self._mark = b"mark %d" % (int(self._mark[5:]) + 1)
        self._marked.clear()
        await self.do((b"ECHO", self._mark))
        async with asyncio.timeout(60):
            await self._marked.wait()
            shown = dict(self._shown)
            # MONITOR may be ahead of the replies, which come by other connections.
            while any(len(self._replies[who]) < count for who, count in shown.items()):  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    def cut(self, number: int) -> None:
        """End one of the connections of the gateways; what it has sent is carried out all the same."""
        some = sorted(self._clients, key=lambda one: str(one.get_extra_info("peername")))
        if some:
            some[number % len(some)].transport.abort()

    # -- what was seen

    def calls(self) -> Iterator[Call]:
        """The calls since this was last asked, up to a mark of `seen`."""
        call: Call | None = None
        while self._read < self._until:
            line = self._lines[self._read]
            self._read += 1
            found = _LINE.fullmatch(line)
            assert found, line
            words = [_plain(word) for word in _WORD.findall(found[3])]
            if found[2] == b"lua":
                assert call is not None, line
                call.inner.append(words)
                continue
            if call is not None:
                yield call
            call = Call(float(found[1]), found[2].decode(), words)
            if words[0].encode() in SCRIPTED:
                call.reply = self._reply_of(call)
        if call is not None:
            yield call

    def _reply_of(self, call: Call) -> Any:
        replies, at = self._replies[call.who], self._taken[call.who]
        self._taken[call.who] += 1
        asked, reply = replies[at]
        assert [word.decode() for word in asked] == call.words, (asked, call.words)
        return reply

    # -- the relay

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        store_reader, store = await asyncio.open_connection("127.0.0.1", self._store)
        name = _name(store)
        waiting: list[list[bytes]] = []
        done = asyncio.Event()
        self._clients.add(writer)

        async def back() -> None:
            parser = hiredis.Reader()
            while data := await store_reader.read(1 << 16):
                parser.feed(data)
                while (reply := parser.gets()) is not False:
                    if isinstance(reply, list) and reply[:1] == [b"message"]:
                        self.heard[reply[1].decode()].append(reply[2].decode())
                        continue
                    asked = waiting.pop(0)
                    if asked[0] in SCRIPTED:
                        self._replies[name].append((asked, reply))
                done.set()
                if not writer.is_closing():
                    writer.write(data)
            done.set()
            writer.close()

        task = asyncio.create_task(back())
        asked = hiredis.Reader()
        try:
            with suppress(ConnectionError):
                while data := await reader.read(1 << 16):
                    asked.feed(data)
                    while (words := asked.gets()) is not False:
                        waiting.append(words)
                    store.write(data)
            # The store does what it has been sent, whoever is there to hear of it; then it hears that nobody is.
            while waiting and not task.done():
                done.clear()
                await done.wait()
            gone, kill = b"gone " + name.encode(), (b"CLIENT", b"KILL", b"ADDR", name.encode())
            await self.do((b"MULTI",), (b"ECHO", gone), kill, (b"EXEC",))
            await task
        finally:
            task.cancel()
            self._clients.discard(writer)
            writer.transport.abort()
            store.transport.abort()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            self._lines.append(line[:-2])
            head = line[: line.find(b'" ')]
            if head.endswith((b'] "EVALSHA', b'] "EVAL')) and not head.endswith((b'lua] "EVALSHA', b'lua] "EVAL')):
                self._shown[head[head.rindex(b"[") + 1 : head.rindex(b"]")].split()[1].decode()] += 1
            elif line.endswith(b'"ECHO" "%b"\r\n' % self._mark):
                self._until = len(self._lines)
                self._marked.set()

    async def __aenter__(self) -> Witness:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._store)
        self._name, self._parser = _name(self._writer), hiredis.Reader()
        lines, self._monitor = await asyncio.open_connection("127.0.0.1", self._store, limit=1 << 24)
        self._monitor.write(b"MONITOR\r\n")
        assert await lines.readline() == b"+OK\r\n"
        self._listening = asyncio.create_task(self._listen(lines))
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        return self

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._relay(reader, writer))
        self._works.add(task)

    async def close(self) -> None:
        """All gateways have gone: wait until the store knows. What it did stays to be read."""
        self._server.close()
        async with asyncio.timeout(60):
            await asyncio.gather(*self._works)
            await self.seen()

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in (*self._works, self._listening):
            task.cancel()
        await asyncio.gather(*self._works, self._listening, return_exceptions=True)
        for writer in (self._writer, self._monitor):
            writer.close()


def _name(writer: asyncio.StreamWriter) -> str:
    host, port = writer.get_extra_info("sockname")[:2]
    return f"{host}:{port}"


def _plain(word: bytes) -> str:
    if b"\\" not in word:
        return word.decode()
    return _ESCAPED.sub(_unescape, word).decode("utf-8", "replace")


def _unescape(found: re.Match[bytes]) -> bytes:
    what = found[1]
    return bytes([int(what[1:], 16)]) if len(what) == 3 else _ESCAPES.get(what, what)


async def _reply(reader: asyncio.StreamReader, parser: Any) -> Any:
    while (reply := parser.gets()) is False:
        data = await reader.read(1 << 16)
        if not data:
            raise ConnectionError("the store has ended")
        parser.feed(data)
    return reply
