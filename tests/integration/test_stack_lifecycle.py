"""`corral up` and `corral down`: what is there, what comes back, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.load import CHAT, WHOLE, Client, body_of
from support.process import free_port, until
from support.up import Up, corral, nothing_left, pids

from corral.stack import guard, http, ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="module")
def up(folder: Path) -> Iterator[Up]:
    started = Up(folder / "state")
    try:
        started.ready()
        yield started
    finally:
        started.stop()


def test_it_says_what_works(up: Up) -> None:
    told = up.ready()
    assert told["url"] == up.url
    done = subprocess.run(["bash", "-c", str(told["curl"]) + " -sS"], capture_output=True, text=True, timeout=240)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[-1]["done"] is True, done.stdout


def test_status_has_the_shape_of_the_contract(up: Up) -> None:
    seen = json.loads(corral("status", "--json", state=up.state.root).stdout)
    assert seen["url"] == up.url
    assert seen["control"]["leader"] is True
    assert [(node["name"], node["state"]) for node in seen["nodes"]] == [("node-1", "ready"), ("node-2", "ready")]
    assert all(isinstance(pid, int) and pid > 1 for pid in pids(up).values())
    assert set(seen["store"]) == {"valkey", "database"}


def test_the_state_folder_is_private(up: Up) -> None:
    root = up.state.root
    assert root.stat().st_mode & 0o777 == 0o700
    for name in ("admin.key", "pepper", "internal.token", "run/stack.json", "corral.yaml"):
        assert (root / name).stat().st_mode & 0o777 == 0o600, name
    assert up.ready()["key"] not in (root / "run/stack.json").read_text()


def test_a_second_up_says_that_it_runs_already(up: Up) -> None:
    done = corral("up", "--port", str(free_port()), state=up.state.root)
    assert done.returncode == 1
    assert f"already running at {up.url}" in done.stderr


def test_the_port_of_another_stack_is_refused_with_what_to_do(up: Up, folder: Path) -> None:
    second = Up(folder / "other", "--detach", port=up.port)
    assert second.process.wait(240) == 1
    assert f"port {up.port} is taken by the Corral with the state folder {up.state.root}" in second.said
    assert f"corral down --state {up.state.root}" in second.said
    assert "--port N" in second.said
    assert not second.state.root.exists()


def test_of_two_that_start_at_once_on_one_port_one_is_refused(folder: Path) -> None:
    """HAProxy binds with SO_REUSEPORT: both would come up, and one's keys reach the other."""
    port = free_port()
    both = [Up(folder / name, "--detach", port=port) for name in ("one", "two")]
    try:
        assert sorted(started.process.wait(240) for started in both) == [0, 1], [started.said for started in both]
        refused = next(started for started in both if started.process.returncode == 1)
        assert f"port {port} is taken by" in refused.said
        assert "--port N" in refused.said
    finally:
        for started in both:
            assert corral("down", state=started.state.root).returncode == 0


def test_without_a_node_it_comes_up_and_says_so(folder: Path) -> None:
    first = Up(folder / "empty", "--detach", "--nodes", "1")
    assert first.process.wait(240) == 0, first.said
    url = json.loads(corral("nodes", "list", "--json", state=first.state.root).stdout)[0]["url"]
    assert corral("nodes", "remove", "node-1", state=first.state.root).returncode == 0
    assert json.loads(corral("status", "--json", state=first.state.root).stdout)["nodes"] == []
    assert corral("down", state=first.state.root).returncode == 0
    again = Up(folder / "empty", "--detach", "--nodes", "1", port=first.port)
    try:
        assert again.process.wait(240) == 0, again.said
        note = str(again.ready_already()["note"])
        assert "no request is served: the fleet has no node" in note
        assert f"`corral nodes add {url}` (node-1)" in note
        assert corral("nodes", "add", url, state=again.state.root).returncode == 0
        until(lambda: http.request(again.url, "GET", "/health/ready").status == 200, "the node is used again")
    finally:
        assert corral("down", state=again.state.root).returncode == 0


def test_a_node_that_was_removed_is_not_called_one_of_the_fleet(folder: Path) -> None:
    first = Up(folder / "one-less", "--detach", "--nodes", "2")
    assert first.process.wait(240) == 0, first.said
    url = json.loads(corral("nodes", "list", "--json", state=first.state.root).stdout)[1]["url"]
    assert corral("nodes", "remove", "node-2", state=first.state.root).returncode == 0
    assert corral("down", state=first.state.root).returncode == 0
    again = Up(folder / "one-less", "--detach", "--nodes", "2", port=first.port)
    try:
        assert again.process.wait(240) == 0, again.said
        assert f"node-2 runs, but was removed from the fleet: `corral nodes add {url}` uses it again" in again.said
        assert again.said.count("was removed") == 1
    finally:
        assert corral("down", state=again.state.root).returncode == 0


