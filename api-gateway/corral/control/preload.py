"""A node that comes into service gets its models of the catalogue first, while others serve."""

from __future__ import annotations

import asyncio
import logging

from sqlalchemy.exc import SQLAlchemyError

from corral.control.catalogue import Catalogue
from corral.control.errors import Problem
from corral.control.operations import DONE, NOBODY, Operation, Operations, Work
from corral.control.prober import Fleet, Member
from corral.fleet import catalogue as decide
from corral.fleet.catalogue import Step

LOOK = 0.5
STARTING = 60.0
"""Seconds after control's start in which nodes that answer for the first time belong to that start."""

FETCH = (decide.PULL, decide.COPY)

FAILED, EARLY = "preloading failed: ", "in service before its models are there: "

log = logging.getLogger(__name__)


class Preloader:
    """Holds nodes back (``Member.preloading``) until they have what they should, for at most `timeout` seconds.

    Only while another node is in service: where none is, a node that lacks a model is better than none. At control's
    own start nodes are as they were: what they hold is loaded, and none is held back.
    """

    def __init__(self, fleet: Fleet, catalogue: Catalogue, operations: Operations, timeout: float) -> None:
        self._fleet, self._catalogue, self._operations = fleet, catalogue, operations
        self._timeout = timeout
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._started = 0.0
        self._failed: dict[str, tuple[str, list[tuple[str, str]]]] = {}
        """By node, what is said of it: models that it did not get, and why; "" where that is not one model's."""

    def start(self) -> None:
        """Begin with the nodes there are, and go on with those that come back."""
        self._started = asyncio.get_running_loop().time()
        self._fleet.on_up = self._returned
        self._operations.on_end = self.look
        for member in self._fleet.members.values():
            self._begin(member, self._to_load(member), hold=False)

    def begin(self, member: Member) -> None:
        """Give a node that is new, or in use again, its models in the catalogue's versions.

        Before this returns, the node is held back if it has to be.
        """
        self._begin(member, self._catalogue.plan([member.name])[0].steps)

    def look(self) -> None:
        """Take back what was said of models that are there by now, or that the catalogue asks for no more."""
        for name, (what, failed) in list(self._failed.items()):
            lacking = {step.model for step in self._catalogue.plan([name])[0].steps}
            kept = [(model, text) for model, text in failed if model in lacking or (lacking and not model)]
            if (member := self._fleet.members.get(name)) is not None:  # else it is just being removed
                self._say(member, kept, what)

    def _say(self, member: Member, failed: list[tuple[str, str]], what: str = FAILED) -> None:
        member.warning = what + "; ".join(text for _, text in failed) if failed else None
        if failed:
            self._failed[member.name] = what, failed
        else:
            self._failed.pop(member.name, None)

    def _returned(self, member: Member) -> None:
        if not member.answered and asyncio.get_running_loop().time() - self._started < STARTING:
            self._begin(member, self._to_load(member), hold=False)
        else:
            # It was in use with what it has: other versions of that are for `corral models apply`.
            held = {entry["name"] for entry in member.tags}
            steps = self._catalogue.plan([member.name])[0].steps
            later = {step.model for step in steps if step.action in FETCH and step.model in held}
            self._begin(member, decide.without(later, steps))

    def _to_load(self, member: Member) -> tuple[Step, ...]:
        steps = self._catalogue.plan([member.name])[0].steps
        return decide.without({step.model for step in steps if step.action in FETCH}, steps)

    def _begin(self, member: Member, steps: tuple[Step, ...], hold: bool = True) -> None:
        self._say(member, [])
        running = self._tasks.get(member.name)
        if not member.up or member.draining or (running is not None and not running.done()):
            return
        if not steps:
            return
        if hold and self._timeout > 0 and self._others_serve(member):
            member.preloading = "preloading"
        self._tasks[member.name] = asyncio.get_running_loop().create_task(self._run(member, steps))

    def forget(self, member: Member) -> None:
        """Stop: the node is drained or removed."""
        if (task := self._tasks.pop(member.name, None)) is not None:
            task.cancel()
        self._operations.abandon(member.name)
        member.preloading = None
        self._say(member, [])

    async def close(self) -> None:
        """Stop everything."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _others_serve(self, member: Member) -> bool:
        serving = (one for one in self._fleet.members.values() if one is not member and one.answers)
        return any(one.state == "ready" for one in serving)

    async def _run(self, member: Member, steps: tuple[Step, ...]) -> None:
        until = asyncio.get_running_loop().time() + self._timeout
        failed: list[tuple[str, str]] = []
        operation = Operation("preload", NOBODY, [Work(step) for step in steps])
        try:
            try:
                await self._operations.start(operation, f"/admin/nodes/{member.name}/preload")
            except (Problem, SQLAlchemyError) as error:
                failed = [("", f"cannot be preloaded: {error}")]
                return
            while operation.ended is None:
                if member.preloading is not None:
                    self._hold(member, operation, until)
                await operation.changed(operation.version, LOOK)
            failed = operation.failed
        finally:
            if self._tasks.get(member.name) is asyncio.current_task():
                member.preloading = None
                if failed or operation.state == DONE:
                    self._say(member, failed)
                self._fleet.on_change()

    def _hold(self, member: Member, operation: Operation, until: float) -> None:
        if not self._others_serve(member):
            why = "no other node is in service"
        elif asyncio.get_running_loop().time() > until:
            why = f"preload.timeout ({self._timeout:g} s) is over"
        else:
            member.preloading = progress(operation)
            return
        log.warning("%s goes into service before its models are there: %s", member.name, why)
        member.preloading = None
        self._say(member, [("", why)], EARLY)
        self._fleet.on_change()


def progress(operation: Operation) -> str:
    """What an operation is at, in a few words."""
    current = next((work for work in operation.works if work.state == "running"), None)
    if current is None:
        return "preloading"
    shown = current.progress or {}
    total = shown.get("total") or 0
    percent = f" ({100 * shown.get('completed', 0) // total}%)" if total else ""
    verb = "loading" if current.step.action == decide.LOAD else "preloading"
    return f"{verb} {current.step.model}{percent}"
