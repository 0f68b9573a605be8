"""The lines of a node's answer as types, as far as putting an answer together needs them (see `bodies`)."""

from __future__ import annotations

from typing import Any

import msgspec

RENDERED = "_debug_info"
UNSET = msgspec.UNSET
Unset = msgspec.UnsetType


class Part(msgspec.Struct):
    """What a line adds to a chat's message."""

    content: str | None = None
    thinking: str | None = None
    tool_calls: list[Any] | None = None


class Line(msgspec.Struct, rename={"rendered": RENDERED}):
    """A line of an answer, as far as putting it together needs it."""

    done: bool = False
    error: Any = UNSET
    logprobs: list[Any] | None = None
    prompt_eval_count: Any = 0
    eval_count: Any = 0
    rendered: msgspec.Raw | Unset = UNSET


class ChatLine(Line):
    """A line of a chat."""

    message: Part | None = None


class GenerateLine(Line, rename={"rendered": RENDERED, "content": "response"}):
    """A line of a completion: what a chat has in its message stands in the line itself."""

    content: str | None = None
    thinking: str | None = None
    tool_calls: list[Any] | None = None
