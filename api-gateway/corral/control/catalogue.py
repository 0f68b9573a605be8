"""The catalogue as it is in force: corral.yaml's models with the digests that were recorded, beside what nodes hold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, delete, select

from corral.config.settings import ModelSettings
from corral.control.ollama import NodeFailed, Ollama
from corral.control.prober import Fleet, Member
from corral.fleet import catalogue as decide
from corral.fleet.catalogue import Held, Holdings, Plan, Resident, Wanted, digest_of
from corral.fleet.node import canonical_name
from corral.fleet.placement import Demand
from corral.store.database import Database, insert
from corral.store.tables import models
from corral.wire.options import ModelPolicy, check

LASTING = 365 * 86400.0


class Catalogue:
    """``entries`` are corral.yaml's, by canonical name; ``recorded`` the digests that were entered when applied;
    ``policies`` what its requests have."""

    def __init__(self, database: Database, fleet: Fleet, entries: Iterable[ModelSettings]) -> None:
        self.entries: dict[str, ModelSettings] = {}
        self.policies: dict[str, ModelPolicy] = {}
        self.recorded: dict[str, str] = {}
        self._database, self._fleet = database, fleet
        self._trained: dict[str, int] = {}
        self.replace(entries)

    def replace(self, entries: Iterable[ModelSettings]) -> None:
        """Put other models in force."""
        self.entries = {canonical_name(entry.name): entry for entry in entries}
        # In place: who holds them follows.
        self.policies.clear()
        for name, entry in self.entries.items():
            self.policies[name] = ModelPolicy.from_entry(entry.model_dump(mode="json"))

    async def load(self) -> None:
        """Read the recorded digests."""
        self.recorded = await self._database.read(_read)
        await self.record_stated()

    async def record_stated(self) -> None:
        """Record what corral.yaml states, so that a model stays at that version when it is no longer stated there."""
        if fresh := self.stated(self.entries.values()):
            self.recorded |= await self._database.write(enter, fresh, True)

    async def record(self, name: str, digest: str, node: str, anew: bool = False) -> str:
        """Record a model's digest unless there is one already (or ``anew``); the one that holds from now on."""
        self.recorded |= await self._database.write(enter, {name: (digest, node)}, anew)
        return self.recorded[name]

    def stated(self, entries: Iterable[ModelSettings]) -> dict[str, tuple[str, str]]:
        """The digests that entries state and that are not recorded, for `enter` with `anew`."""
        found = ((canonical_name(entry.name), entry.digest) for entry in entries)
        wanted = {name: digest for name, digest in found if digest is not None and self.recorded.get(name) != digest}
        return {name: (digest, "corral.yaml") for name, digest in wanted.items()}

    def wanted(self) -> list[Wanted]:
        """What the catalogue asks for; digests that nobody stated or recorded yet are None."""
        return [self.want(name) for name in self.entries]

    def want(self, name: str) -> Wanted:
        """What is asked of one model; of one that the catalogue does not name: that it is there."""
        entry = self.entries.get(name)
        if entry is None:
            return Wanted(name)
        made = Wanted(
            name,
            entry.digest or self.recorded.get(name),
            entry.digest is not None,
            entry.copies,
            entry.pin,
            self.options(name).get("num_ctx"),
        )
        return decide.clipped(made, self._trained)

    def demand(self, name: str) -> Demand:
        """What placement is to know of a model: copies that stay, whether it is pinned (to where it is), its size."""
        entry = self.entries.get(name)
        sizes = [tag.get("size") for node in self._fleet.members.values() for tag in node.tags if tag["name"] == name]
        size = max([one for one in sizes if isinstance(one, int)], default=0)
        if entry is None:
            return Demand(name, size=size)
        return Demand(name, size=size, copies=entry.copies, pins=frozenset({""}) if entry.pin else frozenset())

    def options(self, name: str) -> dict[str, Any]:
        """Options of every request for a model: a runner that was loaded with others would be loaded again."""
        return check({}, self.policies[name]) if name in self.policies else {}

    def holdings(self, names: Collection[str] | None = None) -> list[Holdings]:
        """The nodes (these only) as the prober saw them last."""
        return [view(node) for node in self._fleet.members.values() if names is None or node.name in names]

    async def refresh(self) -> None:
        """Ask every node now what it holds, and how long a context can be where it is less than asked for."""
        members = list(self._fleet.members.values())
        await asyncio.gather(*(self._fleet.probe(member, fresh=True) for member in members))
        for member in members:
            for model in self.wanted():
                resident = view(member).resident.get(model.name)
                if not member.up or resident is None or model.num_ctx is None or resident.digest in self._trained:
                    continue
                if resident.context is not None and resident.context < model.num_ctx:
                    await self.learn(member, model.name, resident.digest)

    async def learn(self, member: Member, name: str, digest: str) -> int | None:
        """The longest context that a model has; None where the node does not say."""
        try:
            most = await Ollama(self._fleet.client, member.url).trained_context(name)
        except NodeFailed:
            return None
        if most is not None:
            self._trained[digest] = most
        return most

    def plan(self, nodes: Collection[str] | None = None) -> tuple[Plan, dict[str, tuple[str, str]]]:
        """The steps that put the catalogue in force on all nodes, or those of them on `nodes` only.

        Also the digests to record with that, each with its node, by model: of those that have none yet but are held.
        """
        wanted: list[Wanted] = []
        fresh: dict[str, tuple[str, str]] = {}
        notes: list[str] = []
        everything = self.holdings()
        for model in self.wanted():
            if model.digest is None and (found := decide.settled(model.name, everything)) is not None:
                fresh[model.name] = found
                notes.append(f"{model.name}: the digest of {found[1]} is recorded: {found[0]}")
                model = replace(model, digest=found[0])
            wanted.append(model)
        made = decide.plan(wanted, everything)
        steps = tuple(step for step in made.steps if nodes is None or step.node in nodes)
        return Plan(steps, made.problems, (*notes, *made.notes)), fresh


