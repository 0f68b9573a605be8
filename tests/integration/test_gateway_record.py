"""What a gateway writes of a request that goes on, and what is left of it when it is killed."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import httpx
import pytest
from support.gateway import HEAD, LINE, Gateway, chunk, gateway
from support.metrics import page
from support.process import until


def test_a_killed_gateway_leaves_how_far_its_streams_were_and_says_that_it_began_anew(tmp_path: Path) -> None:
    with gateway(tmp_path) as gw:
        held = threading.Event()

        def slowly(connection: socket.socket) -> None:
            connection.sendall(HEAD + chunk(LINE % b"one") + chunk(LINE % b"two"))
            held.wait(20)

        for node in gw.nodes:
            node.script = [slowly]
        until(lambda: [note["t"] for note in gw.control.notes] == ["begin"], "it says that it began")
        with (
            pytest.raises(httpx.HTTPError),
            httpx.stream("POST", gw.url + "/api/chat", json=gw.chat(), headers=gw.auth) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            until(lambda: gw.control.notes[-1]["t"] == "progress", "how far it is, is recorded")
            os.kill(gw.process.pid, signal.SIGKILL)
            list(lines)
        held.set()
        gw.process.end()
        (admitted,) = [record for record in gw.control.records if record["t"] == "admit"]
        (row,) = gw.control.notes[1]["rows"]
        request, node, attempts, prompt_tokens, tokens, sent, queue_ms, ttft_ms, ms = row
        assert (request, node in ("node-1", "node-2"), attempts) == (admitted["id"], True, 1)
        assert prompt_tokens > 0, "the prompt is guessed, as the node has not said it"
        assert (tokens, sent > 200, 0 <= queue_ms < ttft_ms < ms, ms >= 1000) == (2, True, True, True)
        gw.start()
        until(lambda: gw.control.notes[-1]["t"] == "begin", "the next life says so too")
        assert not [record for record in gw.control.records if record["t"] == "settle"]


def value(gw: Gateway, name: str) -> float:
    return page(f"http://127.0.0.1:{gw._metrics}/metrics").value(name)


def is_shed(gw: Gateway) -> bool:
    answer = gw.post()
    assert answer.status_code in (200, 503)
    if answer.status_code == 503:
        assert "audit record" in answer.text
        assert int(answer.headers["retry-after"]) >= 1
    return answer.status_code == 503


def test_a_full_spool_sheds_requests_and_takes_them_again(tmp_path: Path) -> None:
    with gateway(tmp_path, gateway={"spool_max": "20KB"}) as gw:
        gw.control.busy = True
        until(lambda: is_shed(gw), "requests are shed", 30)
        asked = [len(node.requests) for node in gw.nodes]
        shed = value(gw, "corral_spool_shed_total")
        held = value(gw, "corral_spool_bytes")
        assert held >= value(gw, "corral_spool_max_bytes") == 20_000
        for _ in range(20):
            assert is_shed(gw)
        assert [len(node.requests) for node in gw.nodes] == asked, "a node heard of a request that has no record"
        assert value(gw, "corral_spool_shed_total") == shed + 20
        assert value(gw, "corral_spool_bytes") == held
        gw.control.busy = False
        until(lambda: not is_shed(gw), "requests are taken again")
        served = sum(len(node.requests) for node in gw.nodes)
        until(lambda: len({r["id"] for r in gw.control.records if r["t"] == "settle"}) == served, "each has its record")
        admitted = {r["id"] for r in gw.control.records if r["t"] == "admit"}
        assert admitted == {r["id"] for r in gw.control.records if r["t"] == "settle"}


def test_a_full_disk_sheds_requests_and_is_taken_into_use_again(tmp_path: Path) -> None:
    with gateway(tmp_path) as gw:
        gw.process.end()
        gw.start(small_disk="1m")
        inside = Path(f"/proc/{gw.process.pid}/root{tmp_path}/spool")
        assert gw.post().status_code == 200
        filler = inside / "filler"
        with filler.open("wb", buffering=0) as file:
            with pytest.raises(OSError, match="No space"):
                while True:
                    file.write(b"x" * 65536)
            with pytest.raises(OSError, match="No space"):
                while True:
                    file.write(b"x" * 64)
        gw.control.busy = True
        until(lambda: is_shed(gw), "requests are shed", 60)
        until(lambda: value(gw, "corral_spool_failing") == 1, "it says so")
        asked = [len(node.requests) for node in gw.nodes]
        assert [is_shed(gw) for _ in range(20)] == [True] * 20
        assert [len(node.requests) for node in gw.nodes] == asked
        filler.unlink()
        gw.control.busy = False
        until(lambda: not is_shed(gw), "requests are taken again")
        assert value(gw, "corral_spool_failing") == 0
        served = sum(len(node.requests) for node in gw.nodes)

        def settled() -> set[str]:
            return {r["id"] for r in gw.control.records if r["t"] == "settle" and r["attempts"]}

        until(lambda: len(settled()) == served, "each request that a node heard of has its record")
        admitted = {r["id"] for r in gw.control.records if r["t"] == "admit"}
        assert admitted <= {r["id"] for r in gw.control.records if r["t"] == "settle"}, "one stays open"


def test_synced_records_are_on_the_disk_before_a_node_hears(tmp_path: Path) -> None:
    with gateway(tmp_path, audit={"durability": "synced"}) as gw:
        for _ in range(30):
            assert gw.post().status_code == 200
        kinds = [record["t"] for record in gw.control.records]
        until(lambda: len([r for r in gw.control.records if r["t"] == "settle"]) == 30, "all are recorded")
        assert kinds.count("admit") <= 30
        assert gw.process.end() == 0
