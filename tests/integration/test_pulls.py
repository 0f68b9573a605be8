"""A node is sent to the registries that somebody listed, and to nobody else: pulls of a real Ollama, and a canary."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.control import Running, until
from support.site import OllamaNode


class Canary:
    """Listens, and counts who comes."""

    def __init__(self) -> None:
        self.hits: list[str] = []
        canary = self

        class Handler(BaseHTTPRequestHandler):
            def handle(self) -> None:
                canary.hits.append("connection")
                super().handle()

            def do_GET(self) -> None:
                canary.hits.append(self.path)
                self.send_error(404)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.host = f"127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def canary() -> Iterator[Canary]:
    with closing(Canary()) as made:
        yield made


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OllamaNode]:
    made = OllamaNode(tmp_path_factory.mktemp("node") / "ollama")
    yield made
    made.process.end()


def ask(control: Running, route: str, *names: str) -> tuple[int, str]:
    """Status, and the code of the error or the end of the operation."""
    answer = control.admin.post(f"/admin/models/{route}", json={"models": names} if names else {})
    told: dict[str, Any] = answer.json()
    if answer.status_code != 202:
        return answer.status_code, str(told["error"]["code"])

    def ended() -> dict[str, Any] | None:
        found = control.admin.get(f"/admin/operations/{told['id']}").json()
        return found if found["state"] not in ("queued", "running") else None

    return 202, str(until("the operation ends", ended))


def test_a_pull_goes_nowhere_that_is_not_listed(tmp_path: Path, node: OllamaNode, canary: Canary) -> None:
    names = [
        *(f"{canary.host}/library/m", f"{canary.host}/a/m:latest", f"http://{canary.host}/a/m"),
        *(f"https://{canary.host}/a/m", f"{canary.host}/a/b/c", f"localhost:{canary.host.rpartition(':')[2]}/a/m"),
        *("169.254.169.254/latest/meta-data", "Registry.ollama.ai:80/a/m", "hf.co/a/m"),
    ]
    control = Running(tmp_path / "state", nodes=[{"url": node.url}])
    try:
        until("the node is there", lambda: control.node()["version"])
        for name in names:
            for route in ("pull", "preload"):
                assert ask(control, route, name) == (403, "registry_not_listed"), (route, name)
        # What an administrator puts into the catalogue is not pulled from elsewhere either.
        control.admin.put("/admin/models/catalogue", json=[{"name": names[0]}]).raise_for_status()
        status, ended = ask(control, "apply")
        assert (status, "mirror.registries" in ended) == (202, True), ended
        assert canary.hits == []
    finally:
        control.close()


def test_one_that_is_listed_is_asked(tmp_path: Path, node: OllamaNode, canary: Canary) -> None:
    """The same canary: it does hear of a node that is sent to it."""
    for number, mirror in enumerate(({"registries": [canary.host]}, {"registry": canary.host, "insecure": True})):
        control = Running(tmp_path / f"state-{number}", nodes=[{"url": node.url}], mirror=mirror)
        try:
            until("the node is there", lambda control=control: control.node()["version"])  # type: ignore[misc]
            canary.hits.clear()
            assert ask(control, "pull", f"{canary.host}/a/m")[0] == 202
            assert canary.hits
        finally:
            control.close()