def view(member: Member) -> Holdings:
    """A node as decisions see it."""
    now = time.time()
    return Holdings(
        node=member.name,
        held={
            entry["name"]: Held(digest_of(str(entry.get("digest"))), int(entry.get("size") or 0))
            for entry in member.tags
        },
        resident={entry["name"]: _resident(entry, now) for entry in reversed(member.ps)} if member.up else {},
        max_models=member.max_models,
        memory=member.memory,
        problem=None if member.up else f"is down ({member.error})",
        draining=member.draining,
    )


def _resident(entry: dict[str, Any], now: float) -> Resident:
    context = entry.get("context_length")
    return Resident(
        digest=digest_of(str(entry.get("digest"))),
        size=int(entry.get("size") or 0),
        context=context if isinstance(context, int) and context > 0 else None,
        lasting=_lasts(entry.get("expires_at"), now),
    )


def _lasts(expires: object, now: float) -> bool:
    """Whether `expires_at` is so far off that only an unload ends it; a node that says none is taken at its word."""
    if not isinstance(expires, str):
        return True
    try:
        # Ollama writes nanoseconds, which no ISO 8601 of Python's has.
        return datetime.fromisoformat(expires[:19]).replace(tzinfo=UTC).timestamp() > now + LASTING
    except ValueError:
        return True


def _read(connection: Connection) -> dict[str, str]:
    return {row.name: row.digest for row in connection.execute(select(models))}


def enter(connection: Connection, fresh: Mapping[str, tuple[str, str]], anew: bool = False) -> dict[str, str]:
    """Record digests, each with the node that it is of, by model, where there are none yet (or `anew`).

    Those that hold once this is committed: they are the caller's to put in `Catalogue.recorded`.
    """
    held = {}
    for name, (digest, node) in fresh.items():
        row = {"name": name, "digest": digest, "recorded": time.time(), "node": node}
        statement = insert(connection, models).values(row)
        if anew:
            connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_=row))
        else:
            connection.execute(statement.on_conflict_do_nothing())
        held[name] = str(connection.execute(select(models.c.digest).where(models.c.name == name)).scalar_one())
    return held


def forget(connection: Connection, names: Collection[str]) -> None:
    """Forget recorded digests; they are the caller's to take out of `Catalogue.recorded`."""
    connection.execute(delete(models).where(models.c.name.in_(names)))
