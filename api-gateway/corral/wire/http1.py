"""HTTP/1.1 framing (RFC 9112): heads and chunks as bytes. No I/O.

Parsing is httptools' (llhttp in its strict mode: Content-Length beside Transfer-Encoding, differing lengths,
bare LF, obs-fold and NUL are errors); what is written is built here, anew, from checked values.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

LAST_CHUNK: Final = b"0\r\n\r\n"
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

_STATUS_LINES: Final = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


def status_line(status: int) -> bytes:
    """The status line, CRLF included."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def chunk(data: bytes) -> bytes:
    """`data` as one chunk (RFC 9112, section 7.1); `data` must not be empty."""
    return b"%x\r\n%b\r\n" % (len(data), data)
