"""What fires, as Alertmanager tells it: its webhook's notifications, kept in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

KEPT_MAX = 1000
FORGET = 9 * 3600.0
"""More than twice Alertmanager's repeat_interval: what was not repeated since then does not fire any more."""
TEXT_MAX = 1000
STATUSES = ("firing", "resolved")


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
    """The alerts that fire, KEPT_MAX at most (the newest); ``received`` counts notifications by status."""

    def __init__(self) -> None:
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
        """What fires now, the oldest first."""
        until = time.time() - FORGET
        self._firing = {key: alert for key, alert in self._firing.items() if alert.heard > until}
        return sorted(
            (alert.describe() for alert in self._firing.values()), key=lambda one: (one["since"], one["name"])
        )


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
    return {name: text[:TEXT_MAX] for name, text in value.items()}
