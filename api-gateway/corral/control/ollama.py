"""What control asks of a node about models: pull, copy, delete, load, unload, and what it holds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from corral.fleet.catalogue import digest_of
from corral.fleet.node import canonical_name
from corral.wire.native import KEEP_ALIVE

TIMEOUT = 10.0
LOAD = 900.0
SILENCE = 60.0
"""Longest silence of a node in a pull: it sends progress many times a second, also while nothing comes."""


class NodeFailed(Exception):
    """A node did not do what it was asked to; says why. ``gone``: it does not answer at all."""

    def __init__(self, message: str, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


class Ollama:
    """One node's API. Every method raises NodeFailed."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client, self._url = client, url

    async def held(self) -> dict[str, str]:
        """Digests of the models it has, by name."""
        listed = await self._ask("GET", "/api/tags")
        return {entry["name"]: digest_of(str(entry.get("digest"))) for entry in listed.get("models") or []}

    async def digest(self, model: str) -> str | None:
        """A model's digest, None where it is not held."""
        return (await self.held()).get(canonical_name(model))

    async def resident(self, model: str) -> list[dict[str, Any]]:
        """Entries of `/api/ps` of this name: an older version may still be there beside the new one."""
        listed = await self._ask("GET", "/api/ps")
        wanted = canonical_name(model)
        return [entry for entry in listed.get("models") or [] if entry.get("name") == wanted]

    async def trained_context(self, model: str) -> int | None:
        """The longest context that a model has, None where the node does not say."""
        shown = await self._ask("POST", "/api/show", {"model": model})
        values = [value for name, value in (shown.get("model_info") or {}).items() if name.endswith(".context_length")]
        return values[0] if values and isinstance(values[0], int) else None

    async def pull(self, model: str, insecure: bool) -> AsyncIterator[dict[str, Any]]:
        """Progress of a pull as Ollama sends it: ``status``, and ``digest``, ``total``, ``completed`` of a layer."""
        body = {"model": model, "insecure": insecure, "stream": True}
        timeout = httpx.Timeout(TIMEOUT, read=SILENCE)
        finished = False
        try:
            async with self._client.stream("POST", self._url + "/api/pull", json=body, timeout=timeout) as answer:
                if answer.status_code == 501:
                    raise NodeFailed("this node cannot pull models: it is no Ollama but the embedded node")
                if answer.status_code != 200:
                    raise NodeFailed(_error(await answer.aread(), answer.status_code))
                async for line in answer.aiter_lines():
                    event = _object(line)
                    if error := event.get("error"):
                        raise NodeFailed(f"the pull of {model} failed: {error}")
                    finished = finished or event.get("status") == "success"
                    yield event
        except httpx.HTTPError as error:
            raise _unanswered(error) from None
        if not finished:
            raise NodeFailed(f"the pull of {model} ended half-way")

    async def copy(self, source: str, target: str) -> None:
        """Give a model a second name."""
        await self._ask("POST", "/api/copy", {"source": source, "destination": target})

    async def delete(self, model: str) -> None:
        """Take a name away; what no other name uses goes with it. One that is not there is no error."""
        with contextlib.suppress(_NotThere):
            await self._ask("DELETE", "/api/delete", {"model": model})

    async def load(self, model: str, options: dict[str, Any]) -> None:
        """Load a model for good, with the options that requests through the gateway have."""
        body = {"model": model, "keep_alive": KEEP_ALIVE, "options": options, "stream": False}
        try:
            await self._ask("POST", "/api/generate", body, LOAD)
        except NodeFailed as error:
            if "does not support generate" not in str(error):
                raise
            await self._ask("POST", "/api/embed", {**body, "input": []}, LOAD)

    async def unload(self, model: str) -> None:
        """Take a model out of memory once its requests have ended. One that is not held is no error."""
        body = {"model": model, "keep_alive": 0, "stream": False}
        with contextlib.suppress(_NotThere):
            try:
                await self._ask("POST", "/api/generate", body)
            except NodeFailed as error:
                if "does not support generate" not in str(error):
                    raise
                await self._ask("POST", "/api/embed", {**body, "input": []})

    async def _ask(self, method: str, path: str, body: object = None, timeout: float = TIMEOUT) -> dict[str, Any]:  # noqa: ASYNC109
        try:
            answer = await self._client.request(method, self._url + path, json=body, timeout=timeout)
        except httpx.HTTPError as error:
            raise _unanswered(error) from None
        if answer.status_code == 404:
            raise _NotThere(_error(answer.content, 404))
        if answer.status_code != 200:
            raise NodeFailed(f"{path}: {_error(answer.content, answer.status_code)}")
        return _object(answer.text) if answer.content.strip() else {}


class _NotThere(NodeFailed):
    """The node has no such model."""


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        raise NodeFailed(f"the node answers no JSON: {text[:100]!r}") from None
    if not isinstance(value, dict):
        raise NodeFailed(f"the node answers no object: {text[:100]!r}")
    return value


def _error(content: bytes, status: int) -> str:
    with contextlib.suppress(NodeFailed):
        error = _object(content.decode("utf-8", "replace")).get("error")
        if error:
            return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    return f"status {status}"


def _unanswered(error: httpx.HTTPError) -> NodeFailed:
    if isinstance(error, httpx.ReadTimeout):
        return NodeFailed("the node says nothing any more", gone=True)
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return NodeFailed("the node does not answer", gone=True)
    return NodeFailed(f"the node has gone away ({type(error).__name__})", gone=True)
