"""What a model's policy and the truncation guard make of requests, seen at a real Ollama."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.process import until
from support.servers import MODEL, Server, ollama
from support.stack import Stack, stack

pytestmark = pytest.mark.ollama

CONTEXT = 512
OPTIONS = {"num_thread": 1, "num_gpu": "refuse", "temperature": {"max": 0.0}, "num_predict": {"max": 3}}
STARTED = 'msg="starting runner"'


class Site:
    """A stack whose one node is a real Ollama, with a policy for its model."""

    def __init__(self, folder: Path, exits: ExitStack) -> None:
        self.node: Server = exits.enter_context(ollama(folder, cpu=0, parallel=1))
        config = folder / "corral.yaml"
        config.write_text(yaml.safe_dump({"models": [{"name": MODEL, "num_ctx": CONTEXT, "options": OPTIONS}]}))
        self.stack: Stack = exits.enter_context(
            stack(folder / "state", "--config", str(config), f"--attach={self.node.url}")
        )

    def post(self, path: str, **body: Any) -> httpx.Response:
        """A request through the edge."""
        whole = {"model": MODEL, "stream": False} | body
        return httpx.post(self.stack.url + path, json=whole, headers=self.stack.headers(), timeout=60)

    def started(self) -> int:
        """How many runners the node has started; one that only read a model's parameters counts too."""
        return self.node.process.log.read_text(errors="replace").count(STARTED)

    def context(self) -> list[int]:
        """The context lengths of what is resident."""
        return [entry["context_length"] for entry in httpx.get(self.node.url + "/api/ps").json()["models"]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with ExitStack() as exits:
        yield Site(tmp_path_factory.mktemp("policy"), exits)


def chat(text: str, turns: int = 1) -> list[dict[str, str]]:
    """Messages of a user, with an assistant's between them."""
    said = [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]
    return (said * turns)[: 2 * turns - 1]


def test_callers_that_want_other_runners_share_one(site: Site) -> None:
    assert site.post("/api/chat", messages=chat("Hi")).status_code == 200
    before = site.started()
    assert site.context() == [CONTEXT]
    wanted = {"num_ctx": 2048, "num_thread": 2, "num_batch": 32}
    answers = [
        site.post("/api/chat", messages=chat("Hi"), options=wanted, keep_alive=0),
        site.post("/v1/chat/completions", messages=chat("Hi"), num_ctx=1024, options=wanted, max_tokens=2),
        site.post("/api/generate", prompt="Hi", options={"num_ctx": 4096}, keep_alive="1s"),
        site.post("/v1/messages", messages=chat("Hi"), max_tokens=2, num_ctx=100),
        site.post("/v1/completions", prompt="Hi", max_tokens=2, num_ctx=64),
    ]
    assert [answer.status_code for answer in answers] == [200] * 5, [answer.text for answer in answers]
    assert (site.started(), site.context()) == (before, [CONTEXT])
    # A direct call with another context shows what they would have cost.
    direct = {"model": MODEL, "prompt": "Hi", "options": {"num_ctx": 256, "num_predict": 1, "num_thread": 1}}
    assert httpx.post(site.node.url + "/api/generate", json=direct | {"stream": False}, timeout=60).status_code == 200
    assert site.started() > before
    assert site.post("/api/chat", messages=chat("Hi")).status_code == 200
    until(lambda: site.context() == [CONTEXT], "the policy's context is back")


def test_a_policy_refuses_and_clamps(site: Site) -> None:
    refused = site.post("/api/chat", messages=chat("Hi"), options={"num_gpu": 0})
    assert (refused.status_code, refused.json()["error"]) == (400, 'option "num_gpu" is refused for this model')
    for more in ({}, {"options": {"num_predict": -1, "temperature": 2.0}}, {"options": {"num_predict": 100}}):
        answer = site.post("/api/chat", messages=chat("Count to a hundred."), **more).json()
        assert (answer["eval_count"], answer["done_reason"]) == (3, "length")
    assert site.post("/v1/chat/completions", messages=chat("Count.")).json()["usage"]["completion_tokens"] == 3


LONG = "word " * (2 * CONTEXT)
"""Over the policy's context, and under what the model itself could hold."""

TOO_LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/api/generate", {"prompt": LONG}),
    "generate-raw": ("/api/generate", {"prompt": LONG, "raw": True}),
    "generate-system": ("/api/generate", {"prompt": "a", "system": LONG}),
    "generate-truncate": ("/api/generate", {"prompt": LONG, "truncate": True, "shift": True}),
    "chat": ("/api/chat", {"messages": chat(LONG)}),
    "chat-truncate": ("/api/chat", {"messages": chat(LONG), "truncate": True}),
    "chat-turns": ("/api/chat", {"messages": chat("word " * 40, turns=25)}),
    "chat-num_ctx": ("/api/chat", {"messages": chat(LONG), "options": {"num_ctx": 8192}}),
    "v1-chat": ("/v1/chat/completions", {"messages": chat(LONG)}),
    "v1-chat-turns": ("/v1/chat/completions", {"messages": chat("word " * 40, turns=25), "truncate": True}),
    "v1-completions": ("/v1/completions", {"prompt": LONG}),
    "messages": ("/v1/messages", {"messages": chat(LONG), "max_tokens": 3}),
    "messages-turns": ("/v1/messages", {"messages": chat("word " * 40, turns=25), "max_tokens": 3}),
    "messages-system": ("/v1/messages", {"messages": chat("a"), "system": LONG, "max_tokens": 3}),
    "embed": ("/api/embed", {"input": LONG, "truncate": True}),
    "embed-one-of": ("/api/embed", {"input": ["a", LONG]}),
    "embeddings": ("/api/embeddings", {"prompt": LONG}),
    "v1-embeddings": ("/v1/embeddings", {"input": LONG}),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", TOO_LONG)
def test_an_over_long_prompt_is_refused_and_never_cut(site: Site, case: str, stream: bool) -> None:
    path, body = TOO_LONG[case]
    answer = site.post(path, **body, stream=stream)
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert "context length" in (error if isinstance(error, str) else error["message"])


def test_a_prompt_that_just_fits_is_counted_whole(site: Site) -> None:
    answer = site.post("/api/generate", prompt="word " * 400, raw=True).json()
    assert 400 <= answer["prompt_eval_count"] <= CONTEXT
