"""`corral loadtest` against real servers: errors by kind, open loop, thresholds, Ctrl-C, the real model."""

from __future__ import annotations

import http.server
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from support import loadtest, servers
from support.process import free_port, until
from support.stack import corral

from corral.loadtest import guard, outcome
from corral.loadtest.measure import Recorder
from corral.loadtest.requests import Shape
from corral.loadtest.result import ErrorKind, Result
from corral.loadtest.run import Options, run
from corral.loadtest.schedule import Load

SIMULATION = {
    "models": [
        {"name": "quick", "load": 0.01, "prefill": 100000, "decode": 2000, "slots": 64},
        {"name": "other", "load": 0.01, "prefill": 100000, "decode": 2000, "slots": 64},
        {"name": "single", "load": 0.01, "prefill": 100000, "decode": 20, "slots": 1},
    ]
}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A simulated node's address."""
    folder = tmp_path_factory.mktemp("node")
    (folder / "simulation.json").write_text(json.dumps(SIMULATION))
    extra = ("--simulated", str(folder / "simulation.json"))
    with servers.embedded_node(folder, None, None, "simulated", *extra) as server:
        for model in SIMULATION["models"]:
            body = {"model": model["name"], "prompt": "a", "options": {"num_predict": 1}}
            httpx.post(server.url + "/api/generate", json=body).raise_for_status()
        yield server.url


@pytest.fixture
def faulty(node: str) -> Iterator[Any]:
    """Has the node show a fault; at the end it shows none."""
    yield lambda **fault: httpx.post(node + "/simulated/faults", json=fault).raise_for_status()
    httpx.delete(node + "/simulated/faults").raise_for_status()


SMALL = ("--model", "quick", "--closed", "4", "--requests", "40", "--warmup", "0")


@pytest.mark.parametrize("api", ["native", "openai", "anthropic"])
@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_every_api_is_read(node: str, tmp_path: Path, api: str, stream: str) -> None:
    found, done = loadtest.run(node, tmp_path, *SMALL, "--api", api, stream, "--max-tokens", "9")
    assert done.returncode == 0, done.stderr
    assert (found.total.ok, found.total.failed, found.total.status) == (40, 0, {"200": 40})
    assert found.total.output_tokens == 360
    # The template's own tokens come on top of the prompt's.
    assert 64 <= found.total.prompt_tokens / 40 < 84
    streamed = {"ttft", "itl", "stream_rate"} if stream == "--stream" else set()
    assert found.total.measures.keys() == streamed | {"e2e"}
    if streamed:
        assert found.total.measures["itl"].count == 40 * 8


@pytest.mark.parametrize(
    ("api", "route"),
    [("native", "generate"), ("native", "embed"), ("openai", "generate"), ("openai", "embed")],
)
def test_every_route_is_read(node: str, tmp_path: Path, api: str, route: str) -> None:
    found, done = loadtest.run(node, tmp_path, *SMALL, "--api", api, "--route", route)
    assert done.returncode == 0, done.stderr
    assert found.total.ok == 40
    assert ("ttft" in found.total.measures) == (route != "embed")


def test_errors_are_told_apart(node: str, tmp_path: Path, faulty: Any) -> None:
    faulty(kind="fail", status=503, message="no room", count=1)
    faulty(kind="fail", status=429, message="slow down", count=2)
    faulty(kind="fail", status=500, message="broken", count=3)
    faulty(kind="fail", after_tokens=2, count=4)
    faulty(kind="no_done", count=5)
    faulty(kind="cut_after", count=6)
    faulty(kind="reset", count=7)
    faulty(kind="nonsense", count=8)
    found, done = loadtest.run(node, tmp_path, *SMALL, "--threshold", "errors.truncated==0", "--threshold", "ok==4")
    errors = found.total.errors
    assert found.total.ok == 4
    assert errors["unavailable"] == ErrorKind(1, {"no room": 1})
    assert errors["rate_limited"] == ErrorKind(2, {"slow down": 2})
    assert errors["http_error"] == ErrorKind(3, {"status 500: broken": 3})
    assert errors["error_in_stream"].count == 4
    assert errors["truncated"] == ErrorKind(11, {"ended in good order, as if whole": 5, "the connection was cut": 6})
    assert errors["lost"].count == 7
    assert errors["bad_answer"].count == 8
    assert found.total.failed == 36
    assert sum(slot.failed for slot in found.series) == 36
    assert [(verdict.text, verdict.passed) for verdict in found.thresholds] == [
        ("errors.truncated==0", False),
        ("ok==4", True),
    ]
    assert done.returncode == 1
    assert "failed: errors.truncated==0" in done.stderr


