"""What a gateway writes of a request that goes on, and what is left of it when it is killed."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import httpx
import pytest
from msgspec.json import encode
from support.fakecontrol import FakeControl
from support.gateway import END, HEAD, LAST, LINE, Behaviour, Gateway, chunk, gateway, well
from support.held import Held, leading, placed
from support.metrics import page
from support.process import until

from corral.gateway import adopt
from corral.store.spool import SpoolWriter, decode_frames, segments
from corral.store.spool_lock import hold


def test_a_killed_gateway_leaves_how_far_its_streams_were_and_says_that_it_began_anew(tmp_path: Path) -> None:
    with gateway(tmp_path) as gw:
        held = threading.Event()

        def slowly(connection: socket.socket) -> None:
            connection.sendall(HEAD + chunk(LINE % b"one") + chunk(LINE % b"two"))
            held.wait(60)

        for node in gw.nodes:
            node.script = [slowly]
        until(lambda: [note["t"] for note in gw.control.notes] == ["begin"], "it says that it began")
        with (
            pytest.raises(httpx.HTTPError),
            httpx.stream("POST", gw.url + "/api/chat", json=gw.chat(), headers=gw.auth, timeout=60) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            # One that waited for its node for as long has a note of before it was there.
            until(lambda: any(row[4] == 2 for row in gw.control.notes[-1].get("rows", [])), "its tokens are recorded")
            os.kill(gw.process.pid, signal.SIGKILL)
            list(lines)
        held.set()
        gw.process.end()
        (admitted,) = [record for record in gw.control.records if record["t"] == "admit"]
        (row,) = gw.control.notes[-1]["rows"]
        request, node, attempts, prompt_tokens, tokens, sent, queue_ms, ttft_ms, ms = row
        assert (request, node in ("node-1", "node-2"), attempts) == (admitted["id"], True, 1)
        assert prompt_tokens > 0, "the prompt is guessed, as the node has not said it"
        assert (tokens, sent > 200, 0 <= queue_ms < ttft_ms < ms, ms >= 1000) == (2, True, True, True)
        gw.start()
        until(lambda: gw.control.notes[-1]["t"] == "begin", "the next life says so too")
        assert not [record for record in gw.control.records if record["t"] == "settle"]


def test_bytes_are_those_of_the_bodies_however_they_were_sent(tmp_path: Path) -> None:
    heard = threading.Event()

    def in_pieces(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk(LINE % b"one"))
        assert heard.wait(20)
        connection.sendall(chunk(LINE % b"two"))
        connection.sendall(chunk(LAST % 2) + END)

    def cut(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk(LINE % b"one"))
        assert heard.wait(20)
        connection.shutdown(socket.SHUT_RDWR)

    answers: list[tuple[str, Behaviour, dict[str, object]]] = [
        ("whole", well, {"stream": False}),
        ("at-once", well, {}),
        ("in-pieces", in_pieces, {}),
        ("cut", cut, {}),
        ("refused", well, {"model": "nobody-has-it"}),
    ]
    with gateway(tmp_path) as gw:
        for name, behaviour, asked in answers:
            heard.clear()
            for node in gw.nodes:
                node.script = [behaviour]
            sent, got = json.dumps(gw.chat(**asked)).encode(), b""
            headers = {**gw.auth, "Content-Type": "application/json", "X-Request-ID": name}
            with httpx.stream("POST", gw.url + "/api/chat", content=sent, headers=headers, timeout=20) as answer:
                for data in answer.iter_raw():
                    heard.set()
                    got += data
            record = gw.control.settled(name)
            assert (record["req_bytes"], record["resp_bytes"]) == (len(sent), len(got)), name


def value(gw: Gateway, name: str) -> float:
    return page(f"http://127.0.0.1:{gw._metrics}/metrics").value(name)


def is_shed(gw: Gateway) -> bool:
    answer = gw.post()
    assert answer.status_code in (200, 503)
    if answer.status_code == 503:
        assert "audit record" in answer.text
        assert int(answer.headers["retry-after"]) >= 1
    return answer.status_code == 503


def fills(gw: Gateway) -> tuple[bool, bool]:
    """What SpoolFilling rises by: whether the spool holds a good part of what it may, and its disk has little left."""
    rules = (Path(__file__).parents[2] / "monitoring/prometheus/rules/traffic.yml").read_text()
    (share,) = re.findall(r"corral_spool_bytes > ([\d.]+) \* corral_spool_max_bytes\n", rules)
    left = r"or corral_spool_disk_free_bytes < ([\d.]+) \* \(corral_spool_max_bytes - corral_spool_bytes\)\n"
    (room,) = re.findall(left, rules)
    now = page(f"http://127.0.0.1:{gw._metrics}/metrics")
    held, most = now.value("corral_spool_bytes"), now.value("corral_spool_max_bytes")
    return held > float(share) * most, now.value("corral_spool_disk_free_bytes") < float(room) * (most - held)


def test_a_full_spool_sheds_requests_and_takes_them_again(tmp_path: Path) -> None:
    with gateway(tmp_path, gateway={"spool_max": "20KB"}) as gw:
        gw.control.busy = True
        alerted: list[bool] = []
        """By request that was taken: whether the alert had its condition by then."""

        def is_shed_at_last() -> bool:
            firing, _ = fills(gw)
            shed = is_shed(gw)
            if not shed:
                alerted.append(firing)
            return shed

        until(is_shed_at_last, "requests are shed")
        assert alerted[0] is False and alerted[-1] is True, "SpoolFilling rises while requests are still taken"
        asked = [len(node.requests) for node in gw.nodes]
        shed = value(gw, "corral_spool_shed_total")
        held = value(gw, "corral_spool_bytes")
        assert held >= value(gw, "corral_spool_max_bytes") == 20_000
        for _ in range(20):
            assert is_shed(gw)
        lists = ("/api/tags", "/api/ps", "/api/version", "/v1/models", "/v1/models/m")
        for path in lists:
            answer = httpx.get(gw.url + path, headers=gw.auth)
            assert (answer.status_code, "audit record" in answer.text) == (503, True), path
        assert [len(node.requests) for node in gw.nodes] == asked, "a node heard of a request that has no record"
        assert (httpx.get(gw.url + "/api/tags").status_code, gw.post("/api/no").status_code) == (401, 404)
        assert value(gw, "corral_spool_shed_total") == shed + 20 + len(lists) + 2
        assert value(gw, "corral_spool_bytes") == held
        gw.control.busy = False
        until(lambda: not is_shed(gw), "requests are taken again")
        served = sum(len(node.requests) for node in gw.nodes)
        until(lambda: len({r["id"] for r in gw.control.records if r["t"] == "settle"}) == served, "each has its record")
        admitted = {r["id"] for r in gw.control.records if r["t"] == "admit"}
        assert admitted == {r["id"] for r in gw.control.records if r["t"] == "settle"}


def test_who_waited_before_the_spool_was_full_is_ended_in_it(tmp_path: Path, callers: ThreadPoolExecutor) -> None:
    """No node has heard of him, but the spool has: left open, he would pass for one whose gateway was killed."""
    limits = {"default": {"rpm": None, "tpm": None, "concurrency": None}}
    settings = {"spool_max": "10KB", "between_tokens": "300s", "queue": {"length": 4, "wait": "120s"}}
    with gateway(tmp_path, gateway=settings, limits=limits) as gw:
        leader = leading(gw)
        placed(gw, leader, 1, "node-1")
        held = Held()
        gw.nodes[0].script = [held] * 4
        asked = len(gw.nodes[0].requests)
        runs = callers.submit(gw.post, headers={"X-Request-ID": "runs"}, timeout=120)
        until(lambda: held.running == 1, "one runs")
        leaves = http.client.HTTPConnection("127.0.0.1", gw.port)
        leaves.request("POST", "/api/chat", json.dumps(gw.chat()), gw.auth | {"X-Request-ID": "leaves"})
        until(lambda: leader.waiting() == 1, "one waits")
        other = {"Authorization": f"Bearer {gw.new_key()}", "X-Request-ID": "revoked"}
        revoked = callers.submit(gw.post, headers=other, timeout=120)
        until(lambda: leader.waiting() == 2, "and another key's")
        gw.control.busy = True
        # What is on no list needs no slot.
        until(lambda: gw.post("/api/no").status_code == 404 and value(gw, "corral_spool_shed_total") > 0, "it is full")
        leaves.close()
        until(lambda: leader.waiting() == 1, "one has left")
        gw.revoke_last_key()
        assert revoked.result().status_code == 401
        assert len(gw.nodes[0].requests) == asked + 1, "a node has heard of one that waited"
        held.release()
        assert runs.result().status_code == 200
        gw.control.busy = False
        ended = {name: gw.control.settled(name)["outcome"] for name in ("runs", "leaves", "revoked")}
        assert ended == {"runs": "ok", "leaves": "client_gone", "revoked": "refused"}


def test_how_far_a_stream_is_is_written_into_a_full_spool_too(tmp_path: Path, callers: ThreadPoolExecutor) -> None:
    """A gateway that is killed then would have its caller pay for less than he had."""
    with gateway(tmp_path, gateway={"spool_max": "5KB", "between_tokens": "300s"}) as gw:
        full, ends = threading.Event(), threading.Event()

        def slowly(connection: socket.socket) -> None:
            connection.sendall(HEAD + chunk(LINE % b"one"))
            full.wait(120)
            connection.sendall(chunk(LINE % b"two"))
            ends.wait(120)
            connection.sendall(chunk(LAST % 2) + END)

        for node in gw.nodes:
            node.script = [slowly]
        runs = callers.submit(gw.post, body=gw.chat(), timeout=240)
        until(lambda: sum(len(node.requests) for node in gw.nodes) == 1, "it runs")
        gw.control.busy = True
        until(lambda: gw.post("/api/no").status_code == 404 and value(gw, "corral_spool_shed_total") > 0, "it is full")
        full.set()

        def tokens() -> list[int]:
            frames = [decode_frames(path.read_bytes()) for path in segments(tmp_path / "spool/gateway-1")]
            notes = [record for found in frames for _, record in found if record["t"] == "progress"]
            return [row[4] for note in notes for row in note["rows"]]

        until(lambda: 2 in tokens(), "its second token is recorded")
        shed = value(gw, "corral_spool_shed_total")
        assert gw.post("/api/no").status_code == 404
        assert value(gw, "corral_spool_shed_total") == shed + 1, "it was full all the time"
        ends.set()
        assert runs.result().status_code == 200


def test_a_full_disk_sheds_requests_and_is_taken_into_use_again(tmp_path: Path) -> None:
    """It is full long before the spool holds what it may."""
    with gateway(tmp_path, gateway={"spool_max": "512KB"}) as gw:
        gw.process.end()
        gw.start(small_disk="1m")
        inside = Path(f"/proc/{gw.process.pid}/root{tmp_path}/spool")
        gw.control.busy = True
        assert not is_shed(gw)
        assert fills(gw) == (False, False)
        filler = inside / "filler"
        filler.write_bytes(b"x" * (int(value(gw, "corral_spool_disk_free_bytes")) - 20_000))
        assert fills(gw) == (False, True)
        assert not is_shed(gw), "SpoolFilling rises while requests are still taken"
        until(lambda: is_shed(gw), "requests are shed", 60)
        until(lambda: value(gw, "corral_spool_failing") == 1, "it says so")
        asked = [len(node.requests) for node in gw.nodes]
        assert [is_shed(gw) for _ in range(20)] == [True] * 20
        assert [len(node.requests) for node in gw.nodes] == asked
        filler.unlink()
        gw.control.busy = False
        until(lambda: not is_shed(gw), "requests are taken again")
        assert value(gw, "corral_spool_failing") == 0
        assert fills(gw) == (False, False)
        served = sum(len(node.requests) for node in gw.nodes)

        def settled() -> set[str]:
            return {r["id"] for r in gw.control.records if r["t"] == "settle" and r["attempts"]}

        until(lambda: len(settled()) == served, "each request that a node heard of has its record")
        admitted = {r["id"] for r in gw.control.records if r["t"] == "admit"}
        assert admitted <= {r["id"] for r in gw.control.records if r["t"] == "settle"}, "one stays open"


def test_the_spool_of_a_gateway_that_is_gone_is_shipped_under_its_name(tmp_path: Path) -> None:
    left = tmp_path / "spool/gateway-9"
    writer = SpoolWriter(left)
    writer.append(encode({"t": "admit", "id": "left-1", "request_id": "left"}))
    writer.flush()
    name = writer.segment.name
    lock = hold(left)
    old = time.time() - 2 * adopt.GONE
    os.utime(writer.segment, (old, old))
    shipped = []

    async def look(gone: float) -> None:
        with patch.object(adopt, "GONE", gone):
            await adopt._adopt(left, f"http://127.0.0.1:{control.port}", "t0ken")

    control = FakeControl("t0ken")
    try:
        asyncio.run(look(adopt.GONE))
        assert control.records == [], "its owner lives"
        os.close(lock)
        control.busy = True
        with pytest.raises(ValueError, match="503"):
            asyncio.run(look(adopt.GONE))
        control.busy = False
        assert control.records == []
        asyncio.run(look(1e9))
        assert control.records == [], "somebody wrote to it a while ago"
        asyncio.run(look(adopt.GONE))
        shipped = [record["id"] for record in control.records]
    finally:
        control.stop()
    assert (shipped, [note["t"] for note in control.notes]) == (["left-1"], ["begin"])
    assert f"/internal/spool/gateway-9/{name}" in control.offsets
    assert not left.exists()


def test_a_second_gateway_of_the_same_name_does_not_start(tmp_path: Path) -> None:
    lock = hold(tmp_path)
    with patch.object(adopt, "PATIENCE", 0.2), pytest.raises(OSError, match="another process"):
        adopt.own(tmp_path)
    os.close(lock)
    os.close(adopt.own(tmp_path))
