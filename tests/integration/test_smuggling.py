"""Requests that two servers may read differently, through edge and gateway: what goes in comes out, no more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.gateway import Gateway, gateway
from support.smuggling import BARE, Case, answers, body, corpus, exchange

NORMALISED = frozenset(("cl-te", "te-cl", "te-folded", "bare-lf", BARE, "obs-fold", "upgrade"))
"""Strict cases that HAProxy reads in one way and writes anew; test_stack_haproxy.py sees what it writes."""
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
CASES = [case.name for case in corpus(b"")]
_numbers = count(1)


@pytest.fixture(scope="module")
def gw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("smuggling")) as started:
        yield started


def case_of(gw: Gateway, name: str) -> Case:
    return next(case for case in corpus(b"Bearer " + gw.key.encode()) if case.name == name)


def seen(gw: Gateway) -> list[str]:
    """Who sent what the nodes were asked."""
    return [request["body"]["messages"][0]["content"] for node in gw.nodes for request in node.requests]


def whole(gw: Gateway, name: str) -> Callable[[bytes], bool]:
    """Whether all answers have come: as many as it has requests, and one for each request that a node was sent."""
    before, requests = len(seen(gw)), 2 if name == BARE else 1

    def told(data: bytes) -> bool:
        found = [status for status in answers(data) if status >= 200]
        return len(found) >= requests and ("get" in name or found.count(200) >= len(seen(gw)) - before)

    return told


def bystander(gw: Gateway, url: str) -> str:
    """Somebody else's request right after: its answer is its own, over whatever connections were left. Its id."""
    request_id = f"bystander-{next(_numbers)}"
    headers = gw.auth | {"X-Request-ID": request_id}
    answer = httpx.post(url + "/api/chat", content=body("bystander"), headers=headers, timeout=60)
    assert (answer.status_code, answer.headers["X-Request-ID"]) == (200, request_id)
    assert "w0 w1 w2" in answer.text
    return request_id


@pytest.mark.parametrize("name", CASES)
def test_the_gateway_refuses_and_closes(gw: Gateway, name: str) -> None:
    for node in gw.nodes:
        node.requests.clear()
    case = case_of(gw, name)
    data = exchange(gw.port, case.raw, whole(gw, name))
    found = answers(data)
    if case.strict:
        assert len(found) == 1 and 400 <= found[0] < 500, data
        assert b"\r\nContent-Type: application/json\r\n" in data
        assert seen(gw) == []
    else:
        assert seen(gw) == ["open"] * len([status for status in found if status == 200 and "get" not in name])
    bystander(gw, gw.url)


@pytest.mark.parametrize("name", CASES)
def test_through_the_edge_as_many_come_out_as_went_in(gw: Gateway, name: str) -> None:
    for node in gw.nodes:
        node.requests.clear()
    case = case_of(gw, name)
    data = exchange(int(gw.edge.rpartition(":")[2]), case.raw, whole(gw, name))
    found = [status for status in answers(data) if status >= 200]
    assert found, "nothing is met with silence"
    served = found.count(200)
    if case.strict and name not in NORMALISED:
        assert all(400 <= status < 500 for status in found), data
        assert seen(gw) == []
    elif "get" not in name:
        assert len(seen(gw)) == served
    # The hidden request is one only to who sent it as one: two heads in bare lines, and two answers.
    assert seen(gw).count("hidden") == (1 if name == BARE else 0)
    bystander(gw, gw.edge)


def test_every_request_that_the_gateway_served_was_one_to_the_edge(gw: Gateway) -> None:
    """It has the edge's id, which a request hidden in another would not have, and an answer went out for it."""
    gw.control.settled(bystander(gw, gw.edge))  # what went before is recorded too
    begin = len(gw.control.records)
    edge = int(gw.edge.rpartition(":")[2])
    known = corpus(b"Bearer " + gw.key.encode())
    served = sum(answers(exchange(edge, case.raw, whole(gw, case.name))).count(200) for case in known)
    gw.control.settled(bystander(gw, gw.edge))
    settled = [record for record in gw.control.records[begin:] if record["t"] == "settle"]
    ids = [record["id"] for record in settled if record["status"] not in (400, 415)]
    assert [one for one in ids if not UUID.fullmatch(one)] == []
    assert len(ids) == len(set(ids))
    bystanders = sum(record["request_id"].startswith("bystander") for record in settled)
    assert sum(record["status"] == 200 for record in settled) - bystanders == served > 10


# -- compressed bodies


def rss(gw: Gateway) -> int:
    """The gateway's memory, in KiB."""
    status = Path(f"/proc/{gw.process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "x-unknown", "gzip, identity", "identity, gzip"])
@pytest.mark.parametrize("through", ["gateway", "edge"])
def test_a_coded_body_is_a_415_before_it_is_read(gw: Gateway, coding: str, through: str) -> None:
    before = rss(gw)
    url = gw.url if through == "gateway" else gw.edge

    def bomb() -> Iterator[bytes]:
        for _ in range(160):
            yield b"\x1f\x8b" + bytes(65534)

    for _ in range(3):
        try:
            headers = gw.auth | {"Content-Encoding": coding}
            answer = httpx.post(url + "/api/chat", content=bomb(), headers=headers, timeout=60)
            assert answer.status_code == 415
        except httpx.TransportError:
            pass  # closed while more came: it was not read
    small: dict[str, Any] = {"headers": gw.auth | {"Content-Encoding": coding}, "content": b"\x1f\x8b" * 100}
    assert httpx.post(url + "/api/chat", timeout=60, **small).status_code == 415
    assert rss(gw) - before < 64 << 10
