"""What a gateway takes for a snapshot of its keys, and how old it holds it for."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import httpx
import pytest

from corral.gateway.feed import OLDER, Feed
from corral.gateway.snapshot import Snapshot
from corral.store.sharing import Sharing
from corral.wire.common import Caps


@pytest.fixture
def snapshot() -> Snapshot:
    return Snapshot({}, Caps())


def asks(feed: Feed, version: str, **headers: str) -> bool:
    """Ask a control that has a version and says so."""

    def control(request: httpx.Request) -> httpx.Response:
        if request.url.params["since"] == version:
            return httpx.Response(304, headers=headers)
        return httpx.Response(200, json={"version": version, "keys": [], "nodes": []}, headers=headers)

    async def once() -> bool:
        async with httpx.AsyncClient(transport=httpx.MockTransport(control)) as client:
            return await feed._poll(client)

    return asyncio.run(once())


def test_a_control_that_lost_its_database_does_not_bring_old_keys_back(snapshot: Snapshot, tmp_path: Path) -> None:
    feed = Feed(snapshot, "http://control", "token", "g", tmp_path, Sharing("g"))
    assert asks(feed, "2", **{"x-corral-age": "0.1"})
    confirmed = snapshot.confirmed
    assert 0.1 <= time.monotonic() - confirmed < 60
    with pytest.raises(ValueError, match="older than those in force"):
        asks(feed, "1", **{"x-corral-age": f"{OLDER + 60}"})
    assert (snapshot.version, snapshot.confirmed) == ("2", confirmed)
    assert not asks(feed, "2", **{"x-corral-age": "0.0"})
    assert snapshot.confirmed > confirmed


def test_one_that_says_nonsense_of_their_age_is_not_believed(snapshot: Snapshot, tmp_path: Path) -> None:
    feed = Feed(snapshot, "http://control", "token", "g", tmp_path, Sharing("g"))
    for age in ("nan", "inf", "-1"):
        with pytest.raises(ValueError, match="older"):
            asks(feed, "1", **{"x-corral-age": age})
    assert snapshot.version == ""
    assert asks(feed, "1"), "one of a version that says none"


def test_a_gateway_that_starts_knows_with_whom_it_shares_the_limits(snapshot: Snapshot, tmp_path: Path) -> None:
    """By what control says, then by what the store does; and the next time by what that said last."""
    sharing = Sharing("g")
    feed = Feed(snapshot, "http://control", "token", "g", tmp_path, sharing)
    feed.load()
    assert (sharing.names, sharing.count) == (["g"], 1)
    assert asks(feed, "1", **{"x-corral-gateways": "f,g"})
    assert (sharing.names, sharing.count) == (["f", "g"], 2)
    sharing.said(["g", "h", "i"])
    assert not asks(feed, "1", **{"x-corral-gateways": "f"})
    assert (sharing.names, sharing.count) == (["g", "h", "i"], 3), "the store knows best"
    kept = (tmp_path / "gateways.json").stat().st_mtime_ns
    sharing.said(["i", "g", "h"])
    asks(feed, "1")
    assert (tmp_path / "gateways.json").stat().st_mtime_ns == kept, "it is not written again for nothing"
    again = Sharing("g")
    feed = Feed(snapshot, "http://control", "token", "g", tmp_path, again)
    feed.load()
    assert (again.names, again.count) == (["g", "h", "i"], 3)
    assert not asks(feed, "1", **{"x-corral-gateways": "f,g"})
    assert again.names == ["f", "g", "h", "i"], "control may just have started, and not have heard all yet"


@pytest.mark.parametrize("content", ["", "nonsense", '{"a": 1}', "[1]"])
def test_a_file_of_gateways_that_is_damaged_is_not_used(snapshot: Snapshot, tmp_path: Path, content: str) -> None:
    (tmp_path / "gateways.json").write_text(content)
    sharing = Sharing("g")
    Feed(snapshot, "http://control", "token", "g", tmp_path, sharing).load()
    assert sharing.names == ["g"]


def test_what_is_kept_for_a_start_is_read_by_nobody_else(snapshot: Snapshot, tmp_path: Path) -> None:
    """Who can read it has the verifiers of all keys."""
    before = os.umask(0)
    try:
        assert asks(Feed(snapshot, "http://control", "token", "g", tmp_path / "cache", Sharing("g")), "1")
    finally:
        os.umask(before)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "cache").iterdir()}
    assert modes == {"snapshot.json": 0o600, "gateways.json": 0o600}


def test_while_the_only_control_has_no_database_nodes_are_told_of_on(snapshot: Snapshot, tmp_path: Path) -> None:
    feed = Feed(snapshot, "http://control", "token", "g", tmp_path, Sharing("g"))
    assert asks(feed, "1", **{"x-corral-age": "300"})
    assert asks(feed, "2", **{"x-corral-age": "300.5"})
    assert time.monotonic() - snapshot.confirmed >= 300


def test_a_gateway_hears_whether_others_have_the_store(snapshot: Snapshot, tmp_path: Path) -> None:
    heard: list[tuple[bool, float]] = []
    sharing = Sharing("g")
    feed = Feed(snapshot, "http://control", "token", "g", tmp_path, sharing, others=lambda *said: heard.append(said))
    before = time.monotonic()
    assert asks(feed, "1", **{"x-corral-store-elsewhere": "1"})
    assert not asks(feed, "1"), "a control of before says nothing of it"
    assert [elsewhere for elsewhere, _ in heard] == [True, False]
    assert before <= heard[0][1] <= heard[1][1] <= time.monotonic()
