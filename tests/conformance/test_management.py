"""Models on a bare node: made from a GGUF, copied, deleted, as Ollama does it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from conformance.cases import GREEDY, MODEL
from conformance.exchange import Target, send

from corral.fleet import smollm2


def names(target: Target) -> list[str]:
    return [model["name"] for model in send(target, "GET", "/api/tags").last["models"]]


@pytest.fixture
def clean(bare: Target) -> Iterator[Target]:
    """A node from which what a test made is removed."""
    yield bare
    for name in names(bare):
        if name.startswith("made"):
            send(bare, "DELETE", "/api/delete", {"model": name})


def test_copy_and_delete(clean: Target) -> None:
    copied = send(clean, "POST", "/api/copy", {"source": MODEL, "destination": "made"})
    assert (copied.status, copied.content_type, copied.text) == (200, "", "")
    assert "made:latest" in names(clean)
    body = {"model": "made", "prompt": "hi", "stream": False, "options": GREEDY}
    answer = send(clean, "POST", "/api/generate", body)
    assert answer.last["model"] == "made" and answer.last["eval_count"] == 4
    deleted = send(clean, "DELETE", "/api/delete", {"model": "made"})
    assert (deleted.status, deleted.content_type, deleted.text) == (200, "", "")
    assert "made:latest" not in names(clean)
    assert MODEL in names(clean)
    assert send(clean, "POST", "/api/generate", body).status == 404


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/copy", {"source": "nope", "destination": "made"}),
        ("DELETE", "/api/delete", {"model": "nope"}),
        ("POST", "/api/show", {"model": "nope"}),
    ],
)
def test_unknown_model(clean: Target, method: str, path: str, body: dict[str, str]) -> None:
    answer = send(clean, method, path, body)
    assert answer.status == 404 and "nope" in answer.last["error"]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_create_from_gguf(clean: Target, stream: bool) -> None:
    path = smollm2.gguf()
    assert path is not None
    content = path.read_bytes()
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    assert send(clean, "HEAD", "/api/blobs/sha256:" + "0" * 64).status == 404
    with clean.client() as client:
        assert client.post(f"/api/blobs/{digest}", content=content).status_code in (200, 201)
        assert client.head(f"/api/blobs/{digest}").status_code == 200
        other = client.post("/api/blobs/sha256:" + "0" * 64, content=b"other")
        assert (other.status_code, other.headers["content-type"]) == (400, "application/json; charset=utf-8")
        for method in ("HEAD", "POST"):
            assert client.request(method, "/api/blobs/nonsense", content=b"x").status_code == 400
    body = {"model": "made:q4", "files": {"model.gguf": digest}, "parameters": {"num_predict": 3, "num_thread": 1}}
    body |= {"template": "{{ .Prompt }}", "system": "Be brief.", "stream": stream}
    answer = send(clean, "POST", "/api/create", body)
    assert answer.status == 200 and answer.last == {"status": "success"}
    assert answer.content_type == ("application/x-ndjson" if stream else "application/json")
    if stream:
        assert all(isinstance(event.data["status"], str) for event in answer.events)
    shown = send(clean, "POST", "/api/show", {"model": "made:q4"}).last
    assert shown["template"] == "{{ .Prompt }}" and shown["system"] == "Be brief."
    assert "num_predict                    3" in shown["parameters"].splitlines()
    body = {"model": "made:q4", "prompt": "One two", "stream": False, "options": {"temperature": 0}}
    answer = send(clean, "POST", "/api/generate", body)
    assert answer.last["eval_count"] == 3, "the model's own parameters hold"
