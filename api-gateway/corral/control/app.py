"""The application: one control process put together, and its life from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.types import Receive, Scope, Send

from corral import __version__
from corral.config.settings import Settings
from corral.control import (
    audit,
    errors,
    internal,
    keys,
    models,
    nodes,
    openapi,
    record,
    requests,
    status,
    switches,
    tenants,
)
from corral.control.alerts import Alerts
from corral.control.auth import Gate
from corral.control.canary import Canary
from corral.control.catalogue import Catalogue
from corral.control.context import Control
from corral.control.errors import Problem
from corral.control.haproxy import HaproxyError, HaproxyReloader, plan_from, plan_of
from corral.control.leading import Leading
from corral.control.ledger import Ledger
from corral.control.loads import Loads
from corral.control.modelops import Worker
from corral.control.monitor import Monitor
from corral.control.ollama import Ollama
from corral.control.operations import Operations
from corral.control.placement import Placement
from corral.control.preload import Preloader
from corral.control.prober import Fleet
from corral.control.questions import Questions
from corral.control.reserved import Reserved
from corral.control.selftest import SelfTest
from corral.control.snapshot import Hub
from corral.control.spent import Spent
from corral.control.usage import Usage
from corral.fleet import pools
from corral.store import keeper
from corral.store.budget import SETTLE
from corral.store.content import Hashes
from corral.store.database import configured
from corral.store.keys import read_pepper
from corral.store.valkey import Valkey

VALKEY_TIMEOUT = 1.0
CATCH_UP = 1.0
INSIST = 0.2

log = logging.getLogger(__name__)


class Application:
    """The ASGI application: the gate, then FastAPI; ``control`` is set between start and end.

    ``listener`` is the socket of the internal port, for metrics.
    """

    def __init__(self, settings: Settings, listener: socket.socket | None = None) -> None:
        self._settings, self._listener = settings, listener
        self.api = _api(self._life)
        self._gate: Gate | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await (self._gate if self._gate is not None else self.api)(scope, receive, send)

    @contextlib.asynccontextmanager
    async def _life(self, app: FastAPI) -> AsyncIterator[None]:
        control = _assemble(self._settings)
        app.state.control = control
        notes = audit.Notes(control.database)
        self._gate = Gate(app, control, notes.note, notes.used)
        monitor = Monitor(control, self._listener) if self._listener is not None else None
        tasks = [
            asyncio.create_task(control.valkey.run()),
            asyncio.create_task(notes.run()),
        ]
        try:
            members = await control.database.write(nodes.load, self._settings.nodes)
            await control.catalogue.load()
            await control.fleet.start(members)
            control.preloader.start()
            await control.hub.reload()
            tasks.append(asyncio.create_task(control.hub.follow()))
            # It tells the store of limits what killed gateways' requests used, by the keys that were just read.
            tasks.append(asyncio.create_task(control.ledger.run()))
            # The first try before anyone hears that control is ready: HAProxy may be started with its file then.
            if not await _told(control):
                tasks.append(asyncio.create_task(_catch_up(control)))
            tasks.append(asyncio.create_task(_canary(control).run()))
            tasks.append(asyncio.create_task(Loads(control.valkey, control.fleet).run()))
            control.leading.wanted = self._settings.control.placement
            if control.leading.wanted:
                tasks.append(asyncio.create_task(control.leading.run()))
            if self._settings.gateway.continuation:
                # Before gateways hear of this control: they would take what it does not know for what has not passed.
                await control.selftest.load()
                tasks += [asyncio.create_task(control.selftest.run()), asyncio.create_task(control.selftest.share())]
            if monitor is not None:
                monitor.start()
            log.info("control listens on %s: %d nodes", self._settings.control.listen, len(members))
            yield
        finally:
            if monitor is not None:
                await monitor.close()
            await _end(tasks)
            await control.preloader.close()
            await control.operations.close()
            await control.fleet.close()
            await notes.flush()
            control.spent.close()
            control.database.close()


def _assemble(settings: Settings) -> Control:
    state = settings.control.state.absolute()
    database = configured(settings.store, state)
    fleet = Fleet()
    valkey = Valkey(settings.valkey_address(), (*keeper.SCRIPTS, SETTLE), timeout=VALKEY_TIMEOUT)
    catalogue = Catalogue(database, fleet, settings.models)
    worker = Worker(fleet, catalogue, settings.mirror)
    operations = Operations(database, worker.perform, worker.seen)
    pepper = read_pepper(state / settings.auth.pepper_file)
    hub = Hub(database, fleet, valkey, settings.models, settings.auth.stale, settings.tenants.nodes)
    reserved = Reserved(valkey, hub.limited, settings.limits.default.model_dump())
    haproxy = _reloader(settings, state)
    fleet.second = haproxy.unreached
    groups = pools.groups(settings.tenants.nodes)

    def placement(term: int) -> Placement:
        ollama = lambda member: Ollama(fleet.client, member.url)  # noqa: E731
        wait, options = settings.gateway.queue.wait, catalogue.options
        demand = lambda name: replace(catalogue.demand(name), disabled=name in hub.disabled)  # noqa: E731
        return Placement(
            valkey, ollama, options, demand, term, groups, fleet.speeds, queue_wait=wait, working=operations.working
        )

    leading = Leading(database, valkey, fleet, placement)

    return Control(
        settings=settings,
        state=state,
        database=database,
        pepper=pepper,
        token=(state / settings.auth.internal_token_file).read_text(encoding="ascii").strip(),
        fleet=fleet,
        hub=hub,
        haproxy=haproxy,
        valkey=valkey,
        catalogue=catalogue,
        operations=operations,
        selftest=SelfTest(
            fleet,
            catalogue.policies,
            _streams(haproxy),
            hub.continues,
            database,
            judges=lambda: not leading.missing,
        ),
        preloader=Preloader(fleet, catalogue, operations, settings.preload.timeout),
        usage=Usage(),
        ledger=Ledger(database, settings.audit, state, settings.gateway.max_duration, hub.shipped, reserved),
        spent=Spent(database),
        leading=leading,
        hashes=Hashes(pepper),
        alerts=Alerts(settings.monitoring.alertmanager),
        questions=Questions(hub),
    )


def _streams(haproxy: HaproxyReloader) -> Callable[[str], Awaitable[int | None]]:
    async def streams(name: str) -> int | None:
        try:
            return await haproxy.streams(name)
        except HaproxyError:
            return None

    return streams


def _canary(control: Control) -> Canary:
    settings, streams = control.settings.control.canary, _streams(control.haproxy)
    return Canary(control.fleet, settings, control.catalogue.policies, streams)


def _reloader(settings: Settings, state: Path) -> HaproxyReloader:
    socket, run = settings.control.haproxy_socket, state / "run"
    if socket is None:
        return HaproxyReloader(None, None, None)
    if (config := settings.haproxy.config) is not None:
        return HaproxyReloader(lambda: plan_of(settings), state / config, state / socket)
    # `corral up` keeps the plan (ports, gateways) beside the configuration that it rendered from it.
    return HaproxyReloader(plan_from(run / "haproxy.json"), run / "haproxy.cfg", state / socket)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel tasks until they are done: `asyncio.wait_for` of Python 3.11 may swallow a cancellation."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=INSIST)


async def _catch_up(control: Control) -> None:
    """Give HAProxy the nodes of the database, as far as it was started without them or is still to start."""
    while True:
        await asyncio.sleep(CATCH_UP)
        if await _told(control, logging.DEBUG):
            return


async def _told(control: Control, level: int = logging.WARNING) -> bool:
    """Whether HAProxy has the nodes of the database now, or there is none to tell."""
    if not control.haproxy.configured:
        return True
    try:
        async with control.fleet.changing:
            members = control.fleet.members.values()
            pairs = [(node.name, node.url) for node in members]
            resting = [node.name for node in members if node.draining]
            await control.haproxy.apply(pairs, keep=True, resting=resting)
    except HaproxyError as error:
        log.log(level, "HAProxy keeps its own list of nodes for now: %s", error)
        return False
    return True


def _api(life: object) -> FastAPI:
    app = FastAPI(
        title="Corral",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=life,  # type: ignore[arg-type]
        # `curl -d` sends another content type, and means JSON all the same.
        strict_content_type=False,
        redirect_slashes=False,
    )
    errors.install(app)
    for module in (keys, tenants, nodes, models, requests, switches, status, audit, record, internal):
        app.include_router(module.router)
    openapi.install(app)

    @app.get("/health", include_in_schema=False)
    async def health() -> dict[str, str]:
        return {"status": "healthy"}

    @app.api_route("/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def nothing(request: Request, rest: str) -> None:
        raise Problem(404, "not_found", f"no route {request.method} /{rest}")

    return app
