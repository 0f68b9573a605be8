"""Control's internal port: /metrics, Prometheus's targets, Alertmanager's webhook. No key, never on the edge."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator

import uvicorn
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from corral.config.prometheus import JOBS
from corral.config.values import host_port, joined
from corral.control import discovery, pages
from corral.control.alerts import BadNotification
from corral.control.context import Control

BODY_MAX = 4 << 20

log = logging.getLogger(__name__)


def listen(address: str) -> socket.socket | None:
    """The socket of `control.metrics`, None for none.

    Raises:
        OSError: the address cannot be used; says which.
    """
    if not address:
        return None
    host, port = host_port(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=64)
    except OSError as error:
        raise OSError(f"control.metrics: {address} cannot be used: {error.strerror or error}") from None


class Monitor:
    """The server on the internal port, in control's own event loop."""

    def __init__(self, control: Control, listener: socket.socket) -> None:
        self._listener = listener
        config = uvicorn.Config(
            application(control),
            http="httptools",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=2,
            limit_concurrency=64,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Serve until `close`."""
        self._task = asyncio.get_running_loop().create_task(self._server.serve([self._listener]))

    async def close(self) -> None:
        """Stop."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are for control's own server


def application(control: Control) -> Starlette:
    """The ASGI application."""

    def page(make: Callable[[], Awaitable[bytes]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return _metrics(await make())

        return endpoint

    async def node(request: Request) -> Response:
        member = control.fleet.members.get(request.path_params["name"])
        if member is None:
            return PlainTextResponse("there is no such node\n", 404)
        return _metrics(pages.node_page(member))

    async def targets(request: Request) -> Response:
        return _targets(control, request.path_params["job"], _here(control, request))

    async def alerts(request: Request) -> Response:
        return await _notified(control, request)

    return Starlette(
        routes=[
            Route("/metrics", page(lambda: pages.control_page(control))),
            Route("/metrics/valkey", page(lambda: pages.valkey_page(control))),
            Route("/metrics/database", page(lambda: pages.database_page(control))),
            Route("/metrics/nodes/{name}", node),
            Route("/sd/{job}", targets),
            Route("/internal/alerts", alerts, methods=["POST"]),
        ]
    )


def _metrics(text: bytes) -> Response:
    return Response(text, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})


def _here(control: Control, request: Request) -> str:
    """This port's address as the asker knows it: the name in its own request, where that is one."""
    host, port = host_port(control.settings.control.metrics)
    try:
        return joined(*host_port(request.headers.get("host", "")))
    except ValueError:
        return joined(host, port)


def _targets(control: Control, job: str, here: str) -> Response:
    if job == "ollama":
        found = discovery.nodes(control.fleet.members.values(), here)
    elif job == "api-gateway":
        found = discovery.gateways(control.hub.known())
    elif job == "haproxy":
        place = control.settings.monitoring.haproxy or control.haproxy.statistics()
        found = [discovery.group(place)] if place else []
    elif job == "control":
        found = [discovery.group(here)]
    elif job in ("redis", "postgres"):
        path = "/metrics/valkey" if job == "redis" else "/metrics/database"
        found = [discovery.group(here, __metrics_path__=path)]
    else:
        return PlainTextResponse(f"expected one of {', '.join(JOBS)}\n", 404)
    return JSONResponse(found)


async def _notified(control: Control, request: Request) -> Response:
    # A page in a browser on this machine cannot send this type without asking first.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return PlainTextResponse("expected application/json\n", 415)
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > BODY_MAX:
                return PlainTextResponse(f"a notification may have {BODY_MAX} bytes\n", 413)
        control.alerts.take(json.loads(bytes(body)))
    except BadNotification as error:
        return PlainTextResponse(f"{error}\n", 400)
    except (ValueError, RecursionError):
        return PlainTextResponse("expected a JSON object\n", 400)
    except ClientDisconnect:
        return Response(status_code=400)
    return Response(status_code=204)
