"""Whole HTTP/1.1 messages of the plain shape, read at once by C (`_scan.c`) where that is compiled.

Most requests, and the short answers of nodes, arrive whole, in one piece, and with nothing that needs thought: for
those a parser's call for each header costs more than all else in reading them. Whatever is not exactly so is None, and
is read by llhttp, which decides alone what is refused; where nothing is compiled, everything is. A test holds what is
read here to what llhttp reads (`tests/unit/test_scan.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

Request = tuple[bytes, bytes, dict[bytes, bytes], bytes]
Response = tuple[int, bytes, bytes]


def _nothing(data: bytes) -> Any:
    return None


def _function(name: str) -> Callable[[bytes], Any]:
    try:
        return getattr(import_module("corral.wire._scan"), name)  # type: ignore[no-any-return]
    except ImportError:
        return _nothing


request: Final[Callable[[bytes], Request | None]] = _function("request")
"""Method, target, headers by their lower-case names, and body: of a POST or GET that keeps its connection."""

response: Final[Callable[[bytes], Response | None]] = _function("response")
"""Status, the value of `X-Corral-Proxy` (empty: there is none) and body, of an answer that keeps its connection."""