def test_a_hang_is_a_time_out_that_says_where(node: str, tmp_path: Path, faulty: Any) -> None:
    faulty(kind="hang", count=1)
    faulty(kind="hang", after_tokens=3, count=2)
    found, done = loadtest.run(node, tmp_path, *SMALL[:-4], "--requests", "6", "--warmup", "0", "--timeout", "4s")
    reasons = {"4 s, before the first token": 1, "4 s, after the first token": 2}
    assert found.total.errors == {"timeout": ErrorKind(3, reasons)}
    assert done.returncode == 0, "no threshold, and some were answered"


def test_nobody_listens(tmp_path: Path, free_port: int) -> None:
    found, done = loadtest.run(f"http://127.0.0.1:{free_port}", tmp_path, *SMALL)
    assert found.total.errors == {"connect": ErrorKind(40, {"nobody listens there": 40})}
    assert done.returncode == 1
    assert "no request was answered whole" in done.stderr


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    asked: list[str] = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(307)
            self.send_header("Location", f"http://127.0.0.1:{target.getsockname()[1]}/api/chat")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with (
        socket.create_server(("127.0.0.1", 0)) as target,
        http.server.HTTPServer(("127.0.0.1", 0), Elsewhere) as server,
    ):
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        found, _ = loadtest.run(f"http://127.0.0.1:{server.server_port}", tmp_path, *SMALL[:-4], "--requests", "5",
                                "--warmup", "0")  # fmt: skip
        server.shutdown()
        thread.join()
        target.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            target.accept()
    assert found.total.errors == {"redirect": ErrorKind(5, {"status 307": 5})}
    assert len(asked) == 5


