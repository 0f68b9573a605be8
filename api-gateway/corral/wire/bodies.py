"""Ollama's request bodies as types, and what the bodies of all three APIs share.

msgspec reads the annotations when a class is made, so modules of structs are left out when Corral is compiled
(setup.py): what reads and writes them is not here.
"""

from __future__ import annotations

from typing import Any

import msgspec

UNSET = msgspec.UNSET
Unset = msgspec.UnsetType

_NAMES = {"render_only": "_debug_render_only"}

Refused = msgspec.UnsetType
"""The type of a field that no value fits."""


UPSTREAM_FIELDS = (
    "api_base",
    "api_url",
    "api_host",
    "api_key",
    "api_version",
    "base_url",
    "base_uri",
    "endpoint",
    "azure_endpoint",
    "host",
    "hostname",
    "remote_host",
    "remote_model",
    "server",
    "server_url",
    "upstream",
    "upstream_url",
    "node",
    "target_url",
    "proxy",
    "proxy_url",
    "url",
    "uri",
    "webhook",
    "webhook_url",
    "callback_url",
    "aws_bedrock_runtime_endpoint",
    "model_list",
    "fallbacks",
)
"""Fields by which some gateways let a caller name where a request goes. Here none does: they are refused by name."""


class Body(msgspec.Struct, omit_defaults=True):
    """A request's body. Of the fields that it does not have, `Reader` knows which are refused."""


class Message(msgspec.Struct, omit_defaults=True):
    """A chat message. ``images`` are base64."""

    role: str
    content: str | Unset | None = UNSET
    thinking: str | Unset = UNSET
    images: list[str] | Unset | None = UNSET
    tool_calls: list[Any] | Unset | None = UNSET
    tool_name: str | Unset = UNSET
    tool_call_id: str | Unset = UNSET


class Chat(Body, omit_defaults=True, rename=_NAMES):
    """`POST /api/chat`."""

    model: str = ""
    messages: list[Message] | None = None
    stream: bool | None = None
    format: Any = UNSET
    keep_alive: Any = UNSET
    tools: list[Any] | Unset | None = UNSET
    options: dict[str, Any] | None = None
    think: bool | str | Unset | None = UNSET
    truncate: bool | None = None
    shift: bool | Unset | None = UNSET
    logprobs: bool | Unset = UNSET
    top_logprobs: int | Unset = UNSET
    render_only: bool | Unset = UNSET


class Generate(Body, omit_defaults=True, rename=_NAMES):
    """`POST /api/generate`."""

    model: str = ""
    prompt: str | None = None
    suffix: str | Unset = UNSET
    system: str | Unset | None = UNSET
    template: str | Unset = UNSET
    context: list[int] | Unset | None = UNSET
    stream: bool | None = None
    raw: bool | Unset = UNSET
    format: Any = UNSET
    keep_alive: Any = UNSET
    images: list[str] | Unset | None = UNSET
    options: dict[str, Any] | None = None
    think: bool | str | Unset | None = UNSET
    truncate: bool | None = None
    shift: bool | Unset | None = UNSET
    logprobs: bool | Unset = UNSET
    top_logprobs: int | Unset = UNSET
    render_only: bool | Unset = UNSET


class Embed(Body, omit_defaults=True):
    """`POST /api/embed`."""

    model: str = ""
    input: str | list[str] | None = None
    truncate: bool | None = None
    dimensions: int | Unset = UNSET
    keep_alive: Any = UNSET
    options: dict[str, Any] | None = None


class Embeddings(Body, omit_defaults=True):
    """`POST /api/embeddings`, the older form."""

    model: str = ""
    prompt: str | None = None
    keep_alive: Any = UNSET
    options: dict[str, Any] | None = None


class Show(Body, omit_defaults=True):
    """`POST /api/show`; ``name`` is the older word for ``model``."""

    model: str = ""
    name: str = ""
    verbose: bool | Unset = UNSET
