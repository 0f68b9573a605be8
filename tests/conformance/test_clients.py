"""The official clients against all four targets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import anthropic
import httpx
import ollama
import openai
import pytest
from conformance.cases import GREEDY, MODEL
from conformance.exchange import Target

MESSAGES = [{"role": "user", "content": "Say hi."}]
ANY_KEY = "an Ollama takes any"


@contextmanager
def ollama_client(target: Target) -> Iterator[ollama.Client]:
    client = ollama.Client(host=target.url, headers=target.headers, timeout=60)
    try:
        yield client
    finally:
        client._client.close()


@contextmanager
def openai_client(target: Target, key: str | None = None) -> Iterator[openai.OpenAI]:
    key = key or target.key or ANY_KEY
    with openai.OpenAI(base_url=f"{target.url}/v1", api_key=key, max_retries=0, timeout=60) as client:
        yield client


@contextmanager
def anthropic_client(target: Target, key: str | None = None) -> Iterator[anthropic.Anthropic]:
    key = key or target.key or ANY_KEY
    with anthropic.Anthropic(base_url=target.url, api_key=key, max_retries=0, timeout=60) as client:
        yield client


def test_ollama_chat_and_generate(target: Target) -> None:
    with ollama_client(target) as client:
        whole = client.chat(MODEL, MESSAGES, options=GREEDY)
        parts = list(client.chat(MODEL, MESSAGES, options=GREEDY, stream=True))
        assert "".join(part.message.content or "" for part in parts) == whole.message.content
        assert parts[-1].done and parts[-1].eval_count == whole.eval_count == 4
        answer = client.generate(MODEL, "Say hi.", options=GREEDY)
        assert answer.response and answer.done_reason == "length"
        assert (
            "".join(part.response for part in client.generate(MODEL, "Say hi.", options=GREEDY, stream=True))
            == answer.response
        )


def test_ollama_embeddings_and_models(target: Target) -> None:
    with ollama_client(target) as client:
        assert [len(vector) for vector in client.embed(MODEL, ["a", "b"]).embeddings] == [576, 576]
        assert len(client.embeddings(MODEL, "a").embedding) == 576
        assert MODEL in [model.model for model in client.list().models]
        shown = client.show(MODEL)
        assert shown.details is not None and shown.details.family == "llama"
        assert "completion" in (shown.capabilities or [])
        assert client.ps().models is not None


def test_ollama_errors(target: Target) -> None:
    with ollama_client(target) as client:
        with pytest.raises(ollama.ResponseError, match="nope") as caught:
            client.chat("nope", MESSAGES)
        assert caught.value.status_code == 404
        with pytest.raises(ollama.ResponseError, match="nope"):
            list(client.generate("nope", "x", stream=True))


def test_ollama_async(target: Target) -> None:
    async def run() -> str:
        client = ollama.AsyncClient(host=target.url, headers=target.headers, timeout=60)
        try:
            return "".join(
                [
                    part.message.content or ""
                    async for part in await client.chat(MODEL, MESSAGES, stream=True, options=GREEDY)
                ]
            )
        finally:
            await client._client.aclose()

    assert asyncio.run(run())


def test_openai_chat(target: Target) -> None:
    with openai_client(target) as client:
        asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, "temperature": 0, "seed": 0}
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].finish_reason == "length" and whole.usage and whole.usage.completion_tokens == 4
        with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
            chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage == whole.usage


def test_openai_completion_embeddings_models(target: Target) -> None:
    with openai_client(target) as client:
        asked = {"model": MODEL, "prompt": "Say hi.", "max_tokens": 4, "temperature": 0, "seed": 0}
        whole = client.completions.create(**asked)
        with client.completions.create(**asked, stream=True) as stream:
            assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == whole.choices[0].text
        # The client asks for base64 unless told otherwise, and decodes it.
        vectors = client.embeddings.create(model=MODEL, input=["a", "b"])
        assert [len(item.embedding) for item in vectors.data] == [576, 576]
        assert MODEL in [model.id for model in client.models.list()]
        assert client.models.retrieve(MODEL).id == MODEL


def test_openai_errors(target: Target) -> None:
    with openai_client(target) as client:
        with pytest.raises(openai.NotFoundError, match="nope"):
            client.chat.completions.create(model="nope", messages=MESSAGES)
        with pytest.raises(openai.NotFoundError, match="nope"):
            client.models.retrieve("nope")
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model=MODEL, messages=[])


def test_openai_async(target: Target) -> None:
    async def run() -> str:
        key = target.key or ANY_KEY
        async with openai.AsyncOpenAI(base_url=f"{target.url}/v1", api_key=key, max_retries=0, timeout=60) as client:
            stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=4, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    assert asyncio.run(run())


def test_anthropic_messages(target: Target) -> None:
    with anthropic_client(target) as client:
        asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, "extra_body": {"temperature": 0}}
        whole = client.messages.create(**asked)
        assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 4
        with client.messages.stream(**asked) as stream:
            text = "".join(stream.text_stream)
            last = stream.get_final_message()
        assert text == whole.content[0].text
        assert (last.stop_reason, last.usage.output_tokens) == ("max_tokens", 4)


def test_anthropic_errors(target: Target) -> None:
    with anthropic_client(target) as client:
        with pytest.raises(anthropic.NotFoundError, match="nope"):
            client.messages.create(model="nope", messages=MESSAGES, max_tokens=4)
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(model=MODEL, messages=[], max_tokens=4)


def test_clients_understand_a_wrong_key(gateway: Target) -> None:
    wrong = Target(gateway.name, gateway.url, "sk-wrong")
    with ollama_client(wrong) as native, pytest.raises(ollama.ResponseError) as caught:
        native.chat(MODEL, MESSAGES)
    assert caught.value.status_code == 401
    with openai_client(wrong) as client, pytest.raises(openai.AuthenticationError):
        client.chat.completions.create(model=MODEL, messages=MESSAGES)
    with anthropic_client(wrong) as client, pytest.raises(anthropic.AuthenticationError):
        client.messages.create(model=MODEL, messages=MESSAGES, max_tokens=4)
    assert httpx.post(f"{gateway.url}/api/chat", json={"model": MODEL}).status_code == 401
