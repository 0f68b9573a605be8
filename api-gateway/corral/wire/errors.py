"""Errors in the shape of the API that was called."""

from __future__ import annotations

import math
import random
from typing import Any, Final

import msgspec

SPREAD_MAX: Final = 60

_encode: Final = msgspec.json.Encoder().encode


class ApiError(Exception):
    """What a caller is told.

    ``code`` is a machine word (``model_not_found``, ``bad_request``, ``rate_limited``, …), ``param`` the field at
    fault, ``retry_after`` whole seconds.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after


class UpstreamNonsense(Exception):
    """A node sent what is no answer: bad JSON, a line without end."""


def bad_request(message: str, param: str | None = None) -> ApiError:
    """A 400 naming the field."""
    return ApiError(400, "bad_request", message, param)


def jittered(seconds: float) -> int:
    """`Retry-After` of what can succeed in so many seconds: whole ones, never fewer, and for some callers more.

    Who waits for the same moment, such as the end of a day or a node's return, does not come back in the same second.
    """
    return max(1, math.ceil(seconds)) + random.randint(0, min(max(1, int(seconds / 10)), SPREAD_MAX))


def overloaded(message: str, seconds: float) -> ApiError:
    """A 503 for what can succeed in so many seconds."""
    return ApiError(503, "overloaded", message, retry_after=jittered(seconds))


_OPENAI_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES = _OPENAI_TYPES | {
    413: "request_too_large",
    503: "overloaded_error",
    529: "overloaded_error",
}


def _openai(error: ApiError) -> dict[str, Any]:
    # OpenAI's clients know an unauthorized key by this code; the rest are Corral's own words.
    code = "invalid_api_key" if error.status == 401 else error.code
    return {
        "error": {
            "message": error.message,
            "type": _OPENAI_TYPES.get(error.status, "api_error"),
            "param": error.param,
            "code": code,
        }
    }


def _anthropic(error: ApiError, request_id: str) -> dict[str, Any]:
    return {
        "type": "error",
        "error": {"type": _ANTHROPIC_TYPES.get(error.status, "api_error"), "message": error.message},
        "request_id": f"req_{request_id}",
    }


def render(api: str, error: ApiError, request_id: str = "") -> bytes:
    """The JSON body of an error; `api` is native, openai or anthropic."""
    if api == "openai":
        return _encode(_openai(error))
    if api == "anthropic":
        return _encode(_anthropic(error, request_id))
    return _encode({"error": error.message})


def in_band(api: str, error: ApiError, request_id: str = "") -> bytes:
    """The last event of a stream that cannot be completed."""
    body = render(api, error, request_id)
    if api == "openai":
        return b"data: " + body + b"\n\n"
    if api == "anthropic":
        return b"event: error\ndata: " + body + b"\n\n"
    return body + b"\n"


def upstream_message(body: bytes) -> str:
    """The text of an error that a node answered with."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body[:200].decode("utf-8", "replace").strip() or "no reason given"
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) and error else "no reason given"