def test_who_has_no_corral_yaml_is_told_how_to_come_by_a_catalogue(up: Up) -> None:
    """One command must not send to another that sends back."""
    for words in (["models", "plan"], ["models", "apply"], ["config", "reload"]):
        done = corral(*words, state=up.state.root)
        assert f"`corral up --config corral.yaml --state {up.state.root}`" in done.stdout + done.stderr, words
        assert f"`corral down --state {up.state.root}`" in done.stdout + done.stderr, words
    assert "corral config reload" not in corral("models", "apply", state=up.state.root).stderr


def test_a_port_is_its_stacks_while_haproxy_is_away(up: Up) -> None:
    claimed = ports.claim(up.port)
    if claimed is not None:
        claimed.close()
    assert claimed is None, "the supervisor holds it"


def test_doctor_finds_nothing_wrong(up: Up) -> None:
    done = corral("doctor", "--json", state=up.state.root)
    found = json.loads(done.stdout)
    assert done.returncode == 0, [item for item in found["findings"] if item["level"] != "ok"]


def test_doctor_sees_a_valkey_that_takes_connections_and_answers_none(up: Up) -> None:
    """The kernel makes connections for a process that is stopped."""
    stopped = pids(up)["valkey"]

    def said() -> list[str]:
        found = json.loads(corral("doctor", "--json", state=up.state.root).stdout)["findings"]
        return [item["seen"] for item in found if item["check"] == "valkey" and item["level"] == "problem"]

    assert said() == []
    os.kill(stopped, signal.SIGSTOP)
    try:
        assert said() == ["it does not answer a PING"]
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert said() == []


def test_a_key_lives_and_ends(up: Up) -> None:
    state = up.state.root
    made = json.loads(corral("keys", "create", "x", "--rpm", "9", "--expires", "30d", "--json", state=state).stdout)
    works = {"Authorization": f"Bearer {made['key']}"}
    until(lambda: http.request(up.url, "GET", "/api/tags", headers=works).status == 200, "the key works")
    assert "x" in corral("keys", "list", state=state).stdout
    assert json.loads(corral("keys", "show", made["id"], "--json", state=state).stdout)["rpm"] == 9
    assert corral("keys", "revoke", made["id"], state=state).returncode == 0
    until(lambda: http.request(up.url, "GET", "/api/tags", headers=works).status == 401, "the key is revoked")


def test_a_request_is_in_the_audit_trail_and_the_log(up: Up) -> None:
    body = {"model": "smollm2:135m", "prompt": "hello", "stream": False}
    key = str(up.ready().get("key"))
    answer = http.request(up.url, "POST", "/api/generate", body=body, key=key, timeout=60)
    request_id = answer.headers["x-request-id"]

    def recorded() -> bool:
        done = corral("audit", "list", "--limit", "1000", "--json", state=up.state.root)
        return any(request_id in json.dumps(item) for item in json.loads(done.stdout))

    until(recorded, "the record is in the database", every=0.3)
    assert "hello" not in corral("logs", "-n", "1000", state=up.state.root).stdout
    assert "/api/generate" in corral("logs", "--program", "gateway-1", state=up.state.root).stdout
    slip = corral("logs", "--program", "gatway-1", state=up.state.root)
    assert (slip.returncode, "has no log of 'gatway-1'; did you mean 'gateway-1'?" in slip.stderr) == (1, True)


def test_ctrl_c_leaves_nothing_and_the_next_start_keeps_the_state(folder: Path) -> None:
    first = Up(folder / "again")
    told = first.ready()
    known = (first.state.stack() or {})["ports"]
    assert first.stop(signal.SIGINT) == 0
    assert "takes some seconds; any answers that have begun may end (25 s at most); Ctrl-C cuts them" in first.said
    nothing_left(first.state, {**known, "edge": first.port})

    second = Up(folder / "again", port=first.port)
    again = second.ready()
    assert again["key"] is None, "a key is shown once"
    assert http.request(second.url, "GET", "/api/tags", key=str(told["key"])).status == 200
    assert corral("down", state=second.state.root).returncode == 0
    assert second.process.wait(240) == 0
    nothing_left(second.state, {**known, "edge": first.port})


