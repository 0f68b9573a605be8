"""Operations: long work that goes on when its caller has left, can be looked at, waited for and cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from corral.control.audit import record
from corral.control.auth import Principal
from corral.control.errors import Problem
from corral.fleet.catalogue import Step
from corral.store.database import Database

Besides = Callable[[Connection], None]
"""What is written with an operation's row, or not at all."""

KEPT = 100
NOBODY = Principal("", "", "", "")
"""Whom control's own operations are of."""

PENDING, RUNNING, DONE, FAILED, SKIPPED, CANCELLED = "pending", "running", "done", "failed", "skipped", "cancelled"

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Work:
    """A step and how it goes. ``progress``: status, layer, completed and total (bytes), rate (bytes/s)."""

    step: Step
    state: str = PENDING
    detail: str = ""
    error: str | None = None
    progress: dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """It in the admin API."""
        return {
            **asdict(self.step),
            "state": self.state,
            "detail": self.detail,
            "error": self.error,
            "progress": self.progress,
        }


@dataclass(eq=False)
class Operation:
    """One call's work. ``accepted``: digests by model that this operation found to be the right ones. ``before``: what
    its nodes had of its models when it began."""

    kind: str
    who: Principal
    works: list[Work]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    accept: bool = False
    accepted: dict[str, str] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: f"op-{secrets.token_hex(6)}")
    state: str = RUNNING
    version: int = 0
    created: float = field(default_factory=time.time)
    ended: float | None = None
    task: asyncio.Task[None] | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def nodes(self) -> list[str]:
        """The nodes it works on."""
        return list(dict.fromkeys(work.step.node for work in self.works))

    @property
    def states(self) -> dict[str, int]:
        """How many of its steps are in each state."""
        return dict(Counter(work.state for work in self.works))

    @property
    def errors(self) -> list[str]:
        """What failed, each naming node and model."""
        return [text for _, text in self.failed]

    @property
    def failed(self) -> list[tuple[str, str]]:
        """The same, each with its model ("" where it is not one model's)."""
        failed = [
            (work.step.model, f"{work.step.node}: {work.step.model}: {work.error}") for work in self.works if work.error
        ]
        return [*(("", problem) for problem in self.problems), *failed]

    def touch(self) -> None:
        """Tell those who wait that something has changed."""
        self.version += 1
        self._news.set()
        self._news = asyncio.Event()

    async def changed(self, after: int, within: float) -> None:
        """Wait until it is past version `after` or has ended; at most `within` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                while self.version <= after and self.ended is None:
                    await self._news.wait()

    def describe(self) -> dict[str, Any]:
        """It in the admin API."""
        return {
            "id": self.id,
            "kind": self.kind,
            "state": self.state,
            "by": self.who.key_id or "corral",
            "created": self.created,
            "ended": self.ended,
            "version": self.version,
            "steps": [work.describe() for work in self.works],
            "errors": self.errors,
            "notes": list(self.notes),
        }


Perform = Callable[[Operation, Work], Awaitable[None]]
"""Does one step. Raises StepFailed."""

Look = Callable[[Operation], dict[str, Any]]
"""What the nodes of an operation have of its models."""


class StepFailed(Exception):
    """A step failed; says why. ``gone``: the node answers no more."""

    def __init__(self, message: str, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


class Operations:
    """What runs, and the last KEPT that have ended. A node is worked on by one operation at a time.

    A caller's operation is refused where another caller's works on the same node; those that control starts by itself
    wait for each other and for callers', and callers' for them. ``on_end`` is called whenever one has ended.
    """

    def __init__(self, database: Database, perform: Perform, look: Look) -> None:
        self._database, self._perform, self._look = database, perform, look
        self._known: dict[str, Operation] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self.on_end: Callable[[], None] = lambda: None

    def all(self) -> list[Operation]:
        """Every operation, oldest first."""
        return list(self._known.values())

    def working(self) -> bool:
        """Whether any is not over."""
        return any(operation.ended is None for operation in self._known.values())

    def find(self, operation: str) -> Operation:
        """One by its id. Raises Problem 404."""
        if operation not in self._known:
            gone = f"the last {KEPT} that ended are kept, until control restarts"
            raise Problem(404, "not_found", f"there is no operation {operation!r}: {gone}")
        return self._known[operation]

    async def start(self, operation: Operation, route: str, besides: Besides | None = None) -> Operation:
        """Begin; it is in the audit trail when this returns, and what `besides` wrote in the same transaction.

        Raises:
            Problem: 409 where a caller's operation is at work on one of the nodes.
        """
        self._check_free(operation)
        self._known[operation.id] = operation
        operation.before = self._look(operation)
        try:
            await self._database.write(_entered, operation, route, besides)
        except BaseException:
            del self._known[operation.id]
            raise
        operation.task = asyncio.get_running_loop().create_task(self._run(operation))
        return operation

    def cancel(self, operation: Operation) -> None:
        """Stop it; what is done stays done."""
        if operation.task is not None:
            operation.task.cancel()

    def abandon(self, node: str) -> None:
        """Cancel what control does by itself on a node that leaves."""
        for operation in self._known.values():
            if operation.ended is None and not operation.who.key_id and node in operation.nodes:
                self.cancel(operation)

    async def close(self) -> None:
        """Cancel everything and wait for it."""
        tasks = [one.task for one in self._known.values() if one.task is not None and not one.task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _check_free(self, operation: Operation) -> None:
        if not operation.who.key_id:
            return
        for other in self._known.values():
            shared = set(other.nodes) & set(operation.nodes)
            if other.ended is None and other.who.key_id and shared:
                seconds = time.time() - other.created
                raise Problem(
                    409,
                    "busy",
                    f"{min(shared)} is at work for {other.id} ({other.kind}, of key {other.who.key_id}, for "
                    f"{seconds:.0f} s): wait for it (corral models watch {other.id}) or cancel it",
                    operation=other.id,
                )

    async def _run(self, operation: Operation) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for node in operation.nodes:
                    works = [work for work in operation.works if work.step.node == node]
                    group.create_task(self._work(operation, node, works))
            operation.state = FAILED if operation.errors else DONE
        except asyncio.CancelledError:
            operation.state = CANCELLED
        except Exception:
            log.exception("operation %s", operation.id)
            operation.problems = (*operation.problems, "control failed at this; its log says more")
            operation.state = FAILED
        for work in operation.works:
            if work.state in (PENDING, RUNNING):
                work.state = CANCELLED
        operation.ended = time.time()
        for error in operation.errors:
            log.warning("%s %s: %s", operation.kind, operation.id, error)
        try:
            await asyncio.shield(self._database.write(_ended, operation, self._look(operation)))
        except SQLAlchemyError as error:
            log.warning("the end of %s is not in the audit trail: %s", operation.id, error)
        self.on_end()
        operation.touch()
        self._prune()

    async def _work(self, operation: Operation, node: str, works: Iterable[Work]) -> None:
        async with self._locks.setdefault(node, asyncio.Lock()):
            failed: dict[str, str] = {}
            gone = False
            for work in works:
                if gone or failed.keys() & {work.step.model, work.step.room_for}:
                    work.state = SKIPPED
                    work.detail = "the node is gone" if gone else "an earlier step failed"
                    continue
                work.state = RUNNING
                operation.touch()
                try:
                    await self._perform(operation, work)
                    work.state = DONE
                except StepFailed as error:
                    work.state, work.error = FAILED, str(error)
                    failed[work.step.model] = work.error
                    gone = error.gone
                operation.touch()

    def _prune(self) -> None:
        ended = [one for one in self._known.values() if one.ended is not None]
        for one in ended[: max(0, len(ended) - KEPT)]:
            del self._known[one.id]


def _short(works: Collection[Work]) -> list[str]:
    return [f"{work.step.action} {work.step.model} on {work.step.node}" for work in works]


def _entered(connection: Connection, operation: Operation, route: str, besides: Besides | None) -> None:
    if besides is not None:
        besides(connection)
    after = {"operation": operation.id, "steps": _short(operation.works)}
    record(connection, operation.who, "POST", route, operation.before, after, status=202)


def _ended(connection: Connection, operation: Operation, now: dict[str, Any]) -> None:
    after = {"kind": operation.kind, "state": operation.state, "errors": operation.errors, **now}
    status = 500 if operation.state == FAILED else 200
    record(connection, operation.who, "POST", f"/admin/operations/{operation.id}", operation.before, after, status)
