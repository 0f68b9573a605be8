"""What /api/generate, /api/chat and the /v1 routes share: from a decoded request to Ollama's answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from corral.node import clock, names, prompt
from corral.node.errors import NodeError, model_not_found
from corral.node.models import Model
from corral.node.options import Options
from corral.node.runners import Completion, Piece
from corral.node.scheduler import Loaded
from corral.node.service import Node, schema


@dataclass(slots=True)
class Answer:
    """One object of an answer. ``whole``: it is all of it, in no stream; ``raw``: send these bytes instead."""

    value: dict[str, Any]
    whole: bool = False
    raw: bytes | None = None


# Answers in order. None says that the request was accepted and its completion starts: what fails from then on
# fails as a stream does.
Answers = AsyncIterator[Answer | None]


def _checked(request: Mapping[str, Any]) -> None:
    if not 0 <= request.get("top_logprobs", 0) <= 20:
        raise NodeError(400, "top_logprobs must be between 0 and 20")


def _thinking(text: str, request: Mapping[str, Any]) -> None:
    if request.get("think"):
        raise NodeError(400, f'"{text}" does not support thinking')


def _level(request: Mapping[str, Any]) -> None:
    if isinstance(think := request.get("think"), str):
        raise NodeError(400, f'think value "{think}" is not supported for this model')


def _kind(model: Model, text: str, route: str) -> None:
    if model.embeds_only:
        raise NodeError(400, f'"{text}" does not support {route}')


def _completion(request: Mapping[str, Any], text: str, options: Options) -> Completion:
    return Completion(
        prompt=text,
        options=options,
        schema=schema(request.get("format")),
        truncate=request.get("truncate", True),
        shift=request.get("shift", True),
        logprobs=request.get("top_logprobs", 0) if request.get("logprobs") else None,
    )


def _metrics(piece: Piece, start: int, loaded: int) -> dict[str, Any]:
    """The last line's counts and durations in nanoseconds; zeros are left out, as Go does."""
    found = {
        "total_duration": time.monotonic_ns() - start,
        "load_duration": loaded - start,
        "prompt_eval_count": piece.prompt_tokens,
        "prompt_eval_duration": piece.prompt_ns,
        "eval_count": piece.tokens,
        # Ollama's clock of the answer starts at its first token.
        "eval_duration": piece.eval_ns if piece.tokens > 1 else 0,
    }
    return {name: value for name, value in found.items() if value}


@contextlib.contextmanager
def template_errors() -> Any:
    try:
        yield
    except prompt.TemplateError as error:
        raise NodeError(500, str(error)) from None


async def _answers(
    node: Node,
    loaded: Loaded,
    completion: Callable[[], Completion],
    line: Callable[[Piece], dict[str, Any]],
) -> Answers:
    yield None
    async with contextlib.aclosing(node.pieces(loaded, completion())) as pieces:  # type: ignore[type-var]
        async for piece in pieces:
            value = {} if piece.raw else line(piece)
            if piece.logprobs:
                value["logprobs"] = piece.logprobs
            yield Answer(value, raw=piece.raw)


async def chat(node: Node, request: Mapping[str, Any]) -> Answers:
    """The answers to a decoded /api/chat request."""
    start = time.monotonic_ns()
    _checked(request)
    name, given = request.get("model", ""), request.get("messages", [])
    if not names.parse(name).valid:
        raise NodeError(400, "model is required")
    model = node.model(name)

    def line(**fields: Any) -> dict[str, Any]:
        said = {"role": "assistant", "content": ""}
        return {"model": name, "created_at": clock.rfc3339(), "message": said, **fields}

    if not given and request.get("keep_alive") == 0:
        node.scheduler.unload(model)
        yield Answer(line(done=True, done_reason="unload"), whole=True)
        return
    _thinking(name, request)
    _kind(model, name, "chat")
    async with node.schedule(model, request, ("tools",) if request.get("tools") else ()) as (loaded, options):
        ready = time.monotonic_ns()
        if not given:
            yield Answer(line(done=True, done_reason="load"), whole=True)
            return
        if request.get("tools"):
            raise NodeError(501, "the embedded node cannot parse tool calls")
        messages = _conversation(model, given)
        truncate = request.get("truncate", True)
        with template_errors():
            text, images = await prompt.fit(model.template, messages, loaded.context, loaded.runner.tokenize, truncate)
        if request.get("_debug_render_only"):
            empty = {"role": "", "content": ""}
            yield Answer(line(message=empty, done=False, **_rendered(text, images)), whole=True)
            return

        def convert(piece: Piece) -> dict[str, Any]:
            value = line(message={"role": "assistant", "content": piece.text}, done=piece.done)
            return {**value, "done_reason": piece.reason, **_metrics(piece, start, ready)} if piece.done else value

        answers = _answers(node, loaded, lambda: _completion(request, text, options), convert)
        async with contextlib.aclosing(answers):  # type: ignore[type-var]
            async for answer in answers:
                yield answer


