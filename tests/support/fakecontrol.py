"""A control that publishes what a test says, and keeps the records that it is sent."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from corral.store.spool import decode_frames
from support.process import free_port, until

NAME = "gateway-1"  # of the gateway under test


class FakeControl:
    """Serves a snapshot and takes the spool, as control does."""

    def __init__(self, token: str) -> None:
        self.snapshot: dict[str, Any] = {"version": "0", "keys": [], "nodes": [], "models": []}
        self.records: list[dict[str, Any]] = []
        self.notes: list[dict[str, Any]] = []
        """What is not of one request: that a gateway began, how far requests are."""
        self.offsets: dict[str, int] = {}
        self.known_to: dict[str, str] = {}
        """The version of the snapshot that each gateway said to have when it last asked."""
        self.stores: list[str | None] = []
        """What the gateway under test said of the store, each time that it asked."""
        self.elsewhere = False
        """Says that other gateways have the store."""
        self.stopped = False
        self.busy = False
        """Takes no records for now."""
        control = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("X-Corral-Gateways", ",".join(control.known_to))
                if control.elsewhere:
                    self.send_header("X-Corral-Store-Elsewhere", "1")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                if control.stopped:
                    self.close_connection = True
                    return
                if self.path == "/health":
                    self._send(200, b"{}")
                    return
                assert self.headers["Authorization"] == f"Bearer {token}"
                if self.path == "/internal/spent":
                    self._send(200, b'{"day": 0, "month": 0, "used": {}, "complete": true}')
                    return
                known = self.path.partition("since=")[2]
                control.known_to[self.headers["X-Corral-Gateway"]] = known
                if self.headers["X-Corral-Gateway"] == NAME:
                    control.stores.append(self.headers["X-Corral-Store"])
                if known == control.snapshot["version"]:
                    self._send(304, b"")
                else:
                    self._send(200, json.dumps(control.snapshot).encode())

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                if control.stopped:
                    self.close_connection = True
                    return
                if control.busy:
                    self._send(503, b"{}")
                    return
                path, _, query = self.path.partition("?offset=")
                if control.offsets.get(path, 0) != int(query):
                    self._send(409, json.dumps({"offset": control.offsets.get(path, 0)}).encode())
                    return
                for _, record in decode_frames(data):
                    (control.records if "id" in record else control.notes).append(record)
                control.offsets[path] = int(query) + len(data)
                self._send(200, json.dumps({"offset": control.offsets[path]}).encode())

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A gateway that a test ends leaves its connections."""

        self.port = free_port()
        self._server = Quiet(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def publish(self, **parts: Any) -> None:
        """Change the snapshot."""
        version = str(int(self.snapshot["version"]) + 1)
        self.snapshot = self.snapshot | parts | {"version": version}

    def until_known(self) -> None:
        """Wait until the gateway (that under test, if there are more) has in force what was published last."""
        until(lambda: self.known_to.get(NAME) == self.snapshot["version"], "the gateway has the snapshot")

    def stop(self) -> None:
        """Be gone."""
        if not self.stopped:
            self.stopped = True
            self._server.shutdown()
            self._server.server_close()

    def settled(self, request_id: str) -> dict[str, Any]:
        """The settle record of a request, when it has come."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = [r for r in self.records if r["t"] == "settle" and r["request_id"] == request_id]
            return bool(found)

        until(there, f"the record of {request_id}")
        return found[0]
