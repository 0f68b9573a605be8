"""The least that a gateway in Python can be, for comparison: sketch.py PORT NODE_PORT STORE_PORT SPOOL.

A key by its HMAC, a body read as a struct, one script call for a limit and a slot and one that gives it back, a record
at the admission and one at the end, a counter. Nothing is validated, nothing is retried, no limit refuses, no error is
handled: what a request costs here is what uvloop, msgspec, hiredis and the kernel cost, and no Python does it for less.
"""

from __future__ import annotations

import asyncio
import gc
import hmac
import os
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import hiredis
import msgspec
import uvloop

PORT, NODE, STORE = map(int, sys.argv[1:4])
PEPPER = b"x" * 32
ADMIT = b"""
local t = redis.call('TIME')
local n = redis.call('INCR', KEYS[1])
if n == 1 then redis.call('PEXPIRE', KEYS[1], 60000) end
local used = redis.call('INCRBY', KEYS[2], ARGV[1])
redis.call('ZADD', KEYS[3], t[1] * 1000 + t[2] / 1000, ARGV[2])
return {1, n, used}
"""
SETTLE = b"redis.call('DECRBY', KEYS[1], ARGV[1]) redis.call('ZREM', KEYS[2], ARGV[2]) return 1"
LENGTH = re.compile(rb"(?i)content-length: *(\d+)\r")
HEAD = b"POST /api/chat HTTP/1.1\r\nHost: node\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Request-Id: %b\r\nContent-Length: %d\r\n\r\n%b"


class Asked(msgspec.Struct):
    """A chat request."""

    model: str
    messages: list[Any]
    stream: bool = True
    options: dict[str, Any] = msgspec.field(default_factory=dict)


class Line(msgspec.Struct):
    """A line of a node's answer."""

    message: dict[str, Any]
    prompt_eval_count: int = 0
    eval_count: int = 0


asked_of = msgspec.json.Decoder(Asked).decode
line_of = msgspec.json.Decoder(Line).decode
encode = msgspec.json.Encoder().encode
answers: Counter[int] = Counter()
idle: list[Node] = []


class Store(asyncio.Protocol):
    """Calls to Valkey: those of one turn of the loop are one write."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader()
        self._waiting: list[Callable[[Any], None]] = []
        self._out: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def call(self, then: Callable[[Any], None], *words: bytes) -> None:
        """Send a command; `then` gets its answer."""
        if not self._out:
            loop.call_soon(self._flush)
        self._out.append(b"*%d\r\n" % len(words) + b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words]))
        self._waiting.append(then)

    def _flush(self) -> None:
        self._transport.write(b"".join(self._out))
        self._out = []

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            self._waiting.pop(0)(reply)


class Spool:
    """Records with their checksums: those of one turn of the loop are one write."""

    def __init__(self) -> None:
        self._file = os.open(sys.argv[4], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        self._out: list[bytes] = []

    def put(self, record: dict[str, Any]) -> None:
        """Append a record."""
        payload = encode(record)
        if not self._out:
            loop.call_soon(self._flush)
        self._out.append(len(payload).to_bytes(4, "little") + zlib.crc32(payload).to_bytes(4, "little") + payload)

    def _flush(self) -> None:
        os.write(self._file, b"".join(self._out))
        self._out = []


class Whole(asyncio.Protocol):
    """Waits until a head and its body are there."""

    _data = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        data = self._data + data if self._data else data
        end = data.find(b"\r\n\r\n") + 4
        found = LENGTH.search(data, 0, end) if end > 3 else None
        if found is None or len(data) < end + int(found[1]):
            self._data = data
            return
        self._data = b""
        self.whole(data[:end], data[end:])

    def whole(self, head: bytes, body: bytes) -> None:
        """A message is there."""
        raise NotImplementedError


class Node(Whole):
    """A connection to the node, and who waits on it."""

    caller: Caller

    def connection_lost(self, error: Exception | None) -> None:
        idle.remove(self)

    def whole(self, head: bytes, body: bytes) -> None:
        idle.append(self)
        self.caller.answered(body)


class Caller(Whole):
    """A caller's connection: one request at a time."""

    def whole(self, head: bytes, body: bytes) -> None:
        headers = {}
        for line in head.split(b"\r\n")[1:-2]:
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        self.key = hmac.digest(PEPPER, headers[b"authorization"][7:], "sha256")
        self.asked = asked_of(body)
        self.began = time.time()
        self.id = os.urandom(8).hex().encode()
        self.estimate = b"%d" % (len(body) // 4)
        store.call(self.admitted, b"EVALSHA", admit, b"3", b"requests", b"tokens", b"slots", self.estimate, self.id)

    def admitted(self, reply: Any) -> None:
        """It may go on."""
        spool.put({"t": "admit", "id": self.id.decode(), "ts": self.began, "model": self.asked.model})
        body = encode(self.asked)
        if not idle:
            loop.create_task(self._dial(HEAD % (len(body), body)))
            return
        self._send(idle.pop(), HEAD % (len(body), body))

    async def _dial(self, request: bytes) -> None:
        _, node = await loop.create_connection(Node, "127.0.0.1", NODE)
        self._send(node, request)

    def _send(self, node: Node, request: bytes) -> None:
        node.caller = self
        node.transport.write(request)

    def answered(self, body: bytes) -> None:
        """The node has answered."""
        lines = [line_of(line) for line in body.split(b"\n") if line]
        text, last = "".join([line.message["content"] for line in lines]), lines[-1]
        told = {"prompt_eval_count": last.prompt_eval_count, "eval_count": last.eval_count}
        message = {"role": "assistant", "content": text}
        out = encode({"model": self.asked.model, "message": message, "done": True, **told})
        self.transport.write(ANSWER % (self.id, len(out), out))
        spool.put({"t": "settle", "id": self.id.decode(), "status": 200, "ms": time.time() - self.began, **told})
        answers[200] += 1
        store.call(lambda reply: None, b"EVALSHA", settle, b"2", b"tokens", b"slots", self.estimate, self.id)


async def serve() -> None:
    """Serve until ended."""
    global loop, store, spool, admit, settle
    loop, spool = asyncio.get_running_loop(), Spool()
    _, store = await loop.create_connection(Store, "127.0.0.1", STORE)

    async def loaded(script: bytes) -> Any:
        done = loop.create_future()
        store.call(done.set_result, b"SCRIPT", b"LOAD", script)
        return await done

    admit, settle = await loaded(ADMIT), await loaded(SETTLE)
    server = await loop.create_server(Caller, "127.0.0.1", PORT)
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)
    await server.serve_forever()


uvloop.run(serve())
