"""Two gateways that find the spool of the same gone one at the same moment: its records are taken once, and it goes."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
from msgspec.json import encode
from sqlalchemy import text
from support.control import Running
from support.process import Process, until
from support.servers import python_env

from corral.gateway.records import Admitted, Settled
from corral.store.database import Database, resolve
from corral.store.spool import SpoolWriter, segments
from corral.store.spool_lock import LOCK

ROUNDS, KILLS = 40, 8
SEGMENTS, REQUESTS = 3, 10
"""Of each spool, and of each of them."""
TOKENS = 3

# A spool is found as soon as it is there, by both. Between its look and its lock each may be held up.
ADOPTER = """
import asyncio, logging, random, sys, time
from pathlib import Path
from corral.gateway import adopt
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
adopt.GONE, adopt.EVERY = 0.0, 0.001
hold = adopt.hold
def late(folder):
    time.sleep(random.uniform(0, 0.05))
    return hold(folder)
adopt.hold = late
root, name, url, token = sys.argv[1:]
asyncio.run(adopt.Adopter(Path(root), name, url, token).run())
"""


class Site:
    """A control, and gateways (what of them adopts) that share a folder of spools."""

    def __init__(self, folder: Path, exits: ExitStack, database_url: str) -> None:
        self._folder, self._exits = folder, exits
        self.spools = folder / "spool"
        self.spools.mkdir()
        self.control = Running(folder / "state", store={"database": database_url})
        exits.callback(self.control.close)
        self.database = Database(resolve(self.control.settings.store.database, self.control.state))
        exits.callback(self.database.close)
        self.adopters: list[Process] = []
        self.gone: list[str] = []

    def adopter(self) -> None:
        """Start one more."""
        token = (self.control.state / "internal.token").read_text().strip()
        argv = [sys.executable, "-P", "-c", ADOPTER, str(self.spools), "me", self.control.url, token]
        process = Process(argv, self._folder / f"adopter-{len(self._logs)}.log", python_env())
        self._exits.callback(process.end, signal.SIGKILL)
        self.adopters.append(process)

    @property
    def _logs(self) -> list[Path]:
        return sorted(self._folder.glob("adopter-*.log"))

    def said(self) -> list[str]:
        """What the adopters have said."""
        return [line for log in self._logs for line in log.read_text().splitlines()]

    def leave(self) -> Path:
        """A gateway is gone, and this is its spool: there from one moment to the next."""
        name = f"gone-{len(self.gone)}"
        made = self._folder / "made" / name
        for segment in range(SEGMENTS):
            writer = SpoolWriter(made)
            for number in range(REQUESTS):
                id = f"{name}.{segment}.{number}"
                about = id, id, time.time(), name, "", "", "native", "/api/chat"
                end = 200, "ok", "node-1", 1, 10, 10, 2, TOKENS, False, 0.0, 1.0, 2.0
                writer.append(encode(Admitted(*about, "m:latest")))
                writer.append(encode(Settled(*about, "POST", "m:latest", *end)))
            writer.flush()
            writer.close()
        assert len(segments(made)) == SEGMENTS
        self.gone.append(name)
        return made.rename(self.spools / name)

    def owner(self, spool: Path) -> Process | None:
        """Which of the adopters has that spool's lock."""
        try:
            inode = (spool / LOCK).stat().st_ino
        except FileNotFoundError:
            return None
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        pids = {int(fields[4]) for fields in locks if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}")}
        return next((one for one in self.adopters if one.pid in pids), None)

    def each_once(self) -> None:
        """Each record of each spool was taken, and counted, once; nothing is left of them."""
        assert list(self.spools.iterdir()) == []
        total = len(self.gone) * SEGMENTS * REQUESTS
        with self.database.engine.connect() as connection:
            found = "SELECT count(*), count(DISTINCT id) FROM audit WHERE api = 'native' AND outcome = 'ok'"
            assert tuple(connection.execute(text(found)).one()) == (total, total)
        (used,) = self.control.admin.get("/admin/usage", params={"by": "model"}).json()["usage"]
        assert (used["requests"], used["tokens"]) == (total, total * TOKENS)


@pytest.fixture
def site(tmp_path: Path, database_url: str) -> Iterator[Site]:
    with ExitStack() as exits:
        yield Site(tmp_path, exits, database_url)


def test_two_that_adopt_at_the_same_time(site: Site) -> None:
    site.adopter()
    site.adopter()
    for _ in range(ROUNDS):
        spool = site.leave()
        until(lambda spool=spool: not spool.exists(), f"{spool} is adopted", every=0.005)
    site.each_once()
    said = site.said()
    shipped = [f"WARNING the spool of {name}, which is gone, was shipped: {site.spools / name}" for name in site.gone]
    assert sorted(said) == sorted(shipped)
    assert all(process.alive for process in site.adopters)


def test_one_that_is_killed_while_it_adopts(site: Site) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}", file=sys.stderr)
    dice = random.Random(seed)
    site.adopter()
    site.adopter()
    writes = site.database.engine.connect().execution_options(corral_write=True)
    killed_owners = 0
    with writes as held:
        for number in range(KILLS):
            # Half of them while control can take nothing, so in the midst of it: whoever writes waits.
            with held.begin() if number % 2 else nullcontext():
                spool = site.leave()
                if number % 2:
                    until(lambda spool=spool: site.owner(spool), "one has begun", every=0.001)
                time.sleep(dice.uniform(0, 0.1))
                owner = site.owner(spool)
                killed_owners += owner is not None
                victim = owner or dice.choice(site.adopters)
                assert victim.alive
                victim.end(signal.SIGKILL)
                site.adopters.remove(victim)
            until(lambda spool=spool: not spool.exists(), f"the other one adopts {spool}", every=0.005)
            site.adopter()
    assert killed_owners >= KILLS // 2
    site.each_once()
    assert [line for line in site.said() if "which is gone, was shipped" not in line] == []
