"""One request and what came back, reduced to what two servers can be compared by."""

from __future__ import annotations

import json
import ssl
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

Json = Any
# One for all clients: httpx would read the system's certificates for each, which takes longer than the request.
_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@dataclass(frozen=True)
class Target:
    """A server under test. ``gateway``: it stands behind a Corral gateway, and wants ``key``."""

    name: str
    url: str
    key: str = ""

    @property
    def gateway(self) -> bool:
        return self.name.startswith("gateway-")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def client(self, timeout: float = 60.0) -> httpx.Client:
        """An HTTP client with the key."""
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=timeout, verify=_TLS)


@dataclass(frozen=True)
class Event:
    """One part of an answer: the whole object, a line, or a server-sent event with its name."""

    data: Json
    name: str = ""


@dataclass(frozen=True)
class Answer:
    """Status, the whole Content-Type and events. ``text``: a body that is no JSON."""

    status: int
    content_type: str
    events: list[Event] = field(default_factory=list)
    text: str = ""

    @property
    def media(self) -> str:
        """The media type alone."""
        return self.content_type.partition(";")[0]

    @property
    def last(self) -> Json:
        return self.events[-1].data if self.events else None

    def shape(self) -> list[Json]:
        """The shapes of the events in order; what repeats counts once (how many tokens there are is the model's)."""
        shapes: list[Json] = []
        for event in self.events:
            seen = [event.name, event.data if isinstance(event.data, str) else shape(event.data)]
            if not shapes or shapes[-1] != seen:
                shapes.append(seen)
        return shapes


def send(target: Target, method: str, path: str, body: Json = None, raw: bytes | None = None) -> Answer:
    """Send a JSON body, or ``raw`` bytes."""
    content = raw if raw is not None else None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} if content is not None else {}
    with target.client() as client:
        return read(client.request(method, path, content=content, headers=headers))


def read(response: httpx.Response) -> Answer:
    """What an answer holds; a body that claims to be JSON and is none raises ValueError."""
    content_type = response.headers.get("content-type", "")
    head = Answer(response.status_code, content_type)
    text = response.text
    if not text:
        return head
    if head.media == "text/event-stream":
        return replace(head, events=_events(text))
    if head.media == "application/x-ndjson":
        return replace(head, events=[Event(json.loads(line)) for line in text.splitlines() if line])
    if head.media == "application/json":
        return replace(head, events=[Event(json.loads(text))])
    return replace(head, text=text)


def _events(text: str) -> list[Event]:
    events = []
    for block in text.split("\n\n"):
        name = data = ""
        for line in block.strip("\n").split("\n"):
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                data += line[6:]
        if data:
            events.append(Event(data if data == "[DONE]" else json.loads(data), name))
    return events


def shape(value: Json) -> Json:
    """Key sets and types: numbers, strings and so on by name; of a list, the distinct shapes of its items."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in sorted(value.items())}
    if isinstance(value, list):
        shapes: list[Json] = []
        for item in map(shape, value):
            if item not in shapes:
                shapes.append(item)
        return shapes
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    return "number" if isinstance(value, int | float) else "string"


def pick(value: Json, path: str) -> Json:
    """A field by its dotted path; an item of a list by its number."""
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def about(value: Any) -> Any:
    """The same, with which numbers agree that differ in their last digits.

    So do runs of one model with what its cache holds, and the canary of the stack changes that between two requests. Of
    two such numbers rounding may take one up and the other down.
    """
    if isinstance(value, float):
        return pytest.approx(value, abs=0.01)
    if isinstance(value, dict):
        return {field: about(item) for field, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(about(item) for item in value)
    return value
