"""What a gateway writes of a request that goes on, and what is left of it when it is killed."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import httpx
import pytest
from support.gateway import HEAD, LINE, chunk, gateway
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
