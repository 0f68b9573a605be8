"""One HTTP exchange of the node: answers, streams, errors, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from corral.node.errors import NodeError
from corral.node.faults import Disconnect, NoHttp

JSON = "application/json; charset=utf-8"
BARE_JSON = "application/json"
NDJSON = "application/x-ndjson"
SSE = "text/event-stream"

encode = msgspec.json.encode

# Turns an error into the body of the API that was called.
ErrorBody = Callable[[NodeError], dict[str, Any]]


def native_error(error: NodeError) -> dict[str, Any]:
    return {"error": error.message}


class Reply:
    """What the client is sent. A stream's head goes out with its first chunk, so errors before it keep their
    status."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._stream: tuple[str, dict[str, str]] | None = None
        self.started = False
        self.translated = False  # Ollama's content types are slightly different on /v1, and of what reports progress

    async def json(self, value: Any, status: int = 200, content_type: str = JSON) -> None:
        await self.send(encode(value), status, content_type)

    async def send(self, body: bytes = b"", status: int = 200, content_type: str = "") -> None:
        headers = [(b"content-length", str(len(body)).encode())]
        if content_type:
            headers.append((b"content-type", content_type.encode()))
        await self._head(status, headers)
        # To HEAD the same head is sent, without the body.
        await self._send({"type": "http.response.body", "body": b"" if self._scope["method"] == "HEAD" else body})

    def stream(self, content_type: str, **headers: str) -> None:
        """From now on ``chunk`` sends pieces of an answer of this type."""
        self._stream = (content_type, headers)

    async def chunk(self, data: bytes) -> None:
        if not self.started:
            assert self._stream is not None
            content_type, headers = self._stream
            pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
            await self._head(200, [(b"content-type", content_type.encode()), *pairs])
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def line(self, value: Any) -> None:
        await self.chunk(encode(value) + b"\n")

    async def end(self) -> None:
        """End a stream; one without a chunk is an empty 200."""
        if not self.started:
            await self.chunk(b"")
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: NodeError, body: ErrorBody) -> None:
        """The error with its status, or as the last line of a stream that has begun."""
        if not self.started:
            content_type = BARE_JSON if self._stream or (self.translated and not error.kind) else JSON
            await self.json(body(error), error.status, content_type)
        else:
            if self._stream and self._stream[0] == NDJSON:
                await self.line({"error": error.message})
            elif self._stream:
                await self.chunk(b"data: " + encode(body(error)) + b"\n\n")
            await self.end()

    def drop(self, reset: bool) -> None:
        """Close the connection as it is, with an RST if ``reset``."""
        transport = self._scope.get("corral.transport")
        if transport is None:
            return
        link = transport.get_extra_info("socket")
        if reset and link is not None:
            # Zero linger makes closing send RST; the option belongs to the open file, so a duplicate sets it.
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(link.fileno())) as twin:
                twin.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()

    async def garble(self, order: NoHttp) -> None:
        """Write what is no answer to the connection as it is, and close it."""
        transport = self._scope.get("corral.transport")
        if transport is None:
            return
        for piece in order.pieces:
            if transport.is_closing():
                return
            transport.write(piece)
            await asyncio.sleep(order.delay)
        transport.close()

    async def _head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


Operation = Callable[[Any, Request, bytes, Reply], Awaitable[None]]


class Exchange:
    """An ASGI answer that runs ``operation`` and cancels it when the client leaves."""

    def __init__(self, operation: Operation, node: Any, request: Request, body: bytes, errors: ErrorBody) -> None:
        self._call: Callable[[Reply], Awaitable[None]] = lambda reply: operation(node, request, body, reply)
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(scope, send)
        work = asyncio.ensure_future(self._run(reply))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work

    async def _run(self, reply: Reply) -> None:
        try:
            await self._call(reply)
        except NodeError as error:
            await reply.fail(error, self._errors)
        except Disconnect as order:
            reply.drop(order.reset)
        except NoHttp as order:
            await reply.garble(order)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def endpoint(operation: Operation, errors: ErrorBody = native_error) -> Callable[[Request], Awaitable[Exchange]]:
    """The Starlette endpoint that runs ``operation(node, request, body, reply)``."""

    async def handle(request: Request) -> Exchange:
        body = await request.body()
        return Exchange(operation, request.app.state.node, request, body, errors)

    return handle


def upload(operation: Operation) -> Callable[[Request], Awaitable[Exchange]]:
    """As ``endpoint`` for an operation that reads the request's body by itself, as a stream."""

    async def handle(request: Request) -> Exchange:
        return Upload(operation, request.app.state.node, request, b"", native_error)

    return handle


class Upload(Exchange):
    """An exchange whose operation notices by itself, while it reads, that the client left."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientDisconnect):
            await self._run(Reply(scope, send))
