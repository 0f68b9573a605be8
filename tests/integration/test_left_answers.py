"""A caller leaves a stream of a real model: what is counted is what came, token by token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from support import servers
from support.load import Answer, Client
from support.mixed import WRITTEN, Way, counts, pieces
from support.process import until
from support.servers import MODEL
from support.stack import Stack, stack

PROMPT = "Tell me a long story of a horse that lived behind a river."
SEEN = 6


@pytest.fixture(scope="module", params=[pytest.param("ollama", marks=pytest.mark.ollama), "embedded_node"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack before a real Ollama, or before the embedded node over llama.cpp, which nobody else asks by now.

    What is computed beside an answer, a canary or what control tries a model with, may round it to another token.
    """
    folder = tmp_path_factory.mktemp("left")
    (folder / "corral.yaml").write_text("control: {canary: {interval: 0}}\n")
    with ExitStack() as exits:
        node = exits.enter_context(getattr(servers, request.param)(folder))
        how = "--config", str(folder / "corral.yaml"), f"--attach={node.url}"
        made = exits.enter_context(stack(folder / "state", *how))
        client = Client(made.url, made.key, timeout=120)
        assert client.ask(WRITTEN[0], body(WRITTEN[0], 1), "loads").status == 200
        client.close()
        made.until_continued(MODEL, seconds=240)
        yield made


def body(path: str, tokens: int) -> bytes:
    """A request whose answer is the same each time."""
    made = json.loads(Way(path).body(MODEL, tokens, PROMPT))
    made.get("options", made)["temperature"] = 0
    return json.dumps(made).encode()


def record(real: Stack, request_id: str) -> dict[str, Any]:
    """The record of a request that has ended."""
    found: list[dict[str, Any]] = []

    def ended() -> bool:
        found[:] = [row for row in real.corral("audit", "list", "--request", request_id) if row["outcome"]]
        return bool(found)

    until(ended, "it is recorded", every=0.3)
    return found[0]


@pytest.mark.parametrize("path", WRITTEN)
def test_what_came_of_a_stream_that_was_left_counts_to_the_token(real: Stack, path: str) -> None:
    client, name = Client(real.url, real.key, timeout=120), path.strip("/").replace("/", "-")
    # Read before, the prompt is the same for both that follow.
    assert client.ask(path, body(path, 1), f"{name}-warm").status == 200
    left = Answer(path, f"{name}-left")
    headers = {**real.headers(), "X-Request-ID": left.request_id, "Content-Type": "application/json"}
    with httpx.stream("POST", real.url + path, content=body(path, 400), headers=headers, timeout=120) as answer:
        assert answer.status_code == 200
        for data in answer.iter_raw():
            left.body += data
            if pieces(left) >= SEEN:
                break
    cut = record(real, left.request_id)
    assert (cut["outcome"], cut["estimated"]) == ("client_gone", True)
    tokens = cut["tokens"]
    assert tokens >= pieces(left)
    whole = client.ask(path, body(path, tokens), f"{name}-whole")
    client.close()
    exact = record(real, whole.request_id)
    assert counts(whole) == (exact["prompt_tokens"], tokens) and exact["estimated"] is False
    tags = httpx.get(real.url + "/api/tags", headers=real.headers(), timeout=60).json()["models"]
    assert [exact["model_digest"]] == [tag["digest"] for tag in tags if tag["name"] == MODEL] == [cut["model_digest"]]
    # The same text: a token more or less would have another.
    assert whole.text.startswith(left.text) and exact["answer_hash"] == cut["answer_hash"]
    assert exact["prompt_tokens"] / 3 < cut["prompt_tokens"] < exact["prompt_tokens"] * 3
