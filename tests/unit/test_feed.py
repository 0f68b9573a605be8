"""What a gateway takes for a snapshot of its keys, and how old it holds it for."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from corral.gateway.feed import OLDER, Feed
from corral.gateway.snapshot import Snapshot
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
    feed = Feed(snapshot, "http://control", "token", "g", tmp_path)
    assert asks(feed, "2", **{"x-corral-age": "0.1"})
    confirmed = snapshot.confirmed
    assert 0.1 <= time.monotonic() - confirmed < 60
    with pytest.raises(ValueError, match="older than those in force"):
        asks(feed, "1", **{"x-corral-age": f"{OLDER + 60}"})
    assert (snapshot.version, snapshot.confirmed) == ("2", confirmed)
    assert not asks(feed, "2", **{"x-corral-age": "0.0"})
    assert snapshot.confirmed > confirmed


def test_one_that_says_nonsense_of_their_age_is_not_believed(snapshot: Snapshot, tmp_path: Path) -> None:
    feed = Feed(snapshot, "http://control", "token", "g", tmp_path)
    for age in ("nan", "inf", "-1"):
        with pytest.raises(ValueError, match="older"):
            asks(feed, "1", **{"x-corral-age": age})
    assert snapshot.version == ""
    assert asks(feed, "1"), "one of a version that says none"


def test_while_the_only_control_has_no_database_nodes_are_told_of_on(snapshot: Snapshot, tmp_path: Path) -> None:
    feed = Feed(snapshot, "http://control", "token", "g", tmp_path)
    assert asks(feed, "1", **{"x-corral-age": "300"})
    assert asks(feed, "2", **{"x-corral-age": "300.5"})
    assert time.monotonic() - snapshot.confirmed >= 300
