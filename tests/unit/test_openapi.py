"""The description of the inference API: gateways' routes, the answers these give, and bodies that they take."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from corral.control import openapi
from corral.gateway import route
from corral.wire.common import CAPS
from corral.wire.decode import DECODERS
from corral.wire.errors import ApiError

PATHS = openapi.build(FastAPI())["paths"]
TOLD = {(method.upper(), path) for path, operations in PATHS.items() for method in operations}
SERVED = {(method.decode(), path.decode()): served for (method, path), served in route._ROUTES.items()}
RELAYED = [path for (method, path), served in SERVED.items() if served.kind is route.Kind.RELAY]
KEYED = {"200", "400", "401", "403", "429", "500", "503"}
"""What any route with a key may answer."""


def test_it_has_every_route_of_the_gateways() -> None:
    assert {*SERVED, ("GET", route._MODEL.path)} == TOLD


def statuses(method: str, path: str) -> set[str]:
    return set(PATHS[path][method.lower()]["responses"])


@pytest.mark.parametrize("path", RELAYED)
def test_a_relayed_route_says_what_it_may_answer(path: str) -> None:
    more = {"404", "413", "502", "504"} if path == "/api/show" else {"404", "413", "502", "504", "507"}
    assert statuses("POST", path) == KEYED | more


@pytest.mark.parametrize(
    ("method", "path", "wanted"),
    [
        ("GET", "/api/tags", KEYED),
        ("GET", "/api/ps", KEYED),
        ("GET", "/api/version", KEYED),
        ("GET", "/v1/models", KEYED),
        ("GET", "/v1/models/{id}", KEYED | {"404"}),
        ("POST", "/v1/responses", {"501"}),
        ("POST", "/v1/messages/count_tokens", {"501"}),
        ("GET", "/health", {"200", "503"}),
        ("GET", "/health/ready", {"200", "503"}),
    ],
)
def test_the_others_say_it_too(method: str, path: str, wanted: set[str]) -> None:
    assert statuses(method, path) == wanted


def test_the_page_for_people_has_the_same_statuses() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:\d{3}(?:, )?)+) \|", text, re.MULTILINE)
    assert {one for row in rows for one in row.split(", ")} | {"200"} == {
        status for method, path in TOLD for status in statuses(method, path)
    }


def examples(name: str, schema: dict[str, Any]) -> list[Any]:
    """A value of each form that a field may have."""
    if "oneOf" in schema:
        return [value for one in schema["oneOf"] for value in examples(name, one)]
    if name == "messages":
        return [[{"role": "user", "content": "hi"}]]
    if schema["type"] == "array":
        return [[value] for value in examples("", schema["items"])]
    return [{"string": "text", "integer": 8, "boolean": True, "object": {}}[schema["type"]]]


def schema_of(path: str) -> dict[str, Any]:
    schema: dict[str, Any] = PATHS[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return schema


def bodies(path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One with all that the page has for a route, and one of each form that one of its fields may have."""
    schema = schema_of(path)
    values = {name: examples(name, one) for name, one in schema["properties"].items()}
    whole = {name: forms[0] for name, forms in values.items()}
    return whole, [whole | {name: form} for name, forms in values.items() for form in forms]


def refusal(path: str, body: dict[str, Any]) -> ApiError | None:
    try:
        DECODERS[path](json.dumps(body).encode(), "request", lambda model: None, CAPS)
    except ApiError as error:
        return error
    return None


@pytest.mark.parametrize("path", RELAYED)
def test_a_body_as_it_says_is_taken(path: str) -> None:
    for body in bodies(path)[1]:
        assert refusal(path, body) is None, body


@pytest.mark.parametrize("path", [path for path in RELAYED if "chat" in path or "messages" in path])
def test_a_chat_without_a_message_is_one_where_it_says_so(path: str) -> None:
    """Ollama's own has the model loaded by it."""
    taken = refusal(path, bodies(path)[0] | {"messages": []}) is None
    assert taken == ("minItems" not in schema_of(path)["properties"]["messages"]) == (path == "/api/chat")


@pytest.mark.parametrize(
    ("path", "field"),
    [(path, field) for path in RELAYED for field in schema_of(path)["required"]],
)
def test_what_it_calls_required_is(path: str, field: str) -> None:
    body = bodies(path)[0]
    error = refusal(path, {name: value for name, value in body.items() if name != field})
    assert error is not None and error.status == 400 and field in error.message
