"""Where the verifier has records from, without a control."""

from __future__ import annotations

from typing import Any

from corral.store import seal
from corral.store.database import Database
from corral.store.verify import State


class Direct:
    """Records straight from a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def state(self) -> State:
        return self._database.read_now(seal.state)

    def records(self, stream: str, after: int, limit: int) -> list[dict[str, Any]]:
        return self._database.read_now(seal.records, stream, after, limit)
