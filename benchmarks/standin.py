"""A control for a gateway that is measured: a fixed snapshot, and it takes all records."""

from __future__ import annotations

import http.server
import json


class Control(http.server.BaseHTTPRequestHandler):
    """Confirms the gateway's snapshot and takes its records."""

    protocol_version = "HTTP/1.1"
    snapshot: bytes

    def do_GET(self) -> None:
        if self.path == "/internal/spent":
            self._answer(200, b'{"day": 0, "month": 0, "used": {}, "complete": true}')
            return
        fresh = "since=1" in self.path
        self._answer(304 if fresh else 200, b"" if fresh else self.snapshot)

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        self.rfile.read(size)
        offset = int(self.path.rpartition("offset=")[2]) + size
        self._answer(200, json.dumps({"offset": offset}).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class ControlServer(http.server.ThreadingHTTPServer):
    """Lets a gateway go that ends in the middle of a call."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing."""
