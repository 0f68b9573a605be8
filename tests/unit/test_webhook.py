"""The webhook of checkpoints gets each one, in order, whatever becomes of the file that says how far it is."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import delete
from support.receivers import Receivers, receivers
from support.sealed import Trail

from corral.store.chain import read_checkpoint
from corral.store.tables import audit_checkpoints


@pytest.fixture
def heard() -> Iterator[Receivers]:
    with receivers() as made:
        yield made


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Trail]:
    trail = Trail(tmp_path, "sqlite:///corral.db")
    yield trail
    trail.database.close()


def deliver(made: Trail, heard: Receivers) -> int:
    """As a control does that has just been started; the last number that it says was taken."""
    webhook = made.new_ledger(webhook=heard.checkpoints_url).webhook
    asyncio.run(webhook.deliver(99))
    return webhook.delivered


def numbers(heard: Receivers) -> list[int]:
    return [read_checkpoint(line).checkpoint.number for line in heard.checkpoints]


def test_each_is_sent_once_and_in_order(made: Trail, heard: Receivers) -> None:
    heard.away(True)
    with pytest.raises(httpx.HTTPStatusError):
        deliver(made, heard)
    heard.away(False)
    assert (deliver(made, heard), numbers(heard)) == (3, [1, 2, 3])
    assert b"\n".join(heard.checkpoints) + b"\n" == made.file.read_bytes()
    asyncio.run(made.ledger.sign())
    assert (deliver(made, heard), numbers(heard)) == (4, [1, 2, 3, 4])
    assert made.new_ledger().webhook.delivered == 0, "without a webhook"


def test_a_full_disk_keeps_the_number_and_lets_later_ones_pass(made: Trail, heard: Receivers) -> None:
    webhook = made.new_ledger(webhook=heard.checkpoints_url).webhook
    asyncio.run(webhook.deliver(99))
    asyncio.run(made.ledger.sign())
    known = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, known[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            asyncio.run(webhook.deliver(99))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, known)
    assert (made.folder / "audit/checkpoints.jsonl.sent").read_text() == "3\n", "as it was"
    made.ship(18)
    asyncio.run(made.ledger.sign())
    asyncio.run(webhook.deliver(99))
    assert numbers(heard) == [1, 2, 3, 4, 5], "this process knows what was taken"


@pytest.mark.parametrize("kept", ["", "x", "-1", "\xff"])
def test_what_cannot_be_read_has_all_of_them_sent_once_more(made: Trail, heard: Receivers, kept: str) -> None:
    (made.folder / "audit/checkpoints.jsonl.sent").write_text(kept, encoding="latin-1")
    assert (deliver(made, heard), numbers(heard)) == (3, [1, 2, 3])


def test_an_older_database_in_its_place_has_its_own_sent(made: Trail, heard: Receivers) -> None:
    deliver(made, heard)
    made.write(lambda c: c.execute(delete(audit_checkpoints).where(audit_checkpoints.c.number == 3)))
    assert (deliver(made, heard), numbers(heard)) == (2, [1, 2, 3, 1, 2])
