"""Step 2: what exists. An allow-list of (method, exact path); all else is a 404 that no node ever sees."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from corral.wire.errors import ApiError

MODEL_PREFIX: Final = b"/v1/models/"


class Kind(Enum):
    """How a route is served."""

    RELAY = "relayed to a node"
    FLEET = "answered from what the fleet holds"
    HEALTH = "the gateway's own, without a key"
    LATER = "known, not served yet"


@dataclass(slots=True, frozen=True)
class Route:
    """One route: its template, the API whose shapes it speaks, and how it is served."""

    path: str
    api: str
    kind: Kind


_ROUTES: Final[dict[tuple[bytes, bytes], Route]] = {
    (method.encode(), path.encode()): Route(path, api, kind)
    for method, path, api, kind in [
        ("POST", "/api/generate", "native", Kind.RELAY),
        ("POST", "/api/chat", "native", Kind.RELAY),
        ("POST", "/api/embed", "native", Kind.RELAY),
        ("POST", "/api/embeddings", "native", Kind.RELAY),
        ("POST", "/api/show", "native", Kind.RELAY),
        ("GET", "/api/tags", "native", Kind.FLEET),
        ("GET", "/api/ps", "native", Kind.FLEET),
        ("GET", "/api/version", "native", Kind.FLEET),
        ("POST", "/v1/chat/completions", "openai", Kind.RELAY),
        ("POST", "/v1/completions", "openai", Kind.RELAY),
        ("POST", "/v1/embeddings", "openai", Kind.RELAY),
        ("GET", "/v1/models", "openai", Kind.FLEET),
        ("POST", "/v1/messages", "anthropic", Kind.RELAY),
        ("POST", "/v1/responses", "openai", Kind.LATER),
        ("POST", "/v1/messages/count_tokens", "anthropic", Kind.LATER),
        ("GET", "/health", "native", Kind.HEALTH),
        ("GET", "/health/ready", "native", Kind.HEALTH),
    ]
}
_BETA: Final = b"/v1/messages?beta=true"
"""So Anthropic's clients ask for what is new there. No other query is taken; none is passed on."""
_INSTEAD: Final = {
    (b"GET", b"/"): "/docs has those that there are",
    (b"POST", b"/api/pull"): "models are the operator's: `corral models pull`",
    (b"DELETE", b"/api/delete"): "models are the operator's: `corral models remove`",
}
"""What Ollama has and a gateway does not, with where that is to be had."""
_MODEL: Final = Route("/v1/models/{id}", "openai", Kind.FLEET)


def resolve(method: bytes, target: bytes) -> Route:
    """The route of a request line; the target is compared as the bytes that were sent.

    Raises:
        ApiError: 404 for whatever is not on the list, a query string included.
    """
    route = _ROUTES.get((method, target))
    if route is None and method == b"GET" and target.startswith(MODEL_PREFIX) and model_of(target):
        route = _MODEL
    if route is None and method == b"POST" and target == _BETA:
        route = _ROUTES[method, b"/v1/messages"]
    if route is None:
        # Without its query: programs put keys there, and errors end up in logs.
        shown = target.partition(b"?")[0][:80].decode("ascii", "backslashreplace")
        if b"crl_" in target:
            shown = "with a key in its path"
        raise ApiError(404, "not_found", f"no route {method.decode('ascii', 'replace')} {shown}{_near(method, target)}")
    if route.kind is Kind.LATER:
        raise ApiError(501, "not_implemented", f"{route.path} is not served by this version of Corral")
    return route


def _near(method: bytes, target: bytes) -> str:
    """What was meant, where the method is wrong, or the base URL of an OpenAI client, or what there is instead; the end
    of a complaint."""
    if (method, target) in _INSTEAD:
        return f": {_INSTEAD[method, target]}"
    if (method, b"/v1" + target) in _ROUTES:
        return f": did you mean /v1{target.decode()}? A base URL for OpenAI's clients ends in /v1"
    if (method, target.partition(b"?")[0]) in _ROUTES:
        return ": it takes no query (what follows the question mark)"
    methods = [known.decode() for known, path in _ROUTES if path == target]
    return f": it takes {methods[0]}" if methods else ""


def model_of(target: bytes) -> str:
    """The model named by a `/v1/models/<id>` target, "" where it is not well formed."""
    name = target[len(MODEL_PREFIX) :]
    allowed = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:/-"
    parts = name.split(b"/")
    if not name or name.translate(None, allowed) or b"crl_" in name:
        return ""
    return "" if any(part in (b"", b".", b"..") for part in parts) else name.decode()


def api_of(target: bytes) -> str:
    """The API whose error shape fits a target that is on no list."""
    if target.startswith(b"/v1/messages"):
        return "anthropic"
    return "openai" if target.startswith(b"/v1") else "native"
