"""Why a node could not be asked, in words for people."""

from __future__ import annotations

import os

import httpx

TIMEOUT = 2.0
"""How long a probe waits for each answer (seconds)."""
UNREACHED = (httpx.NetworkError, httpx.TimeoutException, TimeoutError)


def _system(error: BaseException | None) -> str | None:
    """The system's own word for why there is no connection, which libraries wrap in theirs."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            # asyncio writes the address where the system's word would be; errors of names have words of their own.
            known = os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
            return known.lower()
        error = error.__cause__ or error.__context__
    return None


def reason(error: Exception) -> str:
    """Why a node could not be asked, for people."""
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return f"no answer within {TIMEOUT:g} s"
    if isinstance(error, httpx.ConnectError):
        return f"no connection: {_system(error) or error}"[:200]
    if type(error) is ValueError:
        return str(error)[:200]
    return f"{type(error).__name__}: {error}"[:200]
