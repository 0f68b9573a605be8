"""The gateway: what all exchanges share."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import secrets
import time
from typing import Any, Final
from urllib.parse import quote, urlsplit

from corral.config.settings import Settings
from corral.gateway import adopt, settle
from corral.gateway.authenticate import Key, authenticate
from corral.gateway.checks import Checks
from corral.gateway.content import Keeper
from corral.gateway.crashing import Crashing
from corral.gateway.cut_off import CutOff
from corral.gateway.exchange import Exchange
from corral.gateway.exposition import Exposition
from corral.gateway.feed import Feed
from corral.gateway.health import Health
from corral.gateway.heartbeat import beat
from corral.gateway.journal import NOBODY, Journal
from corral.gateway.listen import ClientConnection
from corral.gateway.metrics import Metrics
from corral.gateway.probe import Probe
from corral.gateway.queue import Queue
from corral.gateway.recall import Recall
from corral.gateway.records import Begun, Progress, Settled
from corral.gateway.recover import RetryBudget
from corral.gateway.report import Report
from corral.gateway.shipper import Shipper
from corral.gateway.snapshot import Snapshot
from corral.gateway.throughput import Throughput
from corral.gateway.upstream import Upstreams
from corral.store import keeper, keys, leases, reading, share, suspects
from corral.store.budget import Budget
from corral.store.content import Hashes
from corral.store.limits import Limits
from corral.store.lua import PREFIX
from corral.store.valkey import Valkey
from corral.wire.common import Caps
from corral.wire.errors import ApiError, overloaded

log = logging.getLogger(__name__)

PROGRESS: Final = 1.0
"""How often it is recorded how far requests are; what ends sooner needs no such record."""

PROGRESS_ROWS: Final = 4000
SUSPECTS_TOLD: Final = 50
"""They go in one header."""

ASIDE_TOLD: Final = 20

_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}").fullmatch


class Gateway:
    """One gateway: settings, snapshot, limits, pool and journal, and the exchanges that run."""

    def __init__(self, settings: Settings, loop: asyncio.AbstractEventLoop) -> None:
        gateway = settings.gateway
        self.loop = loop
        self.name = gateway.name
        self.max_body = gateway.max_body
        self.max_body_digits = len(str(gateway.max_body))
        self.max_duration = gateway.max_duration
        self.first_token = gateway.first_token
        self.between_tokens = gateway.between_tokens
        self.heartbeat = gateway.queue.heartbeat or 0.0
        self.stale_after = settings.auth.stale
        nodes = urlsplit(gateway.nodes_url)
        self.nodes_address = (nodes.hostname or "127.0.0.1", nodes.port or 80)
        self.pepper = keys.read_pepper(settings.auth.pepper_file)
        self.keeper = Keeper(settings.audit) if settings.audit.content == "full" else None
        self.hashes = Hashes(self.pepper) if settings.audit.content != "none" else None
        token = settings.auth.internal_token_file.read_text().strip()
        spool, cache = gateway.spool / self.name, gateway.cache / self.name
        caps = Caps(**gateway.request.model_dump())
        self.snapshot = Snapshot(settings.limits.default.model_dump(), caps)
        self.metrics = Metrics(self.snapshot)
        self.exposition = Exposition(self, gateway.metrics)
        self.report = Report(self)
        self.probe = Probe(self.snapshot, gateway.nodes_url)
        scripts = (*leases.SCRIPTS, *keeper.SCRIPTS, suspects.TEXT, reading.TEXT)
        self.store = Valkey(settings.valkey_address(), scripts=scripts, probe=PREFIX + b"probe")
        self.changes = Valkey(settings.valkey_address())
        self.limits = Limits(self.store, self.name, settings.limits.denied())
        self.cut_off = CutOff(self.store)
        control = gateway.control_url, token, self.name, cache, self.limits.sharing
        self.feed = Feed(self.snapshot, *control, self._tell, self.report.answer, self._elsewhere)
        self.limits.on_moved = self.changes.reset  # it only listens: nothing else would tell it
        self.limits.budgets, self.limits.find = self.snapshot.budgets, self.snapshot.budget
        self.queue = Queue(self, self.name, gateway.queue.length, gateway.queue.wait)
        self.limits.slots = self.queue.slots
        self.queue.slots.gateways = self._gateways
        self.recall = Recall(self.snapshot, self.limits, gateway.control_url, token)
        self.answer_tokens = settings.limits.answer_tokens
        self.held = adopt.own(spool)
        self.journal = Journal(spool, gateway.access_log, loop, settings.audit.durability == "synced")
        self.spool_max = gateway.spool_max
        self.adopter = adopt.Adopter(gateway.spool, self.name, gateway.control_url, token)
        self.shipper = Shipper(self.journal.spool, spool, gateway.control_url, token, self.name)
        self.upstreams = Upstreams(loop)
        self.retries = RetryBudget()
        self.suspects = suspects.Suspects(self.store)
        self.crashing = Crashing(self, self.suspects)
        self.health = Health(self)
        self.connections: set[ClientConnection] = set()
        self.unfinished = 0  # bytes of bodies that came in pieces and are not whole
        self.finished = Throughput()  # bytes of those that became so
        self.running: set[Exchange] = set()
        self.cooling: dict[str, tuple[Budget, int, float]] = {}
        self.listening = False  # whether callers can come
        self.stopping = False  # from then on each answer closes its connection
        self.checks = Checks()
        self.idle = asyncio.Event()
        self._trusted = [ipaddress.ip_network(network) for network in gateway.trusted_proxies]
        self._prefix = f"{self.name}-{secrets.token_hex(6)}-"
        self._number = 0
        self._progressed = time.monotonic()
        self.journal.record(Begun(self.name, time.time()), NOBODY)

    # -- for connections and exchanges

    def exchange(
        self, connection: ClientConnection, method: bytes, target: bytes, headers: dict[bytes, bytes]
    ) -> Exchange:
        """A new exchange for a request whose head was read."""
        return Exchange(self, connection, method, target, headers, self._identify(connection, headers))

    def release(self, exchange: Exchange, tokens: int) -> None:
        """Settle a request with its limits, as soon as the slot is free that it had when it was aborted.

        Who leaves again and again would else hold many slots that cool, with one request at a time.
        """
        key, id = exchange.key, exchange.record_id
        assert key is not None
        took = time.monotonic() - exchange.arrived
        left = exchange.cool - exchange.arrived - took if exchange.cool else 0.0
        if left > 0.0:
            self.cooling[id] = key.budget, tokens, took + left
            self.loop.call_later(left, self.cooled, id)
        else:
            self.limits.release(key.budget, id, tokens, took)

    def cooled(self, id: str) -> None:
        """The slot of a request that was aborted is free by now, or this gateway stops."""
        if id in self.cooling:
            budget, tokens, took = self.cooling.pop(id)
            self.limits.release(budget, id, tokens, took)

    def closed(self, connection: ClientConnection) -> None:
        """A caller's connection ended."""
        self.connections.discard(connection)
        if not self.connections:
            self.idle.set()

    def trusts(self, peer: str) -> bool:
        """Whether a peer is a proxy of ours, whose word on the caller counts."""
        if not peer:
            return False
        address = ipaddress.ip_address(peer)
        return any(address in network for network in self._trusted)

    def _identify(self, connection: ClientConnection, headers: dict[bytes, bytes]) -> tuple[str, str, str]:
        """Record id, request id as shown to the caller, and the caller's address.

        The record id is the edge's (a replay settles once) or made here, never the caller's: who repeats an
        `X-Request-ID` is still counted each time.
        """
        record_id = ""
        address = connection.peer
        if connection.trusted:
            edge_id = headers.get(b"x-corral-edge-id")
            if edge_id is not None and _REQUEST_ID(edge_id):
                record_id = edge_id.decode()
            forwarded = headers.get(b"x-forwarded-for")
            if forwarded is not None:
                if forwarded.find(b",") >= 0:
                    forwarded = forwarded.rpartition(b",")[2].strip()
                address = forwarded.decode("latin-1")
                if len(address) > 64:
                    address = address[:64]
        if not record_id:
            record_id = self.new_id()
        shown = headers.get(b"x-request-id")
        # Some clients take their key for an id: it would be shown and recorded.
        if shown is None or shown.find(b"crl_") >= 0 or not _REQUEST_ID(shown):
            return record_id, record_id, address
        return record_id, shown.decode(), address

    def new_id(self) -> str:
        """An id that no other has."""
        self._number += 1
        return self._prefix + str(self._number)

    def snapshot_now(self, now: float) -> Snapshot:
        """The snapshot, if it may still be used. `now` is monotonic seconds.

        Raises:
            ApiError: 503 before the first one, and when control or its database has been away for `auth.stale`.
        """
        snapshot = self.snapshot
        if now - snapshot.confirmed > self.stale_after:
            raise overloaded("no current list of keys: control or its database is away", self.feed.due - now)
        return snapshot

    def check_key(self, headers: dict[bytes, bytes]) -> None:
        """Whether a request has a key, before the rest of a large body is taken from it. Raises ApiError."""
        snapshot = self.snapshot_now(time.monotonic())
        authenticate(headers, snapshot.keys, self.pepper, time.time(), snapshot.verified)

    def refuse_unread(self, exchange: Exchange, error: ApiError, sent: int) -> None:
        """Record a request that was refused before it could be read whole; `exchange` has what was read of it."""
        record = settle.settled(exchange, error.status, "refused", sent, time.monotonic())
        self.metrics.settled(exchange, record)
        self.journal.record(record, NOBODY, access=True)

    def _gateways(self) -> int:
        return self.limits.sharing.count

    def content_wanted(self, key: Key | None) -> int:
        """Characters of an answer that keeping it needs, for a key whose prompts and answers are kept; else 0."""
        keeper = self.keeper
        return keeper.window if keeper is not None and key is not None and key.content else 0

    def keep_content(self, exchange: Exchange, record: Settled) -> None:
        """Put prompt and answer into the record of a request whose key has them kept.

        Where that fails, the request does not.
        """
        assert self.keeper is not None
        try:
            record.content = self.keeper.keep(exchange.body, settle.said(exchange, record.outcome))
        except Exception:
            log.exception("%s: prompt and answer are not kept", exchange.request_id)

    # -- for its life (corral.gateway.life)

    def sweep(self, now: float) -> None:
        """Look for what is past its deadline or was idle too long. `now` is monotonic seconds."""
        for connection in list(self.connections):
            connection.check(now)
        self.health.look(now)
        self.queue.sweep(now)
        self.crashing.sweep(now)
        for exchange in list(self.running):
            exchange.check(now)
        if self.heartbeat:
            for exchange in list(self.running):
                beat(exchange, self.heartbeat, now)
        self.upstreams.sweep(now)
        if now - self._progressed >= PROGRESS:
            self._progressed = now
            self.journal.full = self.shipper.backlog() >= self.spool_max
            self._record_progress(now)

    def _record_progress(self, now: float) -> None:
        """Write how far requests are that have run for a while: where this process is killed, they count so much."""
        rows = [settle.far(exchange, now) for exchange in self.running if now - exchange.arrived >= PROGRESS]
        for start in range(0, len(rows), PROGRESS_ROWS):
            self.journal.record(Progress(rows[start : start + PROGRESS_ROWS]), NOBODY)

    def put_aside(self) -> list[str]:
        """Damaged segments of this gateway's spool, and of those that it adopted, which nobody has removed yet."""
        return self.shipper.put_aside() + self.adopter.put_aside()

    def _elsewhere(self, others: bool, now: float) -> None:
        """Whether others have the store: who does not listen yet is sent nobody as it is, and is to be found first."""
        self.cut_off.heard(others and self.listening, now)

    def _tell(self) -> dict[str, str]:
        """What control hears with each question for a snapshot: where the metrics are, how old the backlog is, whether
        the store is there, what was put aside, which runners are suspect or run fewer at once than they have slots, and
        who waits."""
        told = {"X-Corral-Metrics": self.exposition.address, "X-Corral-Backlog": f"{self.shipper.behind():.3f}"}
        crowded = self.health.crowding.crowded(time.monotonic())
        for header, runners in (("Suspects", list(self.health.canaries)), ("Crowded", crowded)):
            if runners:
                names = [f"{quote(node, '')}/{quote(model, '')}" for node, model in runners[:SUSPECTS_TOLD]]
                told[f"X-Corral-{header}"] = ",".join(names)
        if self.listening and not self.stopping:  # who does not serve counts for none of those who could
            told["X-Corral-Store"] = "1" if self.store.connected else "0"
        aside = self.put_aside()
        if aside:
            told["X-Corral-Aside"] = str(len(aside))
            told["X-Corral-Aside-Names"] = ",".join(aside[:ASIDE_TOLD])
        if queues := self.report.queues():
            told["X-Corral-Queues"] = queues
        return told

    def changed(self, message: Any) -> None:
        """Control says that keys or nodes changed, the store whose turn it is, what has been used and which prompts
        runners crash under."""
        if isinstance(message, list) and len(message) == 3:
            if message[1] == self.queue.slots.channel:
                self.queue.slots.woken(message)
                return
            if message[1] == share.CHANNEL:
                if message[0] == b"message":
                    share.told(self.limits.sharing, self.limits.find, message[2], time.monotonic())
                return
            if message[1] == suspects.CHANNEL:
                if message[0] == b"message":
                    self.suspects.heard(message[2])
                return
        self.feed.poke()
