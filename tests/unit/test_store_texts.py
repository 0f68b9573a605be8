"""The texts that are kept of prompts and answers: what is done to one is found by `verify`, on both databases."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, insert, update
from support.sealed import Direct, Trail, found

from corral.store.retention import drop_content
from corral.store.tables import audit_content
from corral.store.verify import verify


@pytest.fixture
def made(tmp_path: Path, database_url: str) -> Any:
    one = Trail(tmp_path, database_url)
    yield one
    one.database.close()


class Texts:
    """Records r18 to r22 of `made`, of which texts are kept: r18 signed with them, the others not yet."""

    def __init__(self, made: Trail) -> None:
        self.made = made
        for number in range(18, 23):
            made.ship(number, content=b64encode(b"text %d" % number).decode())
            if number == 18:
                asyncio.run(made.ledger.sign())
        assert made.verify().problems == []

    def change(self, record: str, **values: Any) -> None:
        which = audit_content.c.id == record
        self.made.write(lambda connection: connection.execute(update(audit_content).where(which).values(values)))

    def drop(self, *records: str) -> None:
        which = audit_content.c.id.in_(records)
        self.made.write(lambda connection: connection.execute(delete(audit_content).where(which)))


@pytest.fixture
def texts(made: Trail) -> Texts:
    return Texts(made)


@pytest.mark.parametrize("number", [18, 21])
def test_a_changed_text(made: Trail, texts: Texts, number: int) -> None:
    texts.change(f"r{number}", data=b"text 81")
    found(made, f"gateway-1: the text of record {number + 1} (r{number}) was changed")


def test_texts_that_changed_places(made: Trail, texts: Texts) -> None:
    for record, other in (("r18", "x"), ("r20", "r18"), ("x", "r20")):
        texts.change(record, id=other)
    found(made, "the text of record 19 (r18) was changed", "the text of record 21 (r20) was changed")


def test_a_dropped_text(made: Trail, texts: Texts) -> None:
    texts.drop("r18", "r22")
    found(made, "the text of record 19 (r18) is missing", "the text of record 23 (r22) is missing")


def test_a_dropped_text_whose_record_no_longer_names_it(made: Trail, texts: Texts) -> None:
    texts.drop("r18")
    made.change(19, content_hash=None)
    found(made, "record 19 (r18) was changed")


def test_a_text_that_no_record_names_is_told(made: Trail) -> None:
    made.write(lambda c: c.execute(insert(audit_content).values(id="r3", ts=1.0, data=b"of an older version")))
    report = made.verify()
    assert report.problems == []
    assert report.notes == ["1 prompts with their answers are not covered: their records have no digest of them"]


def test_texts_that_retention_removed_are_not_missing(made: Trail, texts: Texts) -> None:
    # r<n> is of 1.5 + n: r18 and r19 are older.
    assert made.write(lambda connection: drop_content(connection, 21.0)) == 2
    assert made.verify().problems == []
    asyncio.run(made.ledger.sign())
    assert made.verify().problems == []
    texts.drop("r20")
    found(made, "the text of record 21 (r20) is missing")


def test_a_text_of_a_gateway_whose_clock_was_ahead_ends_too(made: Trail, texts: Texts) -> None:
    texts.change("r22", ts=3.0)
    assert made.write(lambda connection: drop_content(connection, 4.0)) == 1
    assert made.verify().problems == []


def test_what_retention_removes_while_verify_reads_is_not_missing(made: Trail, texts: Texts) -> None:
    class Meanwhile(Direct):
        def state(self) -> Any:
            state = super().state()
            made.write(lambda connection: drop_content(connection, 21.0))
            return state

    lines, publics = made.file.read_bytes().splitlines(), [made.ledger.signer.public]
    assert verify(Meanwhile(made.database), lines, publics).problems == []
    texts.drop("r20")
    assert len(verify(Meanwhile(made.database), lines, publics).problems) == 1


def test_the_text_is_of_the_settle_that_stands(made: Trail, texts: Texts) -> None:
    made.ship(22, content=b64encode(b"of a replay").decode())
    assert made.verify().problems == []
