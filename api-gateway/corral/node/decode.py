"""Request bodies, decoded as Go's encoding/json would: its leniency and its error texts."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from corral.node import clock
from corral.node.errors import NodeError

# Field kinds: "string", "bool", "int", "float", "map", "any", "duration", "think", "image", and
# "[]kind" for lists, or (Go type name, fields) for a nested struct.
Kind = str | tuple[str, Mapping[str, Any]]
Fields = Mapping[str, Kind]

_GO = {
    "string": "string",
    "bool": "bool",
    "int": "int",
    "float": "float64",
    "float32": "float32",
    "map": "map[string]interface {}",
    "strings": "map[string]string",
    "image": "api.ImageData",
}

_CALL: Fields = {"id": "string", "function": ("api.ToolCallFunction", {"name": "string", "arguments": "map"})}
MESSAGE: Fields = {
    "role": "string",
    "content": "string",
    "thinking": "string",
    "images": "[]image",
    "tool_calls": ("[]api.ToolCall", _CALL),
    "tool_name": "string",
    "tool_call_id": "string",
}
_COMMON: Fields = {"model": "string", "keep_alive": "duration", "options": "map"}
_INFERENCE: Fields = {
    **_COMMON,
    "stream": "bool",
    "format": "any",
    "think": "think",
    "truncate": "bool",
    "shift": "bool",
    "_debug_render_only": "bool",
    "logprobs": "bool",
    "top_logprobs": "int",
}
GENERATE: Fields = {
    **_INFERENCE,
    "prompt": "string",
    "suffix": "string",
    "system": "string",
    "template": "string",
    "context": "[]int",
    "raw": "bool",
    "images": "[]image",
}
CHAT: Fields = {**_INFERENCE, "messages": ("[]api.Message", MESSAGE), "tools": ("api.Tools", {})}
EMBED: Fields = {**_COMMON, "input": "any", "truncate": "bool", "dimensions": "int"}
EMBEDDINGS: Fields = {**_COMMON, "prompt": "string"}
SHOW: Fields = {"model": "string", "name": "string", "system": "string", "verbose": "bool", "options": "map"}
DELETE: Fields = {"model": "string", "name": "string"}
COPY: Fields = {"source": "string", "destination": "string"}
CREATE: Fields = {
    "model": "string",
    "name": "string",
    "stream": "bool",
    "from": "string",
    "files": "strings",
    "adapters": "strings",
    "template": "string",
    "license": "any",
    "system": "string",
    "parameters": "map",
    "messages": ("[]api.Message", MESSAGE),
    "quantize": "string",
    "quantization": "string",
    "remote_host": "string",
}


def parse(body: bytes) -> Any:
    """The first JSON value of ``body``; what follows it is ignored, as Go's decoder does.

    Raises EOFError for a blank body and NodeError 400 with Go's text for a syntax error.
    """
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = body.decode("utf-8", "replace").lstrip(" \t\r\n")
    if not text:
        raise EOFError
    try:
        return json.JSONDecoder().raw_decode(text)[0]
    except json.JSONDecodeError as error:
        raise NodeError(400, _syntax_error(text, error)) from None


def _syntax_error(text: str, error: json.JSONDecodeError) -> str:
    if error.pos >= len(text) or error.msg.startswith("Unterminated string"):
        return "unexpected EOF"
    character = text[error.pos]
    shown = "'\\''" if character == "'" else f"'{character}'"
    if error.msg.startswith("Expecting property name") or error.msg.startswith("Illegal trailing comma"):
        return f"invalid character {shown} looking for beginning of object key string"
    if error.msg.startswith("Expecting ':'"):
        return f"invalid character {shown} after object key"
    if error.msg.startswith("Expecting ','"):
        return f"invalid character {shown} after {_innermost(text[: error.pos])}"
    if error.msg.startswith("Invalid control"):
        return f"invalid character {character!r} in string literal"
    if error.msg.startswith("Invalid \\"):
        return f"invalid character {shown} in string escape code"
    return f"invalid character {shown} looking for beginning of value"


def _innermost(text: str) -> str:
    """Whether the end of ``text`` stands in an object or in an array."""
    stack, quoted, escaped = [], False, False
    for character in text:
        if quoted:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                quoted = False
        elif character == '"':
            quoted = True
        elif character in "{[":
            stack.append(character)
        elif character in "}]":
            stack.pop()
    return "object key:value pair" if stack and stack[-1] == "{" else "array element"


def body(data: bytes, struct: str, fields: Fields) -> dict[str, Any]:
    """Decode the request body ``data`` into the known ``fields`` it holds.

    ``struct`` is the Go type that Ollama's texts name, as in "api.ChatRequest". Unknown fields are dropped,
    nulls count as absent, names match whatever their case. Raises NodeError 400.
    """
    try:
        value = parse(data)
    except EOFError:
        raise NodeError(400, "missing request body") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise NodeError(400, f"json: cannot unmarshal {_kind(value)} into Go value of type {struct}")
    return _struct(value, struct.rpartition(".")[2], "", fields)


def _struct(value: Mapping[str, Any], struct: str, path: str, fields: Fields) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = key if key in fields else key.lower()
        if item is None or name not in fields:
            continue
        found[name] = _field(item, fields[name], struct, f"{path}.{name}" if path else name)
    return found


def _field(value: Any, kind: Kind, struct: str, path: str) -> Any:
    if isinstance(kind, tuple):
        go, fields = kind
        if go.startswith("[]") or go == "api.Tools":
            if not isinstance(value, list):
                raise _mismatch(value, struct, path, go)
            if not fields:
                return value
            return [_nested(item, go.removeprefix("[]"), fields, struct, path) for item in value]
        return _nested(value, go, fields, struct, path)
    if kind.startswith("[]"):
        inner = kind[2:]
        if not isinstance(value, list):
            raise _mismatch(value, struct, path, "[]" + _GO[inner])
        return [_field(item, inner, struct, path) for item in value]
    if kind in ("any", "duration", "think"):
        return _special(value, kind)
    types: dict[str, Any] = {
        "string": str,
        "image": str,
        "bool": bool,
        "int": int,
        "float": int | float,
        "float32": int | float,
        "map": dict,
        "strings": dict,
    }
    if not isinstance(value, types[kind]) or (kind in ("int", "float", "float32") and isinstance(value, bool)):
        raise _mismatch(value, struct, path, _GO[kind])
    if kind == "image":
        return _image(value)
    if kind == "strings" and not all(isinstance(item, str) for item in value.values()):
        wrong = next(item for item in value.values() if not isinstance(item, str))
        raise _mismatch(wrong, struct, path, "string")
    return value


def _nested(value: Any, go: str, fields: Fields, struct: str, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _mismatch(value, struct, path, go)
    return _struct(value, struct, path, fields)


def _special(value: Any, kind: str) -> Any:
    if kind == "duration":
        try:
            return clock.keep_alive(value)
        except ValueError as error:
            raise NodeError(400, str(error)) from None
    if kind == "think":
        levels = '"high", "medium", "low", true, or false'
        if isinstance(value, str) and value not in ("high", "medium", "low"):
            raise NodeError(400, f'invalid think value: "{value}" (must be {levels})')
        if not isinstance(value, bool | str):
            raise NodeError(400, f"think must be a boolean or string ({levels})")
    return value


def _image(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        at = next((i for i, c in enumerate(text) if c not in alphabet), len(text))
        raise NodeError(400, f"illegal base64 data at input byte {at}") from None


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    kinds: dict[type, str] = {str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def _mismatch(value: Any, struct: str, path: str, go: str) -> NodeError:
    kind = _kind(value)
    if kind == "number" and go == "int":
        kind = f"number {json.dumps(value)}"
    return NodeError(400, f"json: cannot unmarshal {kind} into Go struct field {struct}.{path} of type {go}")
