"""The gateways' snapshot of keys, nodes and catalogue: its version, who has it, and the word that it changed."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import hiredis
import msgspec
from sqlalchemy import Connection, select

from corral.config.settings import ModelSettings
from corral.control.gateways import JUST_NOW, LATELY, NOTHING, PRESENT, Gateway, Told
from corral.control.prober import Fleet
from corral.store.database import Database
from corral.store.progress import Shipped
from corral.store.tables import audit, audit_streams, disabled_models, key_verifiers, keys, tenants
from corral.store.valkey import Valkey, ValkeyDown
from corral.store.verify import CONTROL

CHANNEL = b"corral:snapshot"
ACKNOWLEDGE = 1.0
FORGOTTEN = 3600.0
VERSIONS_KEPT = 4096
LOOK = 0.25
"""The pause between two looks whether another control changed something (seconds); gateways ask each half second."""
FIELDS = (
    *("id", "name", "tenant", "role", "models", "networks"),
    *("rpm", "tpm", "concurrency", "daily_tokens", "monthly_tokens", "class", "weight"),
    *("expires", "content", "deadline"),
)

log = logging.getLogger(__name__)


class Hub:
    """Holds what the snapshot is made of and tells when it changes.

    ``dedicated`` has the nodes of tenants that have some to themselves, ``disabled`` models with why, for operators.
    ``stale``: for so many seconds keys are believed that were not read again.

    The version is a hash of what matters: keys, nodes, their states and tags, and which models are resident,
    but not how long they stay so.
    """

    def __init__(
        self,
        database: Database,
        fleet: Fleet,
        valkey: Valkey,
        catalogue: Iterable[ModelSettings],
        stale: float,
        dedicated: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        self.version = ""
        self.gateways: dict[str, Gateway] = {}
        self._database, self._fleet, self._valkey, self._stale = database, fleet, valkey, stale
        self._dedicated = {tenant: list(names) for tenant, names in (dedicated or {}).items()}
        self.replace(catalogue)
        self._keys: list[dict[str, Any]] = []
        self._keys_digest = b""
        self._rows: list[tuple[dict[str, Any], list[tuple[str, float | None]]]] = []
        self._verifier_ends = math.inf
        self._changes: int | None = None
        self._read_at = -math.inf
        self._tenants: list[dict[str, Any]] = []
        self.disabled: dict[str, str | None] = {}
        self.continuable: dict[str, str] = {}
        self._known: dict[str, tuple[dict[str, Any], list[tuple[str, float | None]]]] = {}
        self.number = 0
        self._numbers: OrderedDict[str, int] = OrderedDict()
        self._arrived = asyncio.Condition()
        self._loading = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        fleet.on_change = self.refresh
        valkey.on_connect = self._publish

    def replace(self, catalogue: Iterable[ModelSettings]) -> None:
        """Put another catalogue into the snapshot; `refresh` tells of it."""
        self._catalogue = [model.model_dump(mode="json") for model in catalogue]

    async def reload(self) -> int:
        """Read keys, tenants and disabled models again after they changed; the number of the snapshot with them."""
        async with self._loading:
            began = time.monotonic()
            self._changes, self._rows, self._tenants, self.disabled = await self._database.read(_read)
            self._read_at = began
            self._known = {row["id"]: (row, proofs) for row, proofs in self._rows}
            self._build_keys()
            self.refresh()
        return self.number

    async def follow(self) -> None:
        """Read again what another control changed, and see that the database still says what was read; until cancelled.

        Whoever changes something enters it in the audit trail in the same transaction: the place of the last entry
        tells that there may be a change, at the price of one row. Reads are entered there too.
        """
        silent = False
        while True:
            began = time.monotonic()
            try:
                changes = await self._database.read(_changes)
                if changes == self._changes or not await self._database.read(_altered, self._changes or 0):
                    self._changes, self._read_at = changes, max(self._read_at, began)
                else:
                    await self.reload()
                silent = False
            except Exception as error:  # whatever it is: what nobody reads again grows old
                if not silent:
                    log.warning("keys are not read, those that are known hold for %g s: %s", self._stale, error)
                silent = True
            await asyncio.sleep(LOOK)

    @property
    def age(self) -> float:
        """For how long nobody has seen that the keys are what the database has (seconds)."""
        return time.monotonic() - self._read_at

    def refresh(self) -> None:
        """Look whether what matters has changed, and tell if so."""
        if time.time() >= self._verifier_ends:
            self._build_keys()
        matters: list[Any] = [
            [
                *(node.name, node.url, node.slots, node.memory, node.state, node.version, node.usable),
                node.resident if node.up else [],
                *(node.on_cpu, node.measured.loading, node.suspects),
            ]
            for node in self._fleet.members.values()
        ]
        matters += [self._catalogue, self._tenants, list(self.disabled), self._dedicated, self.continuable]
        content = self._keys_digest + msgspec.json.encode(matters)
        version = hashlib.sha256(content).hexdigest()[:16]
        if version != self.version:
            self.number += 1
            self.version = version
            self._numbers[version] = self.number
            self._numbers.move_to_end(version)
            if len(self._numbers) > VERSIONS_KEPT:
                self._numbers.popitem(last=False)
            self._publish()

    def continues(self, continuable: dict[str, str]) -> None:
        """Note the models whose answers another node can go on with: the digest by name."""
        if continuable != self.continuable:
            self.continuable = continuable
            self.refresh()

    def content(self) -> bytes:
        """The snapshot as JSON."""
        nodes = [node.entry() for node in self._fleet.members.values()]
        return msgspec.json.encode(
            {
                "version": self.version,
                "keys": self._keys,
                "tenants": self._tenants,
                "nodes": nodes,
                "models": self._catalogue,
                "disabled": list(self.disabled),
                "continuable": self.continuable,
                "dedicated": self._dedicated,
            }
        )

    def look_up(self, key_id: str) -> tuple[dict[str, Any], list[tuple[str, float | None]]] | None:
        """A key and its verifiers with their ends, as last read; None if it was not known then, or too long ago."""
        if self.age > self._stale or key_id not in self._known:
            return None
        row, proofs = self._known[key_id]
        return {**row, "revoked": 0.0 if row["revoked"] else None}, proofs

    def limited(self, key_id: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """A key and its tenant, with their limits, as last read; None for one that was not known then."""
        if key_id not in self._known:
            return None, None
        key, _ = self._known[key_id]
        return key, next((row for row in self._tenants if row["name"] == key["tenant"]), None)

    # -- who has it

    async def heard(
        self,
        name: str,
        version: str,
        told: Told = NOTHING,
        left: bool = False,
    ) -> None:
        """Note that a gateway asked, what it has, and what it says of itself and of nodes' runners."""
        if self._fleet.suspect(name, told.suspects, told.crowded):
            self.refresh()  # the others are not to eject what would then be too much
        now = time.time()
        as_of = min(told.as_of, now)
        self.gateways[name] = Gateway(
            *(name, now, version, told.metrics, told.behind, as_of, told.queues, left),
            aside=told.aside,
            aside_names=told.aside_names,
            store=told.store,
        )
        async with self._arrived:
            self._arrived.notify_all()

    def known(self) -> list[Gateway]:
        """Gateways that were heard within the last hour and did not say that they end, by name.

        Nobody is to be alarmed by one that was taken away in order; who was away for longer is forgotten.
        """
        since = time.monotonic() - FORGOTTEN
        self.gateways = {name: gateway for name, gateway in self.gateways.items() if gateway.at >= since}
        return sorted((one for one in self.gateways.values() if not one.left), key=lambda gateway: gateway.name)

    def present(self) -> list[Gateway]:
        """Gateways that were heard just now."""
        return [one for one in self.known() if one.present]

    def serving(self) -> tuple[list[str], list[str]]:
        """Names of gateways that were heard just now, and of others that may serve by what they last heard."""
        present = self._serving(PRESENT)
        return present, [name for name in self._serving(self._stale) if name not in present]

    def sharing(self) -> list[str]:
        """Names of gateways that were heard lately: they share the limits, as far as is known here."""
        return self._serving(LATELY)

    def elsewhere(self, gateway: str) -> bool:
        """Whether of those that serve others than `gateway` reach Valkey, as many as do not, or more.

        Where fewer do, they could not serve for all; and it may be Valkey that fails, each of them sees it in its turn.
        """
        since = time.monotonic() - JUST_NOW
        serving = [one for one in self.gateways.values() if one.store is not None and one.at >= since and not one.left]
        having = [one for one in serving if one.store]
        return any(one.name != gateway for one in having) and len(having) * 2 >= len(serving)

    def shipped(self) -> dict[str, Shipped]:
        """What gateways that were heard lately have shipped, as they said."""
        since = time.monotonic() - LATELY
        heard = [one for one in self.gateways.values() if one.at >= since]
        ended = {one.name for one in heard if one.left and not one.behind}
        return {
            one.name: Shipped(one.as_of - one.behind, one.seen, one.name in ended)
            for one in heard
            if one.as_of or one.name in ended
        }

    def nudge(self) -> None:
        """Have gateways look for a snapshot now, where Valkey reaches them."""
        self._publish()

    def tenant(self, key_id: str) -> str | None:
        """The tenant of a key; None where there is no such key."""
        return str(self._known[key_id][0]["tenant"]) if key_id in self._known else None

    async def spread(self) -> dict[str, list[str]]:
        """Read again what changed and wait a second: gateways that have ``acknowledged`` it, and ``pending`` ones.

        What was changed is in force everywhere by then, unless a gateway is cut off.
        """
        has, has_not = await self.acknowledged(await self.reload(), ACKNOWLEDGE)
        return {"acknowledged": has, "pending": has_not}

    async def acknowledged(self, number: int, within: float) -> tuple[list[str], list[str]]:
        """Wait until every gateway has snapshot `number` or a later one: names of those that have, and have not.

        One that was not heard lately is not waited for, but named as long as it may serve by what it last heard:
        nobody can tell a network that is cut from a machine that is off.
        """

        def waiting() -> bool:
            return not self._behind(number, PRESENT)

        try:
            async with asyncio.timeout(within), self._arrived:
                await self._arrived.wait_for(waiting)
        except TimeoutError:
            pass
        behind = self._behind(number, self._stale)
        if behind:
            log.warning("gateways without snapshot %d after %g s: %s", number, within, ", ".join(behind))
        return sorted(set(self._serving(self._stale)) - set(behind)), behind

    def _behind(self, number: int, within: float) -> list[str]:
        known = self._numbers
        return [name for name in self._serving(within) if known.get(self.gateways[name].version, 0) < number]

    def _serving(self, within: float) -> list[str]:
        """Gateways that were heard within so many seconds and did not say that they end."""
        since = time.monotonic() - within
        return sorted(name for name, one in self.gateways.items() if one.at >= since and not one.left)

    # -- making it

    def _build_keys(self) -> None:
        now = time.time()
        self._verifier_ends = min(
            (end for _, proofs in self._rows for _, end in proofs if end is not None and end > now),
            default=math.inf,
        )
        self._keys = [_entry(row, proofs, now) for row, proofs in self._rows]
        self._keys_digest = hashlib.sha256(msgspec.json.encode(self._keys)).digest()

    def _publish(self) -> None:
        # Only a nudge: a gateway that misses it asks within half a second anyway.
        if self._valkey.connected:
            task = asyncio.get_running_loop().create_task(self._send(self.version.encode()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _send(self, version: bytes) -> None:
        try:
            await self._valkey.request(b"PUBLISH", CHANNEL, version)
        except (ValkeyDown, hiredis.HiredisError) as error:
            log.warning("the change was not published: %s", error)


def _entry(row: dict[str, Any], proofs: list[tuple[str, float | None]], now: float) -> dict[str, Any]:
    """A key as gateways get it. ``ends``: they hold a verifier to its end by themselves, while control is away too."""
    alive = [(verifier, end) for verifier, end in proofs if end is None or end > now]
    entry: dict[str, Any] = {**row, "verifiers": [verifier for verifier, _ in alive]}
    if ends := {verifier: end for verifier, end in alive if end is not None}:
        entry["ends"] = ends
    return entry


def _changes(connection: Connection) -> int | None:
    """A number that grows with each change of what is read here."""
    return connection.execute(select(audit_streams.c.pos).where(audit_streams.c.stream == CONTROL)).scalar()


def _altered(connection: Connection, since: int) -> bool:
    """Whether what was entered behind a place of control's is more than reads."""
    row = audit.c
    more = select(row.seq).where(row.gw == CONTROL, row.pos > since, row.method != "GET").limit(1)
    return connection.execute(more).first() is not None


def _read(connection: Connection) -> tuple[int | None, list[Any], list[dict[str, Any]], dict[str, str | None]]:
    """The number of changes, keys with their verifiers, tenants, and disabled models by name with the reason."""
    owners = [dict(row) for row in connection.execute(select(tenants).order_by(tenants.c.name)).mappings()]
    off = connection.execute(select(disabled_models).order_by(disabled_models.c.name))
    return _changes(connection), _read_keys(connection), owners, {row.name: row.reason for row in off}


def _read_keys(connection: Connection) -> list[tuple[dict[str, Any], list[tuple[str, float | None]]]]:
    proofs: dict[str, list[tuple[str, float | None]]] = {}
    proof = key_verifiers.c
    for key_id, verifier, expires in connection.execute(
        select(proof.key_id, proof.verifier, proof.expires).order_by(proof.created)
    ):
        proofs.setdefault(key_id, []).append((verifier, expires))
    found = []
    for row in connection.execute(select(keys).order_by(keys.c.id)).mappings():
        entry = {name: row[name] for name in FIELDS}
        found.append(({**entry, "revoked": row["revoked"] is not None}, proofs.get(row["id"], [])))
    return found
