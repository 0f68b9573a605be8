"""A key's secret, a prompt and its answer are in nothing that the platform writes, shows or keeps."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml
from support.backup import IDENTITY, cli
from support.load import Answer
from support.process import read_all, until
from support.servers import valkey
from support.stack import Stack, stack

PROMPT = "Zanzibar-canary-of-a-prompt"
WORDS = 8
"""Of an answer: so many stand nowhere else one behind the other."""
SECRET_FILES = frozenset(("admin.key", "pepper", "internal.token"))
"""What is secret and kept on purpose, with mode 600."""


class Monitor:
    """All that Valkey is told while the block runs."""

    def __init__(self, port: int) -> None:
        self._connection = socket.create_connection(("127.0.0.1", port))
        self._connection.sendall(b"MONITOR\r\n")
        self.heard = b""
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        until(lambda: self.heard.startswith(b"+OK"), "Valkey lets us listen")

    def _listen(self) -> None:
        while data := self._connection.recv(65536):
            self.heard += data

    def close(self) -> None:
        self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()


def said(path: str, stream: bool, body: bytes) -> str:
    """The text of a whole answer."""
    if stream:
        return Answer(path, "", body=body).text
    told = json.loads(body)
    one = (told.get("choices") or told.get("content") or [told])[0]
    return str(one.get("message", {}).get("content") or one.get("response") or one.get("text"))


class Site:
    """A stack that has met keys and prompts of all kinds. ``seen``: the bodies of its errors and its headers."""

    def __init__(self, folder: Path, exits: ExitStack) -> None:
        self.folder = folder
        store = exits.enter_context(valkey(folder))
        self.valkey = urlsplit(store.url).port or 0
        config = folder / "corral.yaml"
        config.write_text(yaml.safe_dump({"store": {"valkey": store.url}}))
        self.monitor = Monitor(self.valkey)
        exits.callback(self.monitor.close)
        arguments = ["--config", str(config), "--nodes", "1", "--node-backend", "simulated"]
        self.stack: Stack = exits.enter_context(stack(folder / "state", *arguments))
        self.made = self.stack.corral("keys", "create", "canary", "--rpm", "30")
        rotated = self.stack.corral("keys", "rotate", self.made["id"], "--overlap", "1h")
        gone = self.stack.corral("keys", "create", "gone")
        self.stack.corral("keys", "revoke", gone["id"])
        self.keys = [self.stack.key, self.made["key"], rotated["key"], gone["key"]]
        broken = self.made["key"][:-1] + ("0" if self.made["key"][-1] != "0" else "1")
        self.texts = [*self.keys, broken]
        self.seen: list[bytes] = []
        self.answers: list[tuple[str, bool, bytes]] = []
        self.model = httpx.get(self.stack.url + "/api/tags", headers=self.stack.headers()).json()["models"][0]["name"]
        for key in self.texts:
            self._ask(key)

    @property
    def canaries(self) -> list[bytes]:
        """What must stand nowhere: the prompt, what was answered, whole keys, and their secrets alone."""
        secrets = [key.split("_", 2)[2] for key in self.texts]
        return [text.encode() for text in (PROMPT, *self.said, *self.texts, *(secret[:20] for secret in secrets))]

    @property
    def said(self) -> list[str]:
        """The answers' texts."""
        return sorted({said(path, stream, body) for path, stream, body in self.answers})

    def _ask(self, key: str) -> None:
        messages = [{"role": "user", "content": PROMPT}]
        body: dict[str, Any] = {"model": self.model, "messages": messages, "prompt": PROMPT, "input": PROMPT}
        body |= {"max_tokens": WORDS, "options": {"num_predict": WORDS}}
        bearer, anthropic = {"Authorization": f"Bearer {key}"}, {"x-api-key": key}
        paths = ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/messages", "/api/embed")
        for path in paths:
            for stream in (True, False):
                answer = self._post(path, anthropic if "messages" in path else bearer, json=body | {"stream": stream})
                if answer.status_code == 200:
                    assert PROMPT not in str(answer.headers)
                    if path != "/api/embed":
                        self.answers.append((path, stream, answer.content))
        raw = json.dumps(body).encode()
        for headers, content in (
            (bearer, raw[:-2]),  # no JSON
            (bearer, raw.replace(b'"user"', b"5")),
            (bearer | {"X-Request-ID": key}, raw),
            (bearer | {"X-Request-ID": f"{PROMPT} {key}"}, raw),
            (bearer | {"x-api-key": key + "x"}, raw),
            ({"Authorization": f"Basic {key}"}, raw),
            ({"Authorization": key}, raw),
            ({"Authorization": f"Bearer {key} {key}"}, raw),
            (bearer | {"Content-Encoding": "gzip"}, raw),
            (bearer | {"Host": f"{key}.example"}, raw),
            (bearer, raw.replace(self.model.encode(), key.encode())),
            (bearer, raw[:-1] + b',"api_base":"http://' + PROMPT.encode() + b'"}'),
        ):
            self._post("/api/chat", headers, content=content)
        self._post(f"/api/chat?key={key}", bearer, content=raw)
        self._post(f"/api/{key}", bearer, content=raw)
        self.seen.append(httpx.get(f"{self.stack.url}/v1/models/{key}", headers=bearer).content)
        self.seen.append(httpx.get(self.stack.url + "/admin/keys", headers=bearer).content)
        broken = b"POST /api/chat HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %b\r\nContent-Length: x\r\n\r\n%b"
        with socket.create_connection(("127.0.0.1", urlsplit(self.stack.url).port or 0), 60) as connection:
            connection.sendall(broken % (key.encode(), raw))
            self.seen.append(connection.recv(65536))

    def _post(self, path: str, headers: dict[str, str], **more: Any) -> httpx.Response:
        answer = httpx.post(self.stack.url + path, headers=headers, timeout=60, **more)
        if answer.status_code != 200:
            self.seen.append(answer.content + str(answer.headers.raw).encode())
        return answer

    def holds(self, content: bytes) -> list[bytes]:
        """The canaries that stand somewhere."""
        return [canary for canary in self.canaries if canary in content]

    def files(self, folder: Path) -> dict[str, list[bytes]]:
        """Files under a folder with canaries in them."""
        found = {}
        for path, data in read_all(folder.rglob("*")):
            if path.name not in SECRET_FILES and (held := self.holds(data)):
                found[str(path.relative_to(folder))] = held
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with ExitStack() as exits:
        yield Site(tmp_path_factory.mktemp("secrets"), exits)


