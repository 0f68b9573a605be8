"""What fires: asked of Alertmanager where its address is known, else by its webhook's notifications, kept in memory.

By notifications alone one that was inhibited while it ended would stay: nothing is sent of it then.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx

from corral.store.asking import http_client

KEPT_MAX = 1000
FORGET = 9 * 3600.0
"""More than twice Alertmanager's repeat_interval: what was not repeated since then does not fire any more."""
TEXT_MAX = 1000
STATUSES = ("firing", "resolved")
ANSWER_WITHIN = 1.0
ANSWER_MAX = 4 << 20

log = logging.getLogger(__name__)


class BadNotification(ValueError):
    """A body that is no notification of Alertmanager's; says what is wrong."""


@dataclass(frozen=True)
class Alert:
    """An alert that fires. ``since`` is as Alertmanager says it, ``heard`` epoch seconds."""

    labels: dict[str, str]
    annotations: dict[str, str]
    since: str
    heard: float

    def describe(self) -> dict[str, Any]:
        """As the admin API shows it."""
        return {
            "name": self.labels.get("alertname", ""),
            "severity": self.labels.get("severity", ""),
            "state": "firing",
            "since": self.since,
            "summary": self.annotations.get("summary", ""),
            "runbook_url": self.annotations.get("runbook_url", ""),
            "labels": self.labels,
        }


class Alerts:
    """The alerts that fire, KEPT_MAX at most (the newest); ``received`` counts notifications by status.

    ``url`` is Alertmanager's; None: it is not asked.
    """

    def __init__(self, url: str | None = None) -> None:
        self._url = f"{url}/api/v2/alerts" if url else ""
        self._silent = False
        self._firing: dict[str, Alert] = {}
        self.received = dict.fromkeys(STATUSES, 0)

    def take(self, body: object) -> None:
        """Take a notification in.

        Raises:
            BadNotification: it is none; nothing was taken.
        """
        if not isinstance(body, dict) or body.get("version") != "4":
            raise BadNotification('version: expected "4", as Alertmanager sends it')
        if body.get("status") not in STATUSES:
            raise BadNotification("status: expected firing or resolved")
        listed = body.get("alerts")
        if not isinstance(listed, list):
            raise BadNotification("alerts: expected a list")
        read = [_read(entry, number) for number, entry in enumerate(listed)]
        self.received[body["status"]] += 1
        for key, fires, alert in read:
            self._firing.pop(key, None)
            if fires:
                self._firing[key] = alert
        while len(self._firing) > KEPT_MAX:
            del self._firing[next(iter(self._firing))]

    def firing(self) -> list[dict[str, Any]]:
        """What fires now by what was sent, the oldest first."""
        until = time.time() - FORGET
        self._firing = {key: alert for key, alert in self._firing.items() if alert.heard > until}
        return _described(self._firing.values())

    async def now(self) -> list[dict[str, Any]]:
        """What fires now, neither silenced nor inhibited, by Alertmanager's word; where it has none, by `firing`."""
        if not self._url:
            return self.firing()
        try:
            listed = json.loads(await self._ask())
            if not isinstance(listed, list):
                raise BadNotification("alerts: expected a list")
            found = [_read(_active(entry), number)[2] for number, entry in enumerate(listed[:KEPT_MAX])]
        except (httpx.HTTPError, TimeoutError, ValueError, RecursionError) as error:
            if not self._silent:
                log.warning("%s is not what Alertmanager answers: %r", self._url, error)
            self._silent = True
            return self.firing()
        self._silent = False
        return _described(found)

    async def _ask(self) -> bytes:
        data = bytearray()
        # The whole of it in time: httpx's is between two reads.
        async with asyncio.timeout(ANSWER_WITHIN), http_client() as client:
            asked = {"active": "true", "silenced": "false", "inhibited": "false"}
            async with client.stream("GET", self._url, params=asked) as answer:
                async for piece in answer.raise_for_status().aiter_bytes():
                    data += piece
                    if len(data) > ANSWER_MAX:
                        raise BadNotification(f"more than {ANSWER_MAX} bytes")
        return bytes(data)


def _active(entry: object) -> object:
    """An entry of Alertmanager's list as in a notification, which has another word for it."""
    state = entry.get("status") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(state, dict) or state.get("state") != "active":
        raise BadNotification("status.state: expected active")
    return {**entry, "status": "firing"}


def _described(alerts: Iterable[Alert]) -> list[dict[str, Any]]:
    return sorted((alert.describe() for alert in alerts), key=lambda one: (one["since"], one["name"]))


def _read(entry: object, number: int) -> tuple[str, bool, Alert]:
    """Key, whether it fires, and the alert."""
    place = f"alerts[{number}]"
    if not isinstance(entry, dict) or entry.get("status") not in STATUSES:
        raise BadNotification(f"{place}.status: expected firing or resolved")
    labels, annotations = (_texts(entry.get(name) or {}, f"{place}.{name}") for name in ("labels", "annotations"))
    if not labels.get("alertname"):
        raise BadNotification(f"{place}.labels.alertname: is needed")
    since = entry.get("startsAt")
    try:
        datetime.fromisoformat(str(since))
    except ValueError:
        raise BadNotification(f"{place}.startsAt: expected a time such as 2026-01-31T12:00:00Z") from None
    key = repr(sorted(labels.items()))
    return key, entry["status"] == "firing", Alert(labels, annotations, str(since), time.time())


def _texts(value: object, place: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise BadNotification(f"{place}: expected texts by name")
    if any(0xD800 <= ord(sign) < 0xE000 for pair in value.items() for text in pair for sign in text[:TEXT_MAX]):
        raise BadNotification(f"{place}: expected Unicode")
    return {name: text[:TEXT_MAX] for name, text in value.items()}
