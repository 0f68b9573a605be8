"""What a caller relies on, asserted outright on all four targets."""

from __future__ import annotations

import base64
import json
import math
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import httpx
import pytest
from conformance.cases import GREEDY, MODEL, SCHEMA
from conformance.exchange import Answer, Target, send
from support.process import until

SECOND = 1_000_000_000
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


def generate(target: Target, **fields: Any) -> Answer:
    body = {"model": MODEL, "prompt": "Say hi.", "options": GREEDY} | fields
    return send(target, "POST", "/api/generate", body)


def chat(target: Target, **fields: Any) -> Answer:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Say hi."}], "options": GREEDY} | fields
    return send(target, "POST", "/api/chat", body)


def test_stream_and_whole_are_the_same_answer(target: Target) -> None:
    whole, stream = generate(target, stream=False).last, generate(target)
    assert "".join(event.data["response"] for event in stream.events) == whole["response"] != ""
    assert [event.data["done"] for event in stream.events] == [False] * (len(stream.events) - 1) + [True]
    whole, stream = chat(target, stream=False).last, chat(target)
    assert "".join(event.data["message"]["content"] for event in stream.events) == whole["message"]["content"] != ""
    for name in ("done_reason", "prompt_eval_count", "eval_count"):
        assert stream.last[name] == whole[name]