def test_all_that_was_answered_is_looked_for(site: Site) -> None:
    asked = {(path, stream) for path, stream, _ in site.answers}
    assert len(asked) == 10
    assert all(len(text.split()) == WORDS for text in site.said), site.said


def test_errors_repeat_neither_keys_nor_prompts(site: Site) -> None:
    assert len(site.seen) > 50
    assert [one for one in site.seen if site.holds(one)] == []


def test_nothing_in_the_state_has_them(site: Site) -> None:
    """Logs, spool, snapshots, database with its journal, rendered configuration."""
    state = site.stack.state

    def recorded() -> bool:
        return site.made["id"] in {row["key"] for row in site.stack.corral("audit", "list", "--limit", "1000")}

    until(recorded, "what the key did is in the database", every=0.3)
    names = {path.name for path in state.rglob("*") if path.is_file()}
    assert {"corral.db", "haproxy.cfg"} <= names and any(name.endswith(".seg") for name in names)
    assert site.files(state) == {}


def test_valkey_is_told_key_ids_alone(site: Site) -> None:
    assert site.made["id"].encode() in site.monitor.heard
    assert site.holds(site.monitor.heard) == []


def test_metrics_have_none(site: Site) -> None:
    known = json.loads((site.stack.state / "run/stack.json").read_text())
    pages = [gateway["metrics"] for gateway in known["gateways"]] + [known["control"]["metrics"]]
    texts = [httpx.get(page if page.endswith("/metrics") else page + "/metrics").content for page in pages]
    assert all(b"corral_" in text for text in texts)
    assert [site.holds(text) for text in texts] == [[]] * len(texts)


def test_a_backup_has_none(site: Site, tmp_path: Path) -> None:
    (tmp_path / "identity").write_text(str(IDENTITY) + "\n")
    made = cli("create", "--state", site.stack.state, "--recipient", str(IDENTITY.to_public()),
               "--output", tmp_path / "one.backup", "--json")  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert site.holds((tmp_path / "one.backup").read_bytes()) == []
    done = cli("restore", tmp_path / "one.backup", "--identity", tmp_path / "identity", "--state", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new/corral.db").exists()
    assert site.files(tmp_path / "new") == {}
