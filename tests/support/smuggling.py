"""Requests that two servers may understand differently, as bytes: what has let one request hide in another."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

BARE = "bare-lf-all"
"""The case that has two requests, and two answers, where lines may be bare: the second may be long in coming."""


@dataclass(frozen=True)
class Case:
    """``raw`` is sent as it is. ``strict``: a gateway must answer its first request with a 4xx and close."""

    name: str
    raw: bytes
    strict: bool = True


def body(marker: str) -> bytes:
    """A chat whose prompt names who sent it."""
    message = {"role": "user", "content": marker}
    return json.dumps({"model": "m", "stream": False, "messages": [message]}, separators=(",", ":")).encode()


def request(auth: bytes, content: bytes, target: bytes = b"/api/chat", extra: bytes = b"") -> bytes:
    """A well-formed request."""
    head = b"POST %b HTTP/1.1\r\nHost: corral\r\nAuthorization: %b\r\nContent-Length: %d\r\n%b\r\n"
    return head % (target, auth, len(content), extra) + content


def chunked(content: bytes, size: bytes = b"", end: bytes = b"0\r\n\r\n") -> bytes:
    """`content` as one chunk, with what stands after its size."""
    return b"%x%b\r\n%b\r\n%b" % (len(content), size, content, end)


def corpus(auth: bytes) -> list[Case]:
    """The cases. The hidden request says "hidden"; the one that all agree on says "open"."""
    open_, hidden = body("open"), body("hidden")
    inner = request(auth, hidden)

    def head(lines: bytes, start: bytes = b"POST /api/chat HTTP/1.1\r\nHost: corral\r\n") -> bytes:
        return start + b"Authorization: " + auth + b"\r\n" + lines + b"\r\n"

    length = b"Content-Length: %d\r\n"
    whole = length % len(open_)
    te = b"Transfer-Encoding: chunked\r\n"
    with_inner = length % (len(open_) + len(inner))
    cases = [
        # Two lengths.
        Case("cl-te", head(with_inner + te) + chunked(open_) + inner),
        Case("te-cl", head(te + length % len(chunked(open_))) + chunked(open_) + inner),
        Case("te-cl-short", head(te + b"Content-Length: 4\r\n") + chunked(open_ + inner)),
        Case("cl-te-empty", head(length % (5 + len(inner)) + te) + b"0\r\n\r\n" + inner),
        Case("cl-differ", head(whole + with_inner) + open_ + inner),
        Case("cl-differ-other-order", head(with_inner + whole) + open_ + inner),
        Case("cl-twice", head(whole + whole) + open_, strict=False),
        Case("cl-list", head(b"Content-Length: %d, %d\r\n" % (len(open_), len(open_) + len(inner))) + open_ + inner),
        Case("cl-list-same", head(b"Content-Length: %d, %d\r\n" % (len(open_), len(open_))) + open_, strict=False),
        Case("cl-plus", head(b"Content-Length: +%d\r\n" % len(open_)) + open_),
        Case("cl-minus", head(b"Content-Length: -1\r\n") + open_),
        Case("cl-hex", head(b"Content-Length: 0x%x\r\n" % len(open_)) + open_),
        Case("cl-huge", head(b"Content-Length: 18446744073709551617\r\n") + open_),
        Case("cl-empty", head(b"Content-Length: \r\n") + inner),
        Case("cl-space-within", head(b"Content-Length: 1 0\r\n") + open_ + inner),
        Case("cl-underscore", head(b"Content_Length: 0\r\n" + whole) + open_, strict=False),
        # A coding that only one of them sees.
        Case("te-gzip-chunked", head(b"Transfer-Encoding: gzip, chunked\r\n") + chunked(open_)),
        Case("te-chunked-gzip", head(b"Transfer-Encoding: chunked, gzip\r\n") + chunked(open_)),
        Case("te-identity", head(b"Transfer-Encoding: identity\r\n" + whole) + open_ + inner),
        Case("te-twice", head(te + te) + chunked(open_)),
        Case("te-x", head(b"Transfer-Encoding: xchunked\r\n" + with_inner) + chunked(open_) + inner),
        Case("te-vtab", head(b"Transfer-Encoding: \x0bchunked\r\n" + with_inner) + chunked(open_) + inner),
        Case("te-quoted", head(b'Transfer-Encoding: "chunked"\r\n' + with_inner) + chunked(open_) + inner),
        Case("te-space-before-colon", head(b"Transfer-Encoding : chunked\r\n" + with_inner) + chunked(open_) + inner),
        Case("te-nul", head(b"Transfer-Encoding: chunked\0\r\n" + with_inner) + chunked(open_) + inner),
        Case("te-folded", head(b"Transfer-Encoding:\r\n chunked\r\n" + with_inner) + chunked(open_) + inner),
        Case("te-underscore", head(b"Transfer_Encoding: chunked\r\n" + whole) + open_, strict=False),
        Case("te-http-1.0", head(te, b"POST /api/chat HTTP/1.0\r\nHost: corral\r\n") + chunked(open_) + inner),
        # Lines and names.
        Case("bare-lf", head(b"X: y\n" + whole) + open_),
        Case(BARE, head(whole).replace(b"\r\n", b"\n") + open_ + inner),
        Case("bare-cr", head(b"X: y\rTransfer-Encoding: chunked\r\n" + whole) + open_ + inner),
        Case("obs-fold", head(b"X: a\r\n b\r\n" + whole) + open_),
        Case("obs-fold-first", head(whole, b"POST /api/chat HTTP/1.1\r\n X: a\r\nHost: corral\r\n") + open_),
        Case("nul-in-value", head(b"X: a\0b\r\n" + whole) + open_),
        Case("nul-in-name", head(b"X\0: a\r\n" + whole) + open_),
        Case("name-with-space", head(b"X Y: a\r\n" + whole) + open_),
        Case("name-empty", head(b": a\r\n" + whole) + open_),
        Case("no-colon", head(b"nonsense\r\n" + whole) + open_),
        Case("high-byte-in-name", head(b"X\xe9: a\r\n" + whole) + open_),
        Case("host-twice", head(b"Host: other\r\n" + whole) + open_),
        Case("authorization-twice", head(b"Authorization: Bearer x\r\n" + whole) + open_),
        # Chunks.
        Case("chunk-size-plus", head(te) + b"+" + chunked(open_)),
        Case("chunk-size-0x", head(te) + b"0x" + chunked(open_)),
        Case("chunk-size-empty", head(te) + b"\r\n" + open_ + b"\r\n0\r\n\r\n"),
        Case("chunk-size-huge", head(te) + b"f" * 17 + b"\r\n" + open_ + b"\r\n0\r\n\r\n"),
        Case("chunk-size-space", head(te) + b" " + chunked(open_)),
        Case("chunk-lf", head(te) + chunked(open_).replace(b"\r\n", b"\n")),
        Case("chunk-extension", head(te) + chunked(open_, b";a=b"), strict=False),
        Case("chunk-extension-lf", head(te) + chunked(open_, b";a\n" + b"b" * 8) + inner),
        Case("chunk-too-short", head(te) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(open_) - 4, open_) + inner),
        Case("chunk-no-crlf", head(te) + b"%x\r\n%bXX0\r\n\r\n" % (len(open_), open_) + inner),
        Case("trailer", head(te) + chunked(open_, end=b"0\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n"), strict=False),
        Case("trailer-content-length", head(te) + chunked(open_, end=b"0\r\nContent-Length: 99\r\n\r\n"), strict=False),
        # The request line.
        Case("absolute-form", request(auth, open_, b"http://other/api/chat")),
        Case("absolute-form-same-host", request(auth, open_, b"http://corral/api/chat")),
        Case("authority-form", head(b"", b"CONNECT nodes:1 HTTP/1.1\r\nHost: nodes:1\r\n")),
        Case("asterisk", head(b"", b"OPTIONS * HTTP/1.1\r\nHost: corral\r\n")),
        Case("target-space", head(whole, b"POST /api/chat /x HTTP/1.1\r\nHost: corral\r\n") + open_),
        Case("target-crlf", request(auth, open_, b"/api/chat%0d%0aX:%20y")),
        Case("target-nul", request(auth, open_, b"/api/chat\0")),
        Case("no-target", head(whole, b"POST HTTP/1.1\r\nHost: corral\r\n") + open_),
        Case("version-2.0", head(whole, b"POST /api/chat HTTP/2.0\r\nHost: corral\r\n") + open_),
        Case("version-1.10", head(whole, b"POST /api/chat HTTP/1.10\r\nHost: corral\r\n") + open_),
        Case("http-0.9", b"GET /api/tags\r\n\r\n"),
        Case("http-2-preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"),
        Case("method-lower", head(whole, b"post /api/chat HTTP/1.1\r\nHost: corral\r\n") + open_),
        Case("method-space", head(whole, b" POST /api/chat HTTP/1.1\r\nHost: corral\r\n") + open_),
        Case("get-with-body", head(length % len(inner), b"GET /api/tags HTTP/1.1\r\nHost: corral\r\n") + inner, False),
        Case("upgrade", head(b"Connection: upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n" + whole) + open_),
        Case("upgrade-websocket", head(b"Connection: upgrade\r\nUpgrade: websocket\r\n" + whole) + open_ + inner),
        Case("connection-names-length", head(b"Connection: close, content-length\r\n" + whole) + open_ + inner, False),
        Case("expect-nonsense", head(b"Expect: 100-continue, x\r\n" + whole) + open_, strict=False),
        Case("no-host", head(whole, b"POST /api/chat HTTP/1.1\r\n") + open_),
        Case("compressed", head(b"Content-Encoding: gzip\r\n" + whole) + open_),
    ]
    return cases


PATIENCE = 60.0


def exchange(port: int, raw: bytes, whole: Callable[[bytes], object], quiet: float = 0.25) -> bytes:
    """Send all of it and read until the server closes, or says nothing for `quiet` seconds after a `whole` answer.

    `whole` tells of what came whether something must still come: a server that is slow has not said its last for
    `PATIENCE` seconds.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        data, until = b"", time.monotonic() + PATIENCE
        with suppress(ConnectionError):
            connection.sendall(raw)
            connection.settimeout(quiet)
            while True:
                try:
                    piece = connection.recv(65536)
                except TimeoutError:
                    if whole(data) or time.monotonic() > until:
                        break
                    continue
                if not piece:
                    break
                data += piece
        return data


def answers(data: bytes) -> list[int]:
    """The statuses of the answers in what a server sent."""
    found: list[int] = []
    rest = data
    while rest.startswith(b"HTTP/1."):
        head, _, rest = rest.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        found.append(int(lines[0].split(b" ")[1]))
        size = 0
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                size = int(value)
        rest = rest[size:]
    return found
