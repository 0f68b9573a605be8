"""Fields of what gateways record, made fit for their columns: one of the wrong type is null, not a lost row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sqlalchemy import BigInteger, Boolean, Double, Integer

from corral.store.tables import audit


def _text(value: object) -> str | None:
    # PostgreSQL takes neither NUL nor lone surrogates.
    if not isinstance(value, str):
        return None
    return value.replace("\0", "").encode("utf-8", "replace").decode()


def _whole(bits: int) -> Callable[[object], int | None]:
    def clean(value: object) -> int | None:
        fits = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << (bits - 1)
        return value if fits else None  # type: ignore[return-value]

    return clean


def _real(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        real = float(value)
    except OverflowError:
        return None
    return real if math.isfinite(real) else None


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _cleaner(kind: object) -> Callable[[object], Any]:
    if isinstance(kind, Boolean):
        return _flag
    if isinstance(kind, Double):
        return _real
    if isinstance(kind, BigInteger):
        return _whole(64)
    return _whole(32) if isinstance(kind, Integer) else _text


CLEAN: dict[str, Callable[[object], Any]] = {str(column.name): _cleaner(column.type) for column in audit.columns}
"""What makes a value fit for a column of `audit`, by the column's name."""
