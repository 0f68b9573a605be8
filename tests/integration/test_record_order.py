"""A record is where it has to be before what depends on it: a node's hearing of a request, the answer's last bytes."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from support.gateway import END, HEAD, LAST, LINE, Gateway, chunk, gateway
from support.process import until

# Each write to a segment (`written`), or each sync of one (`synced`), waits for as long as there is a file.
HELD = """
import os, time
real = os.CALL
def held(descriptor, *data):
    where = os.readlink(f"/proc/self/fd/{descriptor}")
    if where.endswith(".seg") and os.path.exists("HOLD"):
        open("HOLD.entered", "w").close()
        while os.path.exists("HOLD"):
            time.sleep(0.01)
    return real(descriptor, *data)
os.CALL = held
"""


def restarted(gw: Gateway, durability: str) -> tuple[Path, Path]:
    """Have the gateway run with that; the file that holds its records up, and the one that says that one waits."""
    assert gw.process.end() == 0
    hold = gw.folder / "hold"
    call = "fdatasync" if durability == "synced" else "write"
    gw.start(patch=HELD.replace("CALL", call).replace("HOLD", str(hold)))

    def knows() -> bool:
        # Without the store one that has just begun takes the minute before for used up.
        before = gw.admitted_locally()
        return gw.post().status_code == 200 and gw.admitted_locally() == before

    until(knows, "it knows keys, nodes and store")
    gw.forget()
    return hold, Path(f"{hold}.entered")


def way_and_back(gw: Gateway) -> None:
    """As many questions to the nodes, one after the other and the way that requests go, as any of them would need."""
    for _ in range(10):
        assert all(gw.has(node) for node in gw.nodes)


@pytest.mark.parametrize("durability", ["written", "synced"])
def test_no_node_hears_of_a_request_before_it_is_recorded(tmp_path: Path, durability: str) -> None:
    with gateway(tmp_path, audit={"durability": durability}) as gw, ThreadPoolExecutor() as pool:
        hold, entered = restarted(gw, durability)
        hold.touch()
        try:
            asked = pool.submit(gw.post)
            until(entered.exists, "its admission waits for the disk")
            way_and_back(gw)
            assert [node.requests for node in gw.nodes] == [[], []]
        finally:
            hold.unlink()
        assert asked.result().status_code == 200
        assert sum(len(node.requests) for node in gw.nodes) == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("durability", ["written", "synced"])
def test_the_last_bytes_leave_once_the_record_is_there(tmp_path: Path, durability: str, stream: bool) -> None:
    begun, free = threading.Event(), threading.Event()

    def slowly(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk(LINE % b"one"))
        begun.set()
        assert free.wait(60)
        connection.sendall(chunk(LAST % 1) + END)

    with gateway(tmp_path, audit={"durability": durability}) as gw:
        hold, entered = restarted(gw, durability)
        for node in gw.nodes:
            node.script = [slowly]
        body = json.dumps(gw.chat(stream=stream)).encode()
        head = f"POST /api/chat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gw.key}\r\nContent-Length: {len(body)}"
        with socket.create_connection(("127.0.0.1", gw.port), 60) as caller:
            caller.sendall(head.encode() + b"\r\n\r\n" + body)
            assert begun.wait(60)
            heard = b""
            while stream and b"one" not in heard:
                heard += caller.recv(65536)
            hold.touch()
            try:
                free.set()
                until(entered.exists, "its end waits for the disk")
                way_and_back(gw)
                caller.setblocking(False)
                with suppress(BlockingIOError):
                    heard += caller.recv(65536)
                assert b'"done":true' not in heard
                assert stream or not heard
            finally:
                hold.unlink()
            caller.settimeout(60)
            while b'"done":true' not in heard or not (heard.endswith(END) or not stream):
                heard += caller.recv(65536)


@pytest.mark.parametrize("durability", ["written", "synced"])
def test_no_answer_of_the_gateway_itself_leaves_before_its_record_is_there(tmp_path: Path, durability: str) -> None:
    with gateway(tmp_path, audit={"durability": durability}) as gw:
        hold, entered = restarted(gw, durability)
        key = f"Authorization: Bearer {gw.key}\r\n"
        answers = {
            f"GET /api/tags HTTP/1.1\r\n{key}": b"200",
            f"GET /api/nothing HTTP/1.1\r\n{key}": b"404",
            f"POST /api/chat HTTP/1.1\r\n{key}Content-Length: 2\r\n": b"400",
            "GET /api/tags HTTP/1.1\r\n": b"401",
        }
        for head, status in answers.items():
            with socket.create_connection(("127.0.0.1", gw.port), 20) as caller:
                hold.touch()
                try:
                    caller.sendall(f"{head}Host: x\r\n\r\n".encode() + b"{}" * ("POST" in head))
                    until(entered.exists, f"the record of {head} waits for the disk")
                    way_and_back(gw)
                    caller.setblocking(False)
                    with pytest.raises(BlockingIOError):
                        caller.recv(65536)
                finally:
                    hold.unlink()
                caller.settimeout(20)
                assert caller.recv(65536).split(b" ")[1] == status
            entered.unlink()
        assert [node.requests for node in gw.nodes] == [[], []]
