"""The header lines of answers, as they leave: what stands between the status and what `listen` adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from corral.wire.errors import ApiError

if TYPE_CHECKING:
    from corral.gateway.state import State

JSON: Final = b"Content-Type: application/json\r\n"
NATIVE_JSON: Final = b"Content-Type: application/json; charset=utf-8\r\n"
"""Of an answer on Ollama's own routes, as Ollama has it."""


def relayed(exchange: State, content_type: str) -> bytes:
    """Those of a node's answer."""
    parts = (
        b"Content-Type: ",
        content_type.encode(),
        b"\r\nX-Request-ID: ",
        exchange.request_id.encode(),
        b"\r\n",
        exchange.node_header,
        b"X-Corral-Attempts: ",
        str(exchange.attempts).encode(),
        b"\r\nX-Corral-Queue-Ms: ",
        str(int(exchange.queue_ms)).encode(),
        b"\r\n",
        exchange.own_headers,
    )
    return b"".join(parts)


def own(request_id: str, rates: bytes, content_type: bytes = JSON) -> bytes:
    """Those of an answer that no node made, or none yet; `rates` and `content_type` are lines already."""
    return b"".join((content_type, b"X-Request-ID: ", request_id.encode(), b"\r\n", rates))


def refusal(error: ApiError, request_id: str, rates: bytes) -> bytes:
    """Those of an error."""
    lines = own(request_id, rates)
    if error.retry_after is not None:
        lines += b"Retry-After: %d\r\n" % error.retry_after
    if error.status == 401:
        lines += b"WWW-Authenticate: Bearer\r\n"
    return lines
