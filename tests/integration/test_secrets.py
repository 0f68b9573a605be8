"""A key's text is with its owner alone: in no file, store, record, page, backup or error of a stack that used it."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from support.backup import FOR_ME, IDENTITY, cli
from support.fleet import QUICK, Fleet
from support.fleet import fleet as run_fleet
from support.process import read_all, until

from corral.backup import archive
from corral.stack.state import StateFolder


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with run_fleet(tmp_path_factory.mktemp("fleet")) as made:
        yield made


class Store:
    """A connection to Valkey that reads whatever comes."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=60)
        self.heard = b""
        self._thread: threading.Thread | None = None

    def ask(self, line: str) -> bytes:
        self._socket.sendall(line.encode() + b"\r\n")
        return self._socket.recv(65536)

    def listen(self) -> None:
        """Take in every command that anybody sends, until `close`."""
        assert self.ask("MONITOR").startswith(b"+OK")

        def run() -> None:
            while data := self._socket.recv(65536):
                self.heard += data

        self._thread = threading.Thread(target=run)
        self._socket.settimeout(None)
        self._thread.start()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join()
        self._socket.close()


def use(url: str, text: str) -> list[httpx.Response]:
    """Every API with a key, well and badly sent."""
    chat = {"model": QUICK, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    answers = []
    client = httpx.Client(base_url=url, timeout=60, trust_env=False)
    for path in ("/api/chat", "/v1/chat/completions", "/v1/messages"):
        for body in ({**chat, "stream": False}, {**chat, "stream": True}, {**chat, "model": "none"}, {"model": 1}):
            for headers in (
                {"Authorization": f"Bearer {text}"},
                {"x-api-key": text},
                {"Authorization": f"Bearer {text}", "x-api-key": text + "x"},
                {"Authorization": f"Basic {text}"},
                {"Authorization": f"Bearer {text}0"},
                {"Authorization": f"Bearer {text}", "Content-Encoding": "gzip"},
            ):
                answers.append(client.post(path, json=body, headers=headers))
    bearer = {"Authorization": f"Bearer {text}"}
    for method, path in (("GET", "/api/tags"), ("GET", "/v1/models"), ("POST", "/api/pull"), ("GET", "/admin/keys")):
        answers.append(client.request(method, path, headers=bearer))
    answers.append(client.post("/admin/keys", json={"name": 5}, headers=bearer))
    answers.append(client.post("/admin/nodes", json={"url": "file:///x"}, headers={"x-api-key": text}))
    client.close()
    return answers


@pytest.mark.slow
def test_a_text_is_with_its_owner_alone(fleet: Fleet, tmp_path: Path) -> None:
    with Store(fleet.valkey.url) as listener, Store(fleet.valkey.url) as store:
        _look_everywhere(fleet, tmp_path, listener, store)


def _look_everywhere(fleet: Fleet, tmp_path: Path, listener: Store, store: Store) -> None:
    stack = fleet.stack
    made = stack.corral("keys", "create", "canary", "--role", "operator", "--concurrency", "9", "--rpm", "9999")
    listener.listen()
    texts = [str(made["key"])]
    answers: list[httpx.Response] = []
    told = stack.corral("status")
    for url in (stack.url, *(gateway["url"] for gateway in told["gateways"]), told["control"]["url"]):
        answers += use(url, texts[0])
    texts.append(stack.corral("keys", "rotate", made["id"])["key"])
    answers += use(stack.url, texts[1])
    shown: list[Any] = [stack.corral("keys", word, *more) for word, *more in (["list"], ["show", made["id"]])]
    shown.append(stack.corral("keys", "revoke", made["id"]))
    answers += use(stack.url, texts[1])
    assert {200, 400, 401, 404, 415} <= {answer.status_code for answer in answers}
    until(lambda: _shipped(fleet, made["id"]), "the records are in the database")
    shown.append(stack.corral("audit", "list", "--limit", "1000"))

    places: dict[str, bytes] = {"what commands print": json.dumps(shown).encode()}
    for number, answer in enumerate(answers):
        places[f"answer {number}"] = repr(dict(answer.headers)).encode() + answer.content
    known = StateFolder(stack.state).stack() or {}
    for url in (known["control"]["metrics"], *(gateway["metrics"] for gateway in known["gateways"])):
        places[url] = httpx.get(url).content
    # What Valkey was told, what it holds, and all files but the secrets' own: what the stack keeps and what it wrote.
    assert b"EVALSHA" in listener.heard and str(made["id"]).encode() in listener.heard
    places["Valkey's commands"] = listener.heard
    assert store.ask("CONFIG SET rdbcompression no").startswith(b"+OK")
    assert store.ask("SAVE").startswith(b"+OK")
    backup = tmp_path / "whole.backup"
    taken = cli("create", "--state", stack.state, "--recipient", str(IDENTITY.to_public()), "--output", backup)
    assert taken.returncode == 0, taken.stderr

    def take(name: str, size: int, source: Any) -> None:
        data = source.read(size)
        places[f"backup: {name}"] = gzip.decompress(data) if name.endswith(".gz") else data

    archive.read(backup, FOR_ME, take)
    places |= {str(path): data for path, data in read_all([*fleet.folder.rglob("*"), *tmp_path.rglob("*")])}
    assert any(name.endswith(".rdb") for name in places) and any("access" in name for name in places)
    assert any(str(made["id"]).encode() in data for name, data in places.items() if name.startswith("backup: "))
    for text in texts:
        secret = text.split("_")[2].encode()
        assert [name for name, data in places.items() if secret in data] == []


def _shipped(fleet: Fleet, key_id: str) -> bool:
    rows = fleet.stack.corral("audit", "list", "--key", key_id, "--limit", "1000")
    return sum(row["outcome"] == "ok" for row in rows) >= 12
