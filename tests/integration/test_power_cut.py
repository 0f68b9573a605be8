"""The power of the spool's disk is cut: with `synced` nothing is lost that a client saw answered before."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import httpx
import pytest
from support.gateway import Gateway, gateway
from support.power import PowerDisk
from support.process import until

from corral.store.spool import decode_frames

pytestmark = pytest.mark.skipif(
    os.getuid() != 0 or not Path("/dev/loop-control").exists(), reason="only root can mount a disk, from a loop device"
)

CUTS = 10
BETWEEN = 0.02, 0.4
"""Seconds from one cut to the next."""
CLIENTS = 8
WAYS = 10
"""As many questions, one after the other, as an answer that waits for no disk could need to be there."""

NO_SYNC = "import os; os.fdatasync = lambda descriptor: None"


@contextmanager
def on_disk(folder: Path, durability: str, patch: str = "") -> Iterator[tuple[Gateway, PowerDisk]]:
    """A gateway whose spool is on such a disk, and stays there: control takes no records."""
    no_limits = {"default": {"rpm": None, "tpm": None, "concurrency": None}}
    with gateway(folder, audit={"durability": durability}, limits=no_limits) as gw:
        assert gw.process.end() == 0
        disk = PowerDisk(folder / "power", folder / "spool")
        try:
            gw.control.busy = True
            gw.start(seen=disk.seen, patch=patch)
            until(lambda: gw.post().status_code == 200, "it knows keys and nodes")
            yield gw, disk
            gw.process.end(signal.SIGKILL)
        finally:
            disk.close()


class Clients:
    """Ask without pause while the block runs. ``answered``: request ids, as each had all of its answer."""

    def __init__(self, gw: Gateway) -> None:
        self._gw = gw
        self._numbers = count()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CLIENTS)]
        self.answered: list[tuple[str, int]] = []

    def _run(self) -> None:
        while not self._stop.is_set():
            number = next(self._numbers)
            name = f"asked-{number}"
            path = "/api/no" if number % 5 == 0 else "/api/chat"
            body = self._gw.chat(stream=number % 2 == 0)
            answer = self._gw.post(path, body=body, headers={"X-Request-ID": name})
            self.answered.append((name, answer.status_code))

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def records(spool: Path) -> Counter[tuple[str, str]]:
    """Which records a spool has, as (request id, kind); a tail that was torn counts for nothing."""
    frames = [decode_frames(path.read_bytes()) for path in sorted(spool.rglob("*.seg"))]
    return Counter((one["request_id"], one["t"]) for found in frames for _, one in found if "request_id" in one)


def owed(answered: list[tuple[str, int]]) -> set[tuple[str, str]]:
    """The records of requests that were answered; one that is refused at once has the last one alone."""
    assert {status for _, status in answered} <= {200, 404}
    return {(name, "settle") for name, _ in answered} | {(name, "admit") for name, status in answered if status == 200}


def test_what_was_answered_before_a_power_cut_is_in_the_spool(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}", file=sys.stderr)
    dice = random.Random(seed)
    with on_disk(tmp_path, "synced") as (gw, disk):
        due: list[set[tuple[str, str]]] = []
        with Clients(gw) as clients:
            until(lambda: len(clients.answered) > 2 * CLIENTS, "they are answered")
            for number in range(CUTS):
                time.sleep(dice.uniform(*BETWEEN))
                with disk.cut(f"cut-{number}"):
                    # Who has an answer by now had his record on the disk before: since then it has taken nothing.
                    # (If the kernel holds up its next write as well, the gateway says nothing at all.)
                    with suppress(httpx.ReadTimeout):
                        for _ in range(WAYS):
                            assert httpx.get(gw.url + "/health", timeout=2).status_code == 200
                    due.append(owed(clients.answered.copy()))
        assert len(due[-1]) > len(due[0]), "it was under load"
        for number, expected in enumerate(due):
            with disk.left(f"cut-{number}") as left:
                found = records(left)
            assert sorted(expected - set(found)) == []
            assert max(found.values()) == 1
        # All that was there is shipped by the gateway's next life, whatever the cut tore.
        gw.process.end(signal.SIGKILL)
        disk.back(f"cut-{CUTS - 1}")
        gw.start(seen=disk.seen)
        gw.control.busy = False
        assert gw.post(headers={"X-Request-ID": "afterwards"}).status_code == 200
        gw.control.settled("afterwards")
        shipped = Counter((one["request_id"], one["t"]) for one in gw.control.records)
        assert sorted(due[-1] - set(shipped)) == []
        assert max(shipped.values()) == 1


@pytest.mark.parametrize(("durability", "patch"), [("written", ""), ("synced", NO_SYNC)])
def test_a_cut_takes_what_was_not_synced(tmp_path: Path, durability: str, patch: str) -> None:
    """So the test above sees what is lost: this is what it would be without the sync of each group."""
    with on_disk(tmp_path, durability, patch) as (gw, disk):
        assert gw.post(headers={"X-Request-ID": "asked"}).status_code == 200
        with disk.cut("cut"):
            pass
        assert {kind for name, kind in records(disk.now) if name == "asked"} == {"admit", "settle"}
        with disk.left("cut") as left:
            assert [one for one in records(left) if one[0] == "asked"] == []