def test_greedy_answers_repeat(target: Target) -> None:
    assert chat(target, stream=False).last["message"] == chat(target, stream=False).last["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_counts_and_durations(target: Target, stream: bool) -> None:
    started = time.monotonic_ns()
    last = chat(target, stream=stream).last
    took = time.monotonic_ns() - started
    assert last["done_reason"] == "length"
    assert last["eval_count"] == GREEDY["num_predict"]
    assert 20 < last["prompt_eval_count"] < 60
    assert all(isinstance(last[name], int) and last[name] > 0 for name in DURATIONS), last
    parts = sum(last[name] for name in DURATIONS[1:])
    assert parts <= last["total_duration"] * 1.05 <= took * 1.05, "durations are nanoseconds of this request"
    assert last["created_at"].endswith("Z") and last["model"] == MODEL


def test_more_tokens_count_more(target: Target) -> None:
    last = generate(target, raw=True, prompt="One two three", stream=False, options=GREEDY | {"num_predict": 9}).last
    assert last["eval_count"] <= 9
    assert (last["done_reason"] == "length") == (last["eval_count"] == 9)


def test_stop_string_ends_the_answer_and_is_left_out(target: Target) -> None:
    full = chat(target, stream=False, options=GREEDY | {"num_predict": 12}).last["message"]["content"]
    word = full.split()[1]
    last = chat(target, stream=False, options=GREEDY | {"num_predict": 12, "stop": [word]}).last
    assert last["done_reason"] == "stop"
    assert last["message"]["content"] == full[: full.index(word)]


def test_format_json_is_json(target: Target) -> None:
    messages = [{"role": "user", "content": 'Answer with {"a": 1} and nothing else.'}]
    last = chat(target, stream=False, format="json", messages=messages, options=GREEDY | {"num_predict": 64}).last
    content = last["message"]["content"]
    assert content.lstrip().startswith(("{", "["))
    if last["done_reason"] == "stop":
        json.loads(content)


@pytest.mark.parametrize("stream", [True, False])
def test_schema_holds(target: Target, stream: bool) -> None:
    answer = generate(target, stream=stream, format=SCHEMA, options=GREEDY | {"num_predict": 64})
    text = "".join(event.data["response"] for event in answer.events)
    assert answer.last["done_reason"] == "stop"
    assert isinstance(json.loads(text)["n"], int)


def test_seeds_differ(target: Target) -> None:
    texts = {
        generate(
            target, raw=True, prompt="Once", stream=False, options={"temperature": 2, "seed": seed, "num_predict": 8}
        ).last["response"]
        for seed in range(4)
    }
    assert len(texts) > 1


def test_load_is_seen_in_ps(target: Target) -> None:
    answer = generate(target, prompt="", stream=False)
    assert answer.last["done_reason"] == "load" and answer.last["response"] == ""
    found: list[dict[str, Any]] = []

    def listed() -> bool:
        answer = send(target, "GET", "/api/ps")
        assert answer.content_type == "application/json; charset=utf-8"
        found[:] = [model for model in answer.last["models"] if model["name"] == MODEL]
        return bool(found)

    until(listed, f"{MODEL} in /api/ps")
    (model,) = found
    expected = {"name", "model", "size", "digest", "details", "expires_at", "size_vram", "context_length"}
    assert set(model) == expected
    assert model["size"] > 90_000_000 and model["context_length"] == 4096
    tag = next(tag for tag in send(target, "GET", "/api/tags").last["models"] if tag["name"] == MODEL)
    assert tag["digest"] == model["digest"] and len(tag["digest"]) == 64


def _unloads(target: Target, **fields: Any) -> None:
    """A chat with these fields has the model leave.

    The last caller's keep_alive wins for everybody, and that may be the canary of a stack that has the node: it asks
    how long the model is to stay, and has it stay (or come back) for as long if the chat was in between.
    """

    def unloaded() -> bool:
        models = send(target, "GET", "/api/ps").last["models"]
        if models and datetime.fromisoformat(models[0]["expires_at"]).timestamp() > time.time() + 2:
            chat(target, stream=False, **fields)
        return not models

    until(unloaded, f"nothing is loaded after {fields}")


def test_unload_and_the_next_request_loads(bare: Target) -> None:
    assert chat(bare, messages=[], keep_alive=0, stream=False).last["done_reason"] == "unload"
    _unloads(bare, messages=[], keep_alive=0)
    last = chat(bare, stream=False).last
    assert last["eval_count"] == 4 and last["load_duration"] > 0


def test_keep_alive_ends(bare: Target) -> None:
    assert chat(bare, stream=False, keep_alive="1s").last["done_reason"] == "length"
    _unloads(bare, keep_alive="1s")


def test_embeddings_are_vectors(target: Target) -> None:
    answer = send(target, "POST", "/api/embed", {"model": MODEL, "input": ["hello", "the sea", "hello"]}).last
    vectors = answer["embeddings"]
    assert [len(vector) for vector in vectors] == [576] * 3
    assert all(math.isclose(math.hypot(*vector), 1, abs_tol=1e-3) for vector in vectors), "unit length"
    assert math.dist(vectors[0], vectors[2]) < 1e-3 < math.dist(vectors[0], vectors[1])
    old = send(target, "POST", "/api/embeddings", {"model": MODEL, "prompt": "hello"}).last["embedding"]
    length = math.hypot(*old)
    assert length > 2, "the older route does not normalise"
    assert math.dist([value / length for value in old], vectors[0]) < 0.02


def test_embedding_forms_agree(target: Target) -> None:
    floats = send(target, "POST", "/v1/embeddings", {"model": MODEL, "input": "hello"}).last["data"][0]["embedding"]
    body = {"model": MODEL, "input": "hello", "encoding_format": "base64"}
    coded = base64.b64decode(send(target, "POST", "/v1/embeddings", body).last["data"][0]["embedding"])
    decoded = struct.unpack(f"<{len(coded) // 4}f", coded)
    assert len(floats) == len(decoded) == 576
    assert math.dist(floats, decoded) < 1e-3


def test_answers_at_once_are_each_right(target: Target) -> None:
    alone = chat(target, stream=False).last["message"]["content"]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda _: chat(target).events, range(4)))
    for events in together:
        assert "".join(event.data["message"]["content"] for event in events) == alone


# A row without end: of a story the model had enough after 472 tokens.
LONG = {"temperature": 0, "seed": 0, "num_predict": 3000, "stop": ["\u0000"], "repeat_penalty": 1.0}
STORY = {"model": MODEL, "prompt": ", ".join(["row"] * 12) + ",", "raw": True, "options": LONG}


def _leave_stream(target: Target) -> None:
    with target.client() as client, client.stream("POST", "/api/generate", json=STORY) as response:
        lines = response.iter_lines()
        next(lines)
        next(lines)


def _leave_whole(target: Target) -> None:
    with target.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/api/generate", json=STORY | {"stream": False}, timeout=httpx.Timeout(10, read=1.0))


@pytest.mark.parametrize("leave", [_leave_stream, _leave_whole], ids=["stream", "whole"])
def test_client_that_leaves_frees_its_slot(target: Target, leave: Any) -> None:
    """All slots are taken by callers who leave: 3,000 tokens each would take several times the bound on any core."""
    generate(target, stream=False)
    started = time.monotonic()
    generate(target, stream=False)
    alone = time.monotonic() - started
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(leave, [target] * 4))
    started = time.monotonic()
    assert generate(target, stream=False).status == 200
    assert time.monotonic() - started < 10 + alone