def test_ctrl_c_while_it_says_that_it_is_ready_leaves_nothing(folder: Path) -> None:
    """Its reader takes nothing, so that it is at that for as long as one likes."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(1 << 12))
    os.set_blocking(writer, True)
    started = Up(folder / "unread", output=writer)
    os.close(writer)
    try:
        until(lambda: (started.state.stack() or {}).get("state") == "running", "all that is left is to say so", 240)
        known = (started.state.stack() or {})["ports"]
        assert started.stop(signal.SIGINT) == 0
        assert "Traceback" not in started.said
        assert started.said.endswith("corral: stopped\n")
        nothing_left(started.state, {**known, "edge": started.port})
    finally:
        started.stop()
        os.close(reader)


def test_a_terminal_that_is_closed_ends_it_in_order(folder: Path) -> None:
    """SIGHUP, and nobody who reads what is said: answers that have begun end all the same."""
    reader, writer = os.pipe()
    started = Up(folder / "hung-up", errors=writer)
    os.close(writer)
    try:
        told = started.ready()
        known = (started.state.stack() or {})["ports"]
        os.close(reader)
        client, begun = Client(started.url, str(told["key"])), threading.Event()
        with ThreadPoolExecutor(1) as callers:
            body = body_of(CHAT, str(told["model"]), 240)
            asked = callers.submit(client.ask, CHAT, body, "hung-up", lambda _: begun.set())
            assert begun.wait(60)
            assert started.stop(signal.SIGHUP) == 0
            assert asked.result().fate == WHOLE, str(asked.result())
        client.close()
        nothing_left(started.state, {**known, "edge": started.port})
    finally:
        started.stop()


def test_ctrl_c_while_it_starts_waits_for_no_program_that_does_not_hear_it(folder: Path) -> None:
    """Which is one that the supervisor tells to end before it leads a process group, or one that stands still."""
    started = Up(folder / "deaf")
    log = started.state.logs / "supervisord.log"
    spawned = re.compile(r"spawned: 'gateway-1' with pid (\d+)")

    def gateway() -> int:
        found = spawned.search(log.read_text()) if log.exists() else None
        return int(found[1]) if found else 0

    try:
        until(gateway, "the gateway is started", 240)
        os.kill(gateway(), signal.SIGSTOP)
        until(lambda: "supervisor" in (started.state.stack() or {}), "the supervisor is known", 240)
        supervisor = (started.state.stack() or {})["supervisor"]
        assert supervisor in guard.left_behind(str(started.state.root)), "nor is what it has only forked overlooked"
        assert started.stop(signal.SIGINT) == 1
        assert started.said.endswith("corral: stopping\ncorral: stopped before it was ready\n"), started.said
        assert "with SIGKILL" not in log.read_text(), "so long only the supervisor waits"
        nothing_left(started.state, {"edge": started.port})
    finally:
        started.stop()


@pytest.mark.parametrize("victim", ["up", "supervisor"])
def test_even_a_killed_parent_leaves_no_process(folder: Path, victim: str) -> None:
    started = Up(folder / victim)
    started.ready()
    stack = started.state.stack() or {}
    os.kill(stack["pid"] if victim == "up" else stack["supervisor"], signal.SIGKILL)
    started.process.wait(240)
    until(lambda: guard.left_behind(str(started.state.root)) == [], "every process has ended")
    again = Up(folder / victim, "--detach", port=started.port)
    assert again.process.wait(240) == 0, again.said
    assert corral("status", state=again.state.root).returncode == 0
    assert corral("down", state=again.state.root).returncode == 0
    nothing_left(again.state, {"edge": started.port})


def test_a_deep_state_folder_has_its_sockets_elsewhere(tmp_path: Path) -> None:
    state = tmp_path / ("deep" * 20) / "a folder with 100%"
    started = Up(state, "--detach")
    assert started.process.wait(240) == 0, started.said
    socket_folder = started.state.socket("haproxy.sock").parent
    assert socket_folder.stat().st_mode & 0o777 == 0o700
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(started.state.socket("haproxy.sock")))
    assert corral("down", state=state).returncode == 0
    assert not socket_folder.exists()


def test_a_program_that_does_not_start_is_named_with_its_words(tmp_path: Path) -> None:
    state = tmp_path / "state"
    first = Up(state, "--detach")
    assert first.process.wait(240) == 0, first.said
    corral("down", state=state)
    (state / "corral.db").write_bytes(b"not a database" * 1000)
    second = Up(state, "--detach")
    assert second.process.wait(240) == 1
    assert "Traceback" not in second.said
    assert "database" in second.said
    nothing_left(second.state, {"edge": second.port})