def test_https_with_a_certificate_of_ones_own(tmp_path: Path) -> None:
    class Speaks(http.server.BaseHTTPRequestHandler):
        """HTTP/1.0: the answer ends with its connection."""

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(
                b'{"message":{"content":"a"}}\n{"message":{"content":"b"}}\n{"done":true,"eval_count":2}\n'
            )

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that does not trust it leaves."""

    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with Quiet(("127.0.0.1", 0), Speaks) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"https://localhost:{server.server_port}"
        trusted, _ = loadtest.run(url, tmp_path / "a", *SMALL, "--ca", str(tmp_path / "cert.pem"))
        unknown, _ = loadtest.run(url, tmp_path / "b", *SMALL)
        server.shutdown()
        thread.join()
    assert (trusted.total.ok, trusted.total.output_tokens) == (40, 80)
    assert unknown.total.errors["connect"].count == 40
    assert "the certificate is not trusted" in next(iter(unknown.total.errors["connect"].reasons))


def test_a_failed_warm_up_measures_nothing(node: str, tmp_path: Path) -> None:
    words = ["--no-key", "--model", "absent", "--closed", "2", "--output", str(tmp_path / "out")]
    env = loadtest.environment()
    done = subprocess.run(
        loadtest.command(node, *words), env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 1
    assert "nothing was measured: HTTP error: status 404: " in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_open_loop_counts_from_when_a_request_was_due(node: str, tmp_path: Path) -> None:
    # Each answer takes half a second, one at a time; four are due each second.
    words = ("--model", "single", "--max-tokens", "10", "--requests", "12")
    found, done = loadtest.run(node, tmp_path / "open", *words, "--rate", "4")
    assert done.returncode == 0
    # The last is due after 2.75 s and begins after the eleven before it. None waited for another at the client, where
    # it would have begun after 5.5 s.
    assert found.total.measures["e2e"].max > 11 * 0.45 + 0.45 - 2.75
    assert sum(slot.started for slot in found.series if slot.at < 5.0) == 12
    assert found.client.in_flight_max >= 5
    closed, _ = loadtest.run(node, tmp_path / "closed", *words, "--closed", "1")
    assert closed.client.in_flight_max == 1


def test_what_the_client_is_late_counts_and_is_said(node: str) -> None:
    target = guard.target(node, None, {})
    load = Load("constant", (("quick", 1.0),), ("none",), 100, 60.0, rate=50.0)
    options = Options(target, Shape(target, "native", "chat", True), load, ("",))
    held: list[bool] = []

    def hold(recorder: Recorder, over: bool) -> None:
        if not held:
            held.append(True)
            time.sleep(1.0)

    found = outcome.result(options, run(options, hold), "", [])
    assert found.total.ok == 100
    # What was due while the client could not send: nothing of it is hidden.
    assert found.client.late.max > 0.9
    assert found.total.measures["ttft"].max > 0.9
    assert found.client.warnings[0].startswith("client saturated")


def test_models_are_asked_by_weight(node: str, tmp_path: Path) -> None:
    words = ("--model", "quick", "--model", "other", "--zipf", "1.6", "--rate", "200", "--requests", "200")
    found, _ = loadtest.run(node, tmp_path, *words)
    asked = {name: group.requests for name, group in found.by_model.items()}
    assert sum(asked.values()) == 200
    assert 120 < asked["quick"] < 180


def test_a_trace_is_played(node: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:00:{at:02d}.0000000,{100 + at},{at + 1}\n" for at in range(20)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(rows))
    words = ("--trace", str(trace), "--speed", "20", "--cap-output", "10", "--model", "quick")
    found, done = loadtest.run(node, tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr
    assert found.total.ok == 20
    assert found.total.output_tokens == sum(min(10, at + 1) for at in range(20))
    later, _ = loadtest.run(node, tmp_path / "later", *words, "--from", "5s", "--duration", "500ms")
    # Of the seconds 5 to 14: each is a twentieth of a second.
    assert later.total.output_tokens == 6 + 7 + 8 + 9 + 10 * 6
    assert later.total.requests == later.load.requests == 10
    assert found.load.description == (
        "open loop, trace trace.csv, 20 times as fast, 20 requests in 950 ms at most, answers cut at 10"
    )


def test_too_many_under_way_are_not_sent_and_said(node: str, tmp_path: Path, faulty: Any) -> None:
    faulty(kind="hang")
    words = ("--model", "quick", "--rate", "50", "--requests", "20", "--max-in-flight", "5", "--timeout", "5s")
    found, _ = loadtest.run(node, tmp_path, *words, "--warmup", "0")
    assert found.total.errors["not_sent"] == ErrorKind(15, {"5 under way": 15})
    assert found.total.errors["timeout"].count == 5
    assert any("were not sent" in warning for warning in found.client.warnings)


@pytest.mark.parametrize("loop", [("--closed", "3"), ("--poisson", "20")], ids=["closed", "open"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_report(node: str, tmp_path: Path, loop: tuple[str, str], number: int) -> None:
    out = tmp_path / "out"
    words = ["--no-key", "--model", "quick", "--max-tokens", "400", *loop, "--requests", "5000", "--output", str(out)]
    process = subprocess.Popen(
        loadtest.command(node, *words), env=loadtest.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    # The first line of progress says that answers came.
    until(lambda: b"done" in process.stderr.read1(4096), "progress")  # type: ignore[union-attr]
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"stopped early" in stderr
    assert b"time to first token" in stdout
    found = msgspec.json.decode((out / "result.json").read_bytes(), type=Result)
    assert found.interrupted
    assert found.total.ok > 0 and found.total.failed == 0
    assert found.total.requests == found.total.ok + found.total.cancelled < 5000
    assert "Stopped early" in (out / "report.html").read_text()


def test_the_simple_form_prints_each_batch(node: str) -> None:
    script = servers.REPOSITORY / "tests" / "load" / "load_test.py"
    words = [sys.executable, str(script), "--url", node, "--model", "quick", "--concurrency", "4", "--requests", "10"]
    env = loadtest.environment({"CORRAL_KEY": "anything"})
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:3] for line in lines[2:6]] == [["1", "4", "0"], ["2", "4", "0"], ["3", "2", "0"], ["all", "10", "0"]]
    assert lines[1][3:5] == ["average", "deviation"]
    without = {name: value for name, value in env.items() if name != "CORRAL_KEY"}
    done = subprocess.run(words, env=without, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2 and "set CORRAL_KEY" in done.stderr


def test_the_real_model(embedded_node: servers.Server, tmp_path: Path) -> None:
    words = ("--closed", "2", "--requests", "4", "--max-tokens", "8")
    found, done = loadtest.run(embedded_node.url, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert found.load.models == [(servers.MODEL, 1.0)]
    assert found.total.ok == 4
    assert 4 <= found.total.output_tokens <= 32
    # Plain words are about a token each, whatever the vocabulary.
    assert 64 <= found.total.prompt_tokens / 4 <= 140


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path) -> None:
    words = ("--no-key", "--closed", "1", "--requests", "1", "--model", "m")
    argv = loadtest.command(f"http://127.0.0.1:{free_port()}", *words)
    done = subprocess.run(
        argv, env=loadtest.environment(), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, list(tmp_path.iterdir())) == (1, []), done.stderr


def test_help_names_the_defaults() -> None:
    assert "$CORRAL_LOADTEST_ALLOW" in corral("loadtest", "run", "--help")
