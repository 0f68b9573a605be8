"""Stands in for Grafana, which Debian does not have: reads its provisioning as Grafana does, and ends where that fails.

Answers /api/health to all, and /api/datasources and /api/search (the dashboards) to the admin.
"""

import base64
import hmac
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

PROVISIONING = Path(os.environ["GF_PATHS_PROVISIONING"])


def files(kind: str) -> list[dict]:
    """The provisioning files of a kind, in order."""
    found = [path for path in sorted((PROVISIONING / kind).glob("*")) if path.suffix in (".yml", ".yaml")]
    assert found, f"no provisioning file for {kind}"
    values = [yaml.safe_load(path.read_text()) for path in found]
    assert all(value["apiVersion"] == 1 for value in values), f"{kind}: apiVersion is not 1"
    return values


def datasources() -> list[dict]:
    """The data sources."""
    sources = [source for value in files("datasources") for source in value["datasources"]]
    for source in sources:
        assert source["name"] and source["type"] and source["access"] in ("proxy", "direct"), source
        assert source["url"].startswith("http://"), source
    return sources


def dashboards() -> list[dict]:
    """The dashboards in the providers' folders."""
    made, uids = [], set()
    for provider in (provider for value in files("dashboards") for provider in value["providers"]):
        assert provider["type"] == "file", provider
        folder = Path(provider["options"]["path"])
        assert folder.is_dir(), f"{folder} is not there"
        for path in sorted(folder.rglob("*.json")):
            board = json.loads(path.read_text())
            assert board["title"] and board["panels"], path
            assert board["uid"] not in uids, f"{path}: uid {board['uid']} is there twice"
            uids.add(board["uid"])
            made.append({"title": board["title"], "uid": board["uid"], "type": "dash-db"})
    return made


ANSWERS = {"/api/datasources": datasources(), "/api/search": dashboards()}
ADMIN = f"{os.environ['GF_SECURITY_ADMIN_USER']}:{os.environ['GF_SECURITY_ADMIN_PASSWORD']}"
LOGIN = "Basic " + base64.b64encode(ADMIN.encode()).decode()


class Handler(BaseHTTPRequestHandler):
    """The few routes of its API."""

    def do_GET(self) -> None:
        if self.path == "/api/health":
            return self.answer(200, {"database": "ok", "version": "stand-in"})
        if not hmac.compare_digest(self.headers.get("Authorization", ""), LOGIN):
            return self.answer(401, {"message": "Unauthorized"})
        if self.path in ANSWERS:
            return self.answer(200, ANSWERS[self.path])
        return self.answer(404, {"message": "Not found"})

    def answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


Path(os.environ["GF_PATHS_DATA"], "grafana.db").touch()
ThreadingHTTPServer(("", 3000), Handler).serve_forever()
