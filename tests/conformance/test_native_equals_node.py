"""Native answers through a gateway, value by value against its node's own.

One model with greedy sampling answers both, so the text and the cut of the stream are equal too; only times differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conformance.cases import MODEL, SCHEMA
from conformance.exchange import Json, Target, about, send

HI = [{"role": "user", "content": "Say hi."}]
TURNS = [*HI, {"role": "assistant", "content": "hi"}, {"role": "system", "content": "You are a cat."}, *HI]
UNORDERED = frozenset({"modelfile", "parameters"})
"""Texts of /api/show in which Ollama has a model's parameters in an order that is another one each time."""
TIMES = frozenset({"created_at", "total_duration", "load_duration", "prompt_eval_duration", "eval_duration"})
OPTIONS = {"temperature": 0, "seed": 0, "num_predict": 12}

BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/api/generate", {"prompt": "Say hi.", "stream": False}),
    "generate-stream": ("/api/generate", {"prompt": "Say hi."}),
    "generate-raw": ("/api/generate", {"prompt": "One, two,", "raw": True}),
    "generate-logprobs": ("/api/generate", {"prompt": "Say hi.", "logprobs": True, "top_logprobs": 2, "stream": False}),
    "chat": ("/api/chat", {"messages": HI, "stream": False}),
    "chat-stream": ("/api/chat", {"messages": HI}),
    "chat-turns": ("/api/chat", {"messages": TURNS, "stream": False}),
    "chat-schema": ("/api/chat", {"messages": HI, "format": SCHEMA}),
    "chat-unshifted": ("/api/chat", {"messages": HI, "shift": False, "stream": False}),
    "chat-stop": ("/api/chat", {"messages": HI, "options": OPTIONS | {"stop": ["!", "?"]}}),
    "embed": ("/api/embed", {"input": ["hello", "you"]}),
    "embeddings": ("/api/embeddings", {"prompt": "hello"}),
    "show": ("/api/show", {"options": {}}),
}


@pytest.mark.parametrize("name", BODIES)
def test_native_equals_node(gateway: Target, target_of: Callable[[str], Target], name: str) -> None:
    path, fields = BODIES[name]
    body = {"model": MODEL, "options": OPTIONS} | fields
    expected = send(target_of(gateway.name.removeprefix("gateway-")), "POST", path, body)
    answer = send(gateway, "POST", path, body)
    assert expected.status == 200
    assert (answer.status, answer.content_type) == (200, expected.content_type)
    assert untimed([event.data for event in answer.events]) == about(untimed([event.data for event in expected.events]))


def untimed(value: Json) -> Json:
    """The same, with the type alone of what is a time, and the lines in order of what has none."""
    if isinstance(value, dict):
        lines = {key: sorted(item.splitlines()) for key, item in value.items() if key in UNORDERED}
        return {key: type(item) if key in TIMES else untimed(item) for key, item in value.items()} | lines
    return [untimed(item) for item in value] if isinstance(value, list) else value
