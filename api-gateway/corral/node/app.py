"""The node's routes, as an ASGI application."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from corral.node import anthropic, decode, management, native, openai
from corral.node.errors import NodeError
from corral.node.exchange import ErrorBody, Reply, endpoint, native_error, upload
from corral.node.service import Node
from corral.node.simulated import SimulatedBackend

# What Ollama has and this node has not; count_tokens is Anthropic's own.
_ABSENT = (
    (("POST",), "/api/pull"),
    (("POST",), "/api/push"),
    (("POST",), "/api/me"),
    (("POST",), "/api/signout"),
    (("DELETE",), "/api/user/keys/{key}"),
    (("GET",), "/api/status"),
    (("GET", "POST", "DELETE"), "/api/experimental/aliases"),
    (("POST",), "/v1/responses"),
    (("POST",), "/v1/images/generations"),
    (("POST",), "/v1/images/edits"),
    (("POST",), "/v1/messages/count_tokens"),
)


def _routes() -> list[Route]:
    def get(path: str, operation: Any, errors: Any = None) -> Route:
        return Route(path, endpoint(_probed(operation), *([errors] if errors else [])), methods=["GET"])

    def post(path: str, operation: Any, errors: Any = None) -> Route:
        return Route(path, endpoint(operation, *([errors] if errors else [])), methods=["POST"])

    return [
        get("/", management.get_root),
        get("/api/version", management.get_version),
        get("/api/tags", management.get_tags),
        get("/api/ps", native.get_ps),
        post("/api/show", management.post_show),
        post("/api/generate", native.post_generate),
        post("/api/chat", native.post_chat),
        post("/api/embed", native.post_embed),
        post("/api/embeddings", native.post_embeddings),
        post("/api/copy", management.post_copy),
        post("/api/create", management.post_create),
        Route("/api/delete", endpoint(management.delete_model), methods=["DELETE"]),
        Route("/api/blobs/{digest}", endpoint(management.head_blob), methods=["HEAD"]),
        Route("/api/blobs/{digest}", upload(management.post_blob), methods=["POST"]),
        *(Route(path, endpoint(management.not_here, _errors(path)), methods=methods) for methods, path in _ABSENT),
        post("/v1/chat/completions", openai.post_chat, openai.error_body),
        post("/v1/completions", openai.post_completion, openai.error_body),
        post("/v1/embeddings", openai.post_embeddings, openai.error_body),
        get("/v1/models", openai.get_models, openai.error_body),
        get("/v1/models/{model:path}", openai.get_model, openai.error_body),
        post("/v1/messages", anthropic.post_messages, anthropic.error_body),
        Route("/simulated/faults", endpoint(_faults), methods=["GET", "POST", "DELETE"]),
        Route("/simulated/work", endpoint(_work), methods=["GET", "DELETE"]),
    ]


def _errors(path: str) -> ErrorBody:
    """The shape of errors of the API that a path is of."""
    if path.startswith("/v1/messages"):
        return anthropic.error_body
    return openai.error_body if path.startswith("/v1/") else native_error


def _probed(operation: Any) -> Any:
    """``operation``, after the fault that a simulated node may have for its GET routes."""

    async def run(node: Node, request: Request, body: bytes, reply: Reply) -> None:
        if isinstance(node.backend, SimulatedBackend):
            await node.backend.meet(request.url.path)
        await operation(node, request, body, reply)

    return run


async def _faults(node: Node, request: Request, body: bytes, reply: Reply) -> None:
    """GET lists the faults, POST adds one, DELETE removes all; simulated nodes alone have them."""
    if not isinstance(node.backend, SimulatedBackend):
        raise NodeError(404, "only a simulated node has faults")
    if request.method == "POST":
        try:
            fault = node.backend.faults.add(decode.parse(body))
        except EOFError:
            raise NodeError(400, "missing request body") from None
        await reply.json({"id": fault.id}, 201)
        return
    if request.method == "DELETE":
        node.backend.faults.clear()
    await reply.json({"faults": node.backend.faults.listing()})


async def _work(node: Node, request: Request, body: bytes, reply: Reply) -> None:
    """GET tells what it does by model, DELETE has it count anew; simulated nodes alone do."""
    if not isinstance(node.backend, SimulatedBackend):
        raise NodeError(404, "only a simulated node counts its work")
    if request.method == "DELETE":
        node.backend.work.clear()
    await reply.json({"models": node.backend.work.listing()})


async def _refused(request: Request, error: Exception) -> Response:
    """404 and 405 in gin's words; 405 names the methods that the path has."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return Response("404 page not found", 404, {"Content-Type": "text/plain"})
    routes = [r for r in request.app.routes if r.matches(request.scope)[0] != Match.NONE]
    allow = ", ".join(sorted({method for route in routes for method in route.methods}))
    return Response("405 method not allowed", 405, {"Content-Type": "text/plain", "Allow": allow})


class _WithTransport:
    """Gives each exchange its connection, which only a simulated reset needs."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["corral.transport"] = getattr(getattr(send, "__self__", None), "transport", None)
        await self._app(scope, receive, send)


def create(node: Node) -> ASGIApp:
    """The application that serves ``node`` and closes it at shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await node.scheduler.close()
            node.backend.close()

    app = Starlette(routes=_routes(), lifespan=lifespan, exception_handlers={404: _refused, 405: _refused})
    app.router.redirect_slashes = False
    app.state.node = node
    return _WithTransport(app)
