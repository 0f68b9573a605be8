"""A leader whose database and whose store do not know of the same terms."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from support.servers import valkey

from corral.control.leading import LEASE, Leading
from corral.store import keeper, lease
from corral.store.database import Database
from corral.store.valkey import Valkey


class Placed:
    """A placement that only counts its turns."""

    hurries = False

    def __init__(self, term: int) -> None:
        self.term, self.turns = term, 0

    async def tick(self, *_: Any) -> None:
        self.turns += 1

    async def close(self) -> None:
        """Nothing is under way."""


def test_a_leader_whose_term_is_of_the_past_goes_on_in_a_later_one(tmp_path: Path) -> None:
    """The database was restored from a backup: the store has heard of terms that it knows nothing of."""

    async def work(url: str) -> None:
        database = Database(f"sqlite:///{tmp_path}/corral.db")
        database.migrate()
        store = Valkey(url, keeper.SCRIPTS, timeout=5.0)
        connection = asyncio.create_task(store.run())
        fleet: Any = type("Fleet", (), {"members": {}})
        made: list[Any] = []

        def make(term: int) -> Any:
            made.append(Placed(term))
            return made[-1]

        leading = Leading(database, store, fleet, make)
        while not store.connected:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await store.request(b"SET", keeper.TERM, b"7")
        running = asyncio.create_task(leading.run())
        try:
            async with asyncio.timeout(20):
                while not made or made[-1].turns < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert [(one.term, one.turns > 0) for one in made] == [(1, False), (8, True)]
            # One that was deposed, and has no lease, does not.
            later = database.write_now(lease.take, "another", time.time() + 2 * LEASE, 1000.0)
            assert later == 9
            await store.request(b"SET", keeper.TERM, b"9")
            async with asyncio.timeout(20):
                while leading.leads:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            turns = made[-1].turns
            await asyncio.sleep(3.0)
            assert not leading.leads and made[-1].turns == turns and len(made) == 2
        finally:
            running.cancel()
            connection.cancel()
            await asyncio.gather(running, connection, return_exceptions=True)
            database.close()

    with valkey(tmp_path) as server:
        asyncio.run(work(server.url))
