"""Ollama's own inference routes: /api/generate, /api/chat, /api/embed, /api/embeddings, /api/ps."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import Any

from starlette.requests import Request

from corral.node import decode, gguf, names
from corral.node.errors import NodeError
from corral.node.exchange import NDJSON, Reply
from corral.node.faults import EndWithoutDone
from corral.node.inference import Answers, chat, folded, generate
from corral.node.models import Model
from corral.node.runners import TOO_LONG
from corral.node.scheduler import Loaded
from corral.node.service import Node


async def post_chat(node: Node, _: Request, body: bytes, reply: Reply) -> None:
    request = decode.body(body, "api.ChatRequest", decode.CHAT)
    await _send(reply, chat(node, request), request, lambda value: (value["message"], "content"))


async def post_generate(node: Node, _: Request, body: bytes, reply: Reply) -> None:
    request = decode.body(body, "api.GenerateRequest", decode.GENERATE)
    await _send(reply, generate(node, request), request, lambda value: (value, "response"))


async def _send(reply: Reply, answers: Answers, request: dict[str, Any], field: Any) -> None:
    stream = request.get("stream", True)
    held = []
    async with contextlib.aclosing(answers):  # type: ignore[type-var]
        with contextlib.suppress(EndWithoutDone):
            async for answer in answers:
                if answer is None:
                    if stream:
                        reply.stream(NDJSON)
                elif answer.whole:
                    await reply.json(answer.value)
                    return
                elif not stream:
                    held.append(answer)
                elif answer.raw is not None:
                    await reply.chunk(answer.raw)
                else:
                    await reply.line(answer.value)
    if stream:
        await reply.end()
    elif any(answer.raw for answer in held):
        await reply.send(b"".join(answer.raw or b"" for answer in held), 200, "application/json; charset=utf-8")
    elif held:
        await reply.json(folded(held, field))
    else:
        await reply.json({})


async def get_ps(node: Node, _: Request, body: bytes, reply: Reply) -> None:
    await reply.json({"models": node.scheduler.listing()})


# --- embeddings


def _embedding_model(node: Node, text: str) -> Model:
    name = names.parse(text)
    if not name.valid:
        raise NodeError(500, f"unqualified name: {name}")
    try:
        return node.model(text)
    except NodeError:
        raise NodeError(404, f'model "{text}" not found, try pulling it first') from None


def _inputs(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise NodeError(400, "invalid input type")
    return texts


async def embed(node: Node, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a decoded /api/embed request."""
    start = time.monotonic_ns()
    texts = _inputs(request.get("input"))
    name = request.get("model", "")
    model = _embedding_model(node, name)
    async with node.schedule(model, request) as (loaded, _):
        ready = time.monotonic_ns()
        if not texts:
            return {"model": name, "embeddings": []}
        one = [_embed_one(model, loaded, text, request.get("truncate", True)) for text in texts]
        found = await _all(one)
    return {
        "model": name,
        "embeddings": [_unit(vector, request.get("dimensions", 0)) for vector, _ in found],
        "total_duration": time.monotonic_ns() - start,
        "load_duration": ready - start,
        "prompt_eval_count": sum(count for _, count in found),
    }


async def _all(jobs: list[Any]) -> list[Any]:
    """The results of ``jobs``; when one fails the others are cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _embed_one(model: Model, loaded: Loaded, text: str, truncate: bool) -> tuple[list[float], int]:
    async with loaded.slots:
        try:
            return await loaded.runner.embed(text)
        except NodeError as error:
            if error.message != TOO_LONG or not truncate:
                raise
        tokens = await loaded.runner.tokenize(text)
        room = loaded.context
        if model.path is not None:
            # As Ollama: one token is kept free for each of the marks that the tokenizer did not add.
            values = gguf.read(model.path).values
            room -= tokens[0] != values.get("tokenizer.ggml.bos_token_id", 0)
            room -= tokens[-1] != values.get("tokenizer.ggml.eos_token_id", 0)
        return await loaded.runner.embed(await loaded.runner.detokenize(tokens[:room]))


def _unit(vector: list[float], dimensions: int) -> list[float]:
    if 0 < dimensions < len(vector):
        vector = vector[:dimensions]
    length = math.sqrt(sum(value * value for value in vector)) or 1e-12
    return [float(f"{value / length:.8g}") for value in vector]


async def post_embed(node: Node, _: Request, body: bytes, reply: Reply) -> None:
    request = decode.body(body, "api.EmbedRequest", decode.EMBED)
    await reply.json(await embed(node, request))


async def post_embeddings(node: Node, _: Request, body: bytes, reply: Reply) -> None:
    request = decode.body(body, "api.EmbeddingRequest", decode.EMBEDDINGS)
    name = request.get("model", "")
    if not names.parse(name).valid:
        raise NodeError(400, "model is required")
    async with node.schedule(_embedding_model(node, name), request) as (loaded, _options):
        vector: list[float] = []
        if text := request.get("prompt"):
            try:
                async with loaded.slots:
                    vector, _count = await loaded.runner.embed(text)
            except NodeError as error:
                raise NodeError(500, error.message) from None
    await reply.json({"embedding": vector})
