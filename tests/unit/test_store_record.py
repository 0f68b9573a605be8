"""What becomes of gateways' records: the chain, and usage that counts each request once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select
from support.shipped import NOON, Spool, admit, record, rows, settle

from corral.store import usage
from corral.store.chain import ZERO, Merkle, content, leaf_of, link_after
from corral.store.database import Database
from corral.store.tables import audit_streams


@pytest.fixture
def database(tmp_path: Path, database_url: str) -> Iterator[Database]:
    with record(database_url, tmp_path) as made:
        yield made


@given(st.lists(st.binary(max_size=4), max_size=70))
def test_the_root_is_that_of_rfc_6962(contents: list[bytes]) -> None:
    leaves = [leaf_of(data) for data in contents]

    def whole(part: list[bytes]) -> bytes:
        if len(part) < 2:
            return (
                part[0] if part else bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
            )
        half = 1 << (len(part) - 1).bit_length() - 1

        return hashlib.sha256(b"\1" + whole(part[:half]) + whole(part[half:])).digest()

    assert Merkle(leaves).root() == whole(leaves)


def test_the_root_of_rfc_6962s_reference_tree() -> None:
    # The tree of Certificate Transparency's own tests.
    inputs = ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
    root = Merkle(leaf_of(bytes.fromhex(one)) for one in inputs).root()
    assert root.hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"


def test_what_is_complete_is_sealed_and_comes_back_as_it_was_hashed(database: Database) -> None:
    spool = Spool(database)
    nasty = {"model": 'a"b\\ü\u2028\x00', "request_id": "😀", "ms": 0.1 + 0.2, "ttft_ms": 3, "resp_bytes": 2**62}
    spool.ship(admit(1), settle(1, **nasty), admit(2))
    spool.ship(settle(3, tokens="many", ts=1e300), settle(2))
    found = sorted(rows(database), key=lambda row: str(row["id"]))
    assert [(row["id"], row["gw"], row["pos"]) for row in found] == [
        *(("edge-1", "gateway-1", 1), ("edge-2", "gateway-1", 3), ("edge-3", "gateway-1", 2))
    ]
    link = ZERO
    for row in sorted(found, key=lambda row: row["pos"]):
        assert row["leaf"] == leaf_of(content(row))
        link = link_after(link, row["leaf"])
    head = database.read_now(lambda connection: connection.execute(select(audit_streams)).mappings().one())
    assert (head["stream"], head["pos"], head["link"]) == ("gateway-1", 3, link)


def test_the_digest_of_a_model_is_sealed_and_a_record_without_it_is_what_it_was_before_there_was_one(
    database: Database,
) -> None:
    spool, digest = Spool(database), "a" * 64
    spool.ship(admit(1), admit(2))
    spool.ship(settle(1, model_digest=digest), settle(2), settle(3, model_digest=7))
    found = {row["id"]: row for row in rows(database)}
    assert [found[f"edge-{number}"]["model_digest"] for number in (1, 2, 3)] == [digest, None, None]
    sealed = [content(found[f"edge-{number}"]) for number in (1, 2)]
    assert [f'"model_digest":"{digest}"'.encode() in data for data in sealed] == [True, False]
    assert [found[f"edge-{number}"]["leaf"] for number in (1, 2)] == [leaf_of(data) for data in sealed]
    assert leaf_of(content(found["edge-1"] | {"model_digest": "b" * 64})) != found["edge-1"]["leaf"]


def test_usage_counts_each_request_once(database: Database) -> None:
    spool, other = Spool(database), Spool(database, "gateway-2")
    spool.ship(admit(1), settle(1), settle(2, outcome="limited", attempts=0, tokens=0, prompt_tokens=0, ms=500.0))
    other.ship(settle(1, tokens=600))
    spool.ship(settle(3, ts=NOON + 86400, model="b", estimated=True, outcome="upstream_error"), settle(4, key=""))
    found = database.read_now(usage.report, NOON - 86400, NOON + 86400)
    got = {(row["day"], row["tenant"], row["key"], row["model"]): row for row in found}
    day, next_day = usage.day_of(NOON), usage.day_of(NOON + 86400)
    assert set(got) == {(day, "team", "k", "m:latest"), (next_day, "team", "k", "b"), (day, "", "", "m:latest")}
    first = got[day, "team", "k", "m:latest"]
    assert {name: first[name] for name in usage.COUNTS} == {
        **{"requests": 2, "refused": 1, "failed": 0, "estimated": 0, "prompt_tokens": 7, "tokens": 6},
        **{"queue_seconds": 1.0, "node_seconds": 2.0},
    }
    assert got[next_day, "team", "k", "b"]["failed"] == got[next_day, "team", "k", "b"]["estimated"] == 1
    (both,) = database.read_now(lambda connection: usage.report(connection, 0.0, NOON + 86400, ["tenant"], key="k"))
    assert (both["tenant"], both["requests"], both["tokens"]) == ("team", 3, 12)
    assert database.read_now(usage.report, NOON + 2 * 86400, NOON + 3 * 86400) == []
