"""The header lines of answers, as they leave: what stands between the status and what `listen` adds."""

from __future__ import annotations

from typing import Final

from corral.wire.errors import ApiError

JSON: Final = b"Content-Type: application/json\r\n"


def relayed(content_type: str, request_id: str, node: bytes, attempts: int, queue_ms: float, rates: bytes) -> bytes:
    """Those of a node's answer; `node` and `rates` are lines already."""
    parts = (
        b"Content-Type: ",
        content_type.encode(),
        b"\r\nX-Request-ID: ",
        request_id.encode(),
        b"\r\n",
        node,
        b"X-Corral-Attempts: ",
        str(attempts).encode(),
        b"\r\nX-Corral-Queue-Ms: ",
        str(int(queue_ms)).encode(),
        b"\r\n",
        rates,
    )
    return b"".join(parts)


def own(request_id: str, rates: bytes) -> bytes:
    """Those of an answer that no node made."""
    return b"".join((JSON, b"X-Request-ID: ", request_id.encode(), b"\r\n", rates))


def refusal(error: ApiError, request_id: str, rates: bytes) -> bytes:
    """Those of an error."""
    lines = own(request_id, rates)
    if error.retry_after is not None:
        lines += b"Retry-After: %d\r\n" % error.retry_after
    if error.status == 401:
        lines += b"WWW-Authenticate: Bearer\r\n"
    return lines
