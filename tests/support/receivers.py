"""Who hears of alerts: a server that speaks Slack's incoming webhook, and control's webhook; and takes checkpoints."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLACK_PATH, CONTROL_PATH = "/services/T000/B000/secret", "/internal/alerts"
CHECKPOINTS_PATH = "/checkpoints"
_ATTACHMENT = {"title": str, "title_link": str, "text": str, "fallback": str, "color": str}


def slack_problem(message: Any) -> str:
    """What Slack would not like about a message, "" if nothing."""
    if not isinstance(message, dict):
        return "invalid_payload"
    if not isinstance(message.get("channel"), str) or not message["channel"].startswith("#"):
        return "channel_not_found"
    attachments = message.get("attachments")
    if not isinstance(attachments, list) or not attachments:
        return "no_text"
    for attachment in attachments:
        for name, kind in _ATTACHMENT.items():
            if not isinstance(attachment.get(name), kind) or not attachment[name].strip():
                return f"invalid_attachments: {name}"
        if attachment["color"] not in ("good", "warning", "danger"):
            return "invalid_attachments: color"
    return ""


class Receivers:
    """What arrived: ``slack`` messages, ``control`` notifications with the monotonic ``at`` of each, ``refused``, and
    ``checkpoints`` as they were sent."""

    def __init__(self, port: int) -> None:
        self.slack_url = f"http://127.0.0.1:{port}{SLACK_PATH}"
        self.control_url = f"http://127.0.0.1:{port}{CONTROL_PATH}"
        self.slack: list[dict[str, Any]] = []
        self.control: list[dict[str, Any]] = []
        self.checkpoints_url = f"http://127.0.0.1:{port}{CHECKPOINTS_PATH}"
        self.checkpoints: list[bytes] = []
        self.refused: list[str] = []
        self._away = False

    def away(self, away: bool) -> None:
        """Whether checkpoints get a 503."""
        self._away = away

    def take(self, path: str, content_type: str, body: bytes) -> tuple[int, str]:
        """Status and text of the answer."""
        if path == CHECKPOINTS_PATH:
            if not self._away:
                self.checkpoints.append(body)
            return 503 if self._away else 204, ""
        try:
            message = json.loads(body)
        except ValueError:
            message = None
        if path == CONTROL_PATH and isinstance(message, dict):
            self.control.append({**message, "at": time.monotonic()})
            return 200, ""
        problem = slack_problem(message) if path == SLACK_PATH else "no_service"
        if "json" not in content_type:
            problem = "invalid_payload"
        if problem:
            self.refused.append(f"{path}: {problem}: {body.decode(errors='replace')}")
            return 400, problem
        self.slack.append(message)
        return 200, "ok"

    def told(self, name: str, status: str, since: float = 0.0, **labels: str) -> float:
        """When control first heard after ``since`` that an alert was ``firing`` or ``resolved``; 0 if it has not.

        Both are monotonic seconds.
        """
        for message in [message for message in list(self.control) if message["at"] > since]:
            for alert in message["alerts"]:
                has = alert["labels"]
                if alert["status"] == status and has["alertname"] == name and labels.items() <= has.items():
                    return float(message["at"])
        return 0.0

    def titles(self) -> list[str]:
        """The titles of Slack's messages, in order."""
        return [attachment["title"] for message in list(self.slack) for attachment in message["attachments"]]


@contextmanager
def receivers() -> Iterator[Receivers]:
    """A server on a free port, in a thread."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, text = made.take(self.path, self.headers.get("Content-Type", ""), body)
            answer = text.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made = Receivers(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()
