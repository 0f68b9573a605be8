"""Requests as bytes, in the form of the API that is called."""

from __future__ import annotations

from typing import Any

import msgspec

from corral.loadtest.guard import Target

ROUTES = {
    ("native", "chat"): "/api/chat",
    ("native", "generate"): "/api/generate",
    ("native", "embed"): "/api/embed",
    ("openai", "chat"): "/v1/chat/completions",
    ("openai", "generate"): "/v1/completions",
    ("openai", "embed"): "/v1/embeddings",
    ("anthropic", "chat"): "/v1/messages",
}
_encode = msgspec.json.Encoder().encode


class Shape:
    """What all requests of a run have in common: target, API, route and whether answers are streamed."""

    def __init__(self, target: Target, api: str, route: str, stream: bool) -> None:
        self.api, self.route = api, route
        self.stream = stream and route != "embed"
        self.path = ROUTES[api, route]
        default = 443 if target.tls else 80
        host = f"[{target.host}]" if ":" in target.host else target.host
        self._host = host if target.port == default else f"{host}:{target.port}"

    def body(self, model: str, prompt: str, max_tokens: int) -> bytes:
        """The JSON body."""
        body: dict[str, Any] = {"model": model}
        if self.route == "embed":
            return _encode(body | {"input": prompt})
        body["stream"] = self.stream
        if self.route == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if self.api == "native":
            body["options"] = {"num_predict": max_tokens}
        else:
            body["max_tokens"] = max_tokens
        if self.api == "openai" and self.stream:
            body["stream_options"] = {"include_usage": True}
        return _encode(body)

    def post(self, body: bytes, key: str, request_id: str) -> bytes:
        """The request that brings ``body``; no Authorization where ``key`` is empty."""
        return (
            f"POST {self.path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            f"{_authorization(key)}X-Request-ID: {request_id}\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body

    def get(self, path: str, key: str) -> bytes:
        """A GET."""
        return f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\n{_authorization(key)}\r\n".encode()


def _authorization(key: str) -> str:
    return f"Authorization: Bearer {key}\r\n" if key else ""