def _conversation(model: Model, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The model's own messages, then the request's, with roles in lower case and the system text first."""
    lowered = [{**message, "role": message.get("role", "").lower()} for message in given]
    messages = [*map(dict, model.messages), *lowered]
    if lowered[0]["role"] != "system" and model.system:
        messages.insert(0, {"role": "system", "content": model.system})
    return messages


def _rendered(text: str, images: list[bytes]) -> dict[str, Any]:
    info: dict[str, Any] = {"rendered_template": text}
    if images:
        info["image_count"] = len(images)
    return {"_debug_info": info}


async def generate(node: Node, request: Mapping[str, Any]) -> Answers:
    """The answers to a decoded /api/generate request."""
    start = time.monotonic_ns()
    _checked(request)
    name, given, raw = request.get("model", ""), request.get("prompt", ""), request.get("raw", False)
    if not names.parse(name).valid:
        raise model_not_found(name)
    model = node.model(name)

    def line(**fields: Any) -> dict[str, Any]:
        return {"model": name, "created_at": clock.rfc3339(), "response": "", **fields}

    if not given and request.get("keep_alive") == 0:
        node.scheduler.unload(model)
        yield Answer(line(done=True, done_reason="unload"), whole=True)
        return
    if raw and (request.get("template") or request.get("system") or request.get("context")):
        raise NodeError(400, "raw mode does not support template, system, or context")
    _level(request)
    _thinking(name, request)
    _kind(model, name, "generate")
    async with node.schedule(model, request, ("insert",) if request.get("suffix") else ()) as (loaded, options):
        ready = time.monotonic_ns()
        if not given:
            yield Answer(line(done=True, done_reason="load"), whole=True)
            return
        images: list[bytes] = request.get("images", [])
        text = given
        if not raw:
            with template_errors():
                text = await _generate_prompt(model, request, loaded)
        if request.get("_debug_render_only"):
            yield Answer({**line(done=False), **_rendered(text, images)}, whole=True)
            return
        written: list[str] = []

        def convert(piece: Piece) -> dict[str, Any]:
            written.append(piece.text)
            value = line(response=piece.text, done=piece.done)
            return {**value, "done_reason": piece.reason, **_metrics(piece, start, ready)} if piece.done else value

        answers = _answers(node, loaded, lambda: _completion(request, text, options), convert)
        async with contextlib.aclosing(answers):  # type: ignore[type-var]
            async for answer in answers:
                if answer and answer.value.get("done") and not raw:
                    answer.value["context"] = await loaded.runner.tokenize(text + "".join(written))
                yield answer


async def _generate_prompt(model: Model, request: Mapping[str, Any], loaded: Loaded) -> str:
    source = request.get("template") or model.template
    if request.get("suffix"):
        return prompt.fill(source, request["prompt"], request["suffix"])
    messages: list[dict[str, Any]] = []
    if system := request.get("system") or model.system:
        messages.append({"role": "system", "content": system})
    before = ""
    if "context" in request:
        before = await loaded.runner.detokenize(request["context"])
    else:
        messages += map(dict, model.messages)
    messages.append({"role": "user", "content": request["prompt"], "images": request.get("images", [])})
    text, _ = await prompt.fit(source, messages, loaded.context, loaded.runner.tokenize, request.get("truncate", True))
    return before + text


def folded(answers: list[Answer], field: Callable[[dict[str, Any]], tuple[dict[str, Any], str]]) -> dict[str, Any]:
    """The single object of a request without a stream: the last answer with all text and logprobs.

    ``field`` finds the (holder, key) of an answer's text.
    """
    last = answers[-1].value
    texts = []
    logprobs: list[Any] = []
    for answer in answers:
        holder, key = field(answer.value)
        texts.append(holder[key])
        logprobs += answer.value.get("logprobs", [])
    holder, key = field(last)
    holder[key] = "".join(texts)
    if logprobs:
        last["logprobs"] = logprobs
    return last


__all__ = ["Answer", "Answers", "chat", "folded", "generate", "template_errors"]
