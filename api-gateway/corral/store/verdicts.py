"""What control's self-test has found of models' files: all controls know it, and those that start later."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, delete, select

from corral.store.database import insert
from corral.store.tables import verdicts

FORGOTTEN = 30 * 86400.0
"""Seconds after which what was found of a file that no node holds any more is removed."""


@dataclass(frozen=True)
class Verdict:
    """What was found of a file, when (epoch seconds), and by which versions of Corral and Ollama."""

    said: str
    at: float
    versions: str


def fit(text: str, length: int = 400) -> str:
    """The beginning of a text as either database gives it back: PostgreSQL has no NUL, and neither lone surrogates."""
    return text[:length].replace("\0", "").encode("utf-8", "replace").decode()


def read(connection: Connection) -> dict[str, Verdict]:
    """All that is known, by digest."""
    return {row.digest: Verdict(row.said, row.at, row.versions) for row in connection.execute(select(verdicts))}


def enter(connection: Connection, found: Mapping[str, Verdict], held: Collection[str], now: float) -> None:
    """Keep what was found, by digest; `held`: digests that a node holds. What is no digest tells no file from others,
    and is left out."""
    for digest, verdict in found.items():
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            continue
        row = {"digest": digest, "said": verdict.said, "at": verdict.at, "versions": verdict.versions}
        entered = insert(connection, verdicts).values(row)
        # A control that stood still has found it before another one did. What is of the future is of a clock set back.
        newer = (verdicts.c.at <= verdict.at) | (verdicts.c.at > now)
        connection.execute(entered.on_conflict_do_update(index_elements=["digest"], set_=row, where=newer))
    old = connection.execute(select(verdicts.c.digest).where(verdicts.c.at < now - FORGOTTEN)).scalars().all()
    gone = [digest for digest in old if digest not in held]
    connection.execute(delete(verdicts).where(verdicts.c.digest.in_(gone)))
