"""The node itself: its models, its runners, and the steps that every inference route shares."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from corral.node import names
from corral.node.errors import NodeError, model_not_found
from corral.node.models import Model, Store
from corral.node.options import Options, merge
from corral.node.runners import Completion, Piece
from corral.node.scheduler import Loaded, Scheduler

VERSION = "0.17.4"

_SCHEMA_TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}


@dataclass(slots=True)
class Node:
    """A node: where its models are, which are loaded, and the back end that makes their runners."""

    store: Store
    scheduler: Scheduler
    backend: Any

    def model(self, text: str) -> Model:
        """The model called ``text``. Raises NodeError 404."""
        found = self.store.find(text) if names.parse(text).valid else None
        if found is None:
            raise model_not_found(text)
        return found

    @contextlib.asynccontextmanager
    async def schedule(
        self, model: Model, request: Mapping[str, Any], needs: tuple[str, ...] = ()
    ) -> AsyncIterator[tuple[Loaded, Options]]:
        """A runner for ``model`` with the request's options; ``needs`` are capabilities beyond its own kind.

        Raises NodeError: 400 for a lacking capability, 500 for a bad option, as Ollama.
        """
        lacking = [need for need in needs if need not in model.capabilities]
        if lacking:
            raise NodeError(400, f"{model.name} does not support " + "\n".join(lacking))
        options = merge(merge(Options(), model.parameters), request.get("options", {}))
        async with self.scheduler.use(model, options, request.get("keep_alive")) as loaded:
            yield loaded, options

    async def pieces(self, loaded: Loaded, request: Completion) -> AsyncIterator[Piece]:
        """The answer to ``request`` once a slot is free; slots are given in order of arrival."""
        async with loaded.slots, contextlib.aclosing(loaded.runner.complete(request)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield piece


def schema(format_: Any) -> dict[str, Any] | None:
    """The JSON schema that a request's ``format`` stands for, None for none. Raises NodeError 500."""
    if format_ is None or format_ == "":
        return None
    if format_ == "json":
        return {"type": "object"}
    if not isinstance(format_, dict):
        shown = _go_json(format_).replace("\\", "\\\\").replace('"', '\\"')
        raise NodeError(500, f'invalid format: "{shown}"; expected "json" or a valid JSON Schema object')
    closed: dict[str, Any] = _closed(format_)
    return closed


def _go_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _closed(part: Any) -> Any:
    """``part`` of a schema as Ollama reads it: known types only, and no properties but those it names."""
    if isinstance(part, list):
        return [_closed(item) for item in part]
    if not isinstance(part, dict):
        return part
    kinds = part.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if isinstance(kind, str) and kind not in _SCHEMA_TYPES:
            raise NodeError(500, "invalid JSON schema in format")
    closed: dict[str, Any] = {}
    for key, value in part.items():
        if key in ("properties", "$defs", "definitions") and isinstance(value, dict):
            closed[key] = {name: _closed(inner) for name, inner in value.items()}
        else:
            closed[key] = value if key in ("enum", "const", "default", "examples") else _closed(value)
    if isinstance(part.get("properties"), dict) and "additionalProperties" not in part:
        closed["additionalProperties"] = False
    return closed
