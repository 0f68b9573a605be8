"""The embedded node knows every route of Ollama: what it cannot do is a 501 in the shape of the API that was asked."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from corral.node import app
from corral.node.main import build

QUICK = {"models": [{"name": "m", "load": 0.0, "prefill": 1e9, "decode": 1e9}]}
SERVED = [
    ("HEAD", "/"), ("GET", "/"), ("HEAD", "/api/version"), ("GET", "/api/version"), ("HEAD", "/api/tags"),
    ("GET", "/api/tags"), ("POST", "/api/show"), ("DELETE", "/api/delete"), ("POST", "/api/create"),
    ("POST", "/api/blobs/sha256:00"), ("HEAD", "/api/blobs/sha256:00"), ("POST", "/api/copy"), ("GET", "/api/ps"),
    ("POST", "/api/generate"), ("POST", "/api/chat"), ("POST", "/api/embed"), ("POST", "/api/embeddings"),
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/embeddings"), ("GET", "/v1/models"),
    ("GET", "/v1/models/m"), ("POST", "/v1/messages"),
]  # fmt: skip
ABSENT = [
    ("POST", "/api/pull"), ("POST", "/api/push"), ("POST", "/api/me"), ("POST", "/api/signout"),
    ("DELETE", "/api/user/keys/a2V5"), ("GET", "/api/status"), ("GET", "/api/experimental/aliases"),
    ("POST", "/api/experimental/aliases"), ("DELETE", "/api/experimental/aliases"), ("POST", "/v1/responses"),
    ("POST", "/v1/images/generations"), ("POST", "/v1/images/edits"), ("POST", "/v1/messages/count_tokens"),
]  # fmt: skip
"""With SERVED all that Ollama 0.17.4 registers (server/routes.go), and count_tokens, which is Anthropic's alone."""


def ask(method: str, path: str) -> httpx.Response:
    async def run() -> httpx.Response:
        node = httpx.ASGITransport(app.create(build("simulated", None, None, 1, 1, QUICK, False)))
        async with httpx.AsyncClient(transport=node, base_url="http://node") as client:
            return await client.request(method, path, content=b"{}" if method == "POST" else None)

    return asyncio.run(run())


@pytest.mark.parametrize(("method", "path"), ABSENT)
def test_what_it_cannot_do_is_a_501(method: str, path: str) -> None:
    answer = ask(method, path)
    assert answer.status_code == 501
    error = json.loads(answer.content)
    if path.startswith("/v1/"):
        assert error.get("type") == ("error" if path.startswith("/v1/messages") else None)
        error = {"error": error["error"]["message"]}
    assert error == {"error": f"{path} is not supported by the embedded node"}


@pytest.mark.parametrize(("method", "path"), SERVED)
def test_what_it_can_do_is_there(method: str, path: str) -> None:
    """A simulated node keeps no files: for those it is a 501 too."""
    answer = ask(method, path)
    assert answer.status_code != 405 and answer.text != "404 page not found"
    assert answer.status_code != 501 or path.startswith(("/api/create", "/api/blobs/"))


def test_all_else_is_not_found() -> None:
    for method, path in (("GET", "/api/none"), ("POST", "/v1/images"), ("GET", "/simulated")):
        answer = ask(method, path)
        assert (answer.status_code, answer.text) == (404, "404 page not found")
