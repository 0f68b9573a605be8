"""What control asks gateways. They come for it: a gateway that looks for a snapshot hears that something is asked, and
brings its answer. So control need not reach them, and only who has the internal token says what runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from corral.control.snapshot import Hub

WITHIN = 2.0
"""How long gateways are waited for (seconds): without Valkey they look each half second."""


@dataclass
class Question:
    """One question: who has not answered it yet, and the answers by gateway."""

    asked: dict[str, Any]
    missing: set[str]
    answers: dict[str, Any] = field(default_factory=dict)
    whole: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Told:
    """What gateways said, by name, and who said nothing in time."""

    answers: dict[str, Any]
    silent: list[str]


class Questions:
    """Those that are open."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._open: dict[int, Question] = {}
        self._number = 0

    def of(self, gateway: str) -> list[dict[str, Any]]:
        """What a gateway has still to answer, each with its ``number``."""
        return [{**one.asked, "number": at} for at, one in self._open.items() if gateway in one.missing]

    def take(self, gateway: str, answers: Iterable[Mapping[str, Any]]) -> None:
        """A gateway's answers: ``number`` and ``value``. Those to nothing that is asked are late, and not heeded."""
        for answer in answers:
            number = answer.get("number")
            question = self._open.get(number) if isinstance(number, int) else None
            if question is not None and gateway in question.missing:
                question.missing.discard(gateway)
                question.answers[gateway] = answer.get("value")
                if not question.missing:
                    question.whole.set()

    async def ask(
        self, what: str, id: str = "", only: str = "", within: float = WITHIN, tenant: str | None = None
    ) -> Told:
        """Ask all gateways, or ``only`` one, and wait for their answers, but not for longer than `within` seconds.

        Where a ``tenant`` is named, its requests alone are meant.

        One that was not heard lately is not waited for, but named as long as it may serve by what it last heard.
        """
        present, absent = self._hub.serving()
        if only:
            present, absent = [name for name in present if name == only], [name for name in absent if name == only]
        question = Question({"what": what, "id": id, "tenant": tenant}, set(present))
        self._number += 1
        number = self._number
        if present:
            self._open[number] = question
            try:
                self._hub.nudge()
                async with asyncio.timeout(within):
                    await question.whole.wait()
            except TimeoutError:
                pass
            finally:
                del self._open[number]
        return Told(question.answers, sorted({*absent, *question.missing}))
