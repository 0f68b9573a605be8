"""HTTP/1.1 framing (RFC 9112): heads and chunks as bytes. No I/O.

Parsing is httptools' (llhttp in its strict mode: Content-Length beside Transfer-Encoding, differing lengths,
bare LF, obs-fold and NUL are errors); what is written is built here, anew, from checked values.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from corral.wire.errors import ApiError

LAST_CHUNK: Final = b"0\r\n\r\n"
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

_STATUS_LINES: Final = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


def status_line(status: int) -> bytes:
    """The status line, CRLF included."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def chunk(data: bytes) -> bytes:
    """`data` as one chunk (RFC 9112, section 7.1); `data` must not be empty."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def refuse_coded(headers: Mapping[bytes, bytes]) -> None:
    """Refuse a request that would become another protocol, or whose body is more than framed.

    Raises:
        ApiError: 400, or 415 for a compressed body.
    """
    if b"upgrade" in headers:
        raise ApiError(400, "bad_request", "protocol upgrades are not served here")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise ApiError(415, "unsupported_encoding", "a compressed body is not accepted: send it plain")
    # The parser takes any list that ends in chunked; what else is in it would have to be undone here.
    if headers.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
        raise ApiError(400, "bad_request", "of transfer codings, chunked alone is served here")


def refuse_version(version: str, headers: Mapping[bytes, bytes]) -> None:
    """Refuse what is not 1.1, but for a 1.0 without transfer codings. Raises ApiError."""
    if version != "1.0":
        raise ApiError(400, "bad_request", "HTTP/1.1 and 1.0 are served here")
    if b"transfer-encoding" in headers:
        raise ApiError(400, "bad_request", "HTTP/1.0 has no transfer codings")
