"""What the parts of control share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from fastapi import Depends, Request

from corral.config.settings import Settings
from corral.control.alerts import Alerts
from corral.control.catalogue import Catalogue
from corral.control.haproxy import HaproxyReloader
from corral.control.leading import Leading
from corral.control.ledger import Ledger
from corral.control.prober import Fleet
from corral.control.questions import Questions
from corral.control.selftest import SelfTest
from corral.control.snapshot import Hub
from corral.control.spent import Spent
from corral.control.usage import Usage
from corral.store.content import Hashes
from corral.store.database import Database
from corral.store.valkey import Valkey

if TYPE_CHECKING:
    # These need who calls, and that needs this.
    from corral.control.operations import Operations
    from corral.control.preload import Preloader


@dataclass(frozen=True)
class Control:
    """One control process. ``token`` is the bearer of /internal."""

    settings: Settings
    state: Path
    database: Database
    pepper: bytes
    token: str
    fleet: Fleet
    hub: Hub
    haproxy: HaproxyReloader
    valkey: Valkey
    catalogue: Catalogue
    operations: Operations
    selftest: SelfTest
    preloader: Preloader
    usage: Usage
    ledger: Ledger
    spent: Spent
    leading: Leading
    hashes: Hashes
    alerts: Alerts
    questions: Questions


def _control(request: Request) -> Control:
    return cast(Control, request.app.state.control)


Here = Annotated[Control, Depends(_control)]
