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


class Body(msgspec.Struct, omit_defaults=True):
    """A request's body. Its own fields are those by which some gateways let a caller name where a request goes.

    Here none does. As fields of a type without values they are found while the body is read, at no cost.
    """

    api_base: Refused = msgspec.UNSET
    api_url: Refused = msgspec.UNSET
    api_host: Refused = msgspec.UNSET
    api_key: Refused = msgspec.UNSET
    api_version: Refused = msgspec.UNSET
    base_url: Refused = msgspec.UNSET
    base_uri: Refused = msgspec.UNSET
    endpoint: Refused = msgspec.UNSET
    azure_endpoint: Refused = msgspec.UNSET
    host: Refused = msgspec.UNSET
    hostname: Refused = msgspec.UNSET
    remote_host: Refused = msgspec.UNSET
    remote_model: Refused = msgspec.UNSET
    server: Refused = msgspec.UNSET
    server_url: Refused = msgspec.UNSET
    upstream: Refused = msgspec.UNSET
    upstream_url: Refused = msgspec.UNSET
    node: Refused = msgspec.UNSET
    target_url: Refused = msgspec.UNSET
    proxy: Refused = msgspec.UNSET
    proxy_url: Refused = msgspec.UNSET
    url: Refused = msgspec.UNSET
    uri: Refused = msgspec.UNSET
    webhook: Refused = msgspec.UNSET
    webhook_url: Refused = msgspec.UNSET
    callback_url: Refused = msgspec.UNSET
    aws_bedrock_runtime_endpoint: Refused = msgspec.UNSET
    model_list: Refused = msgspec.UNSET
    fallbacks: Refused = msgspec.UNSET


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
