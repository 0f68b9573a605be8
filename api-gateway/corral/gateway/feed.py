"""Feeds a gateway's snapshot from control, and keeps it on disk for a cold start; beside it, who shares the limits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec

from corral.gateway.snapshot import POLL, Snapshot
from corral.store.asking import http_client
from corral.store.sharing import Sharing

TOUCH = 10.0
ASKED = "x-corral-asked"
"""The header by which control says that it asks something."""
NOW = "x-corral-now"
"""The header by which control says what time it is there; `AS_OF` gives it back with the next question.

Control may have stood still for long before it takes a question: what that says was true then, not since.
"""
AS_OF = "X-Corral-As-Of"
AGE = "x-corral-age"
"""The header by which control says how long ago (seconds) it saw that its keys are what the database has.

Without its database control answers on, of nodes above all: that confirms no key.
"""
SHARING = "x-corral-gateways"
"""The header by which control names the gateways that it hears."""
ELSEWHERE = "x-corral-store-elsewhere"
"""The header by which control says that of the gateways which it heard just now as many have the store as have not."""
OLDER = 2.0
"""Seconds by which what is confirmed may be older than before. Of two controls one may be without its database."""
ROUNDS = 5

log = logging.getLogger(__name__)


def _nothing(question: dict[str, Any]) -> None:
    """The answer of who has none."""


def _nobody(elsewhere: bool, now: float) -> None:
    """What hears of others' store where that makes no difference."""


def _undated(file: Path) -> None:
    """A file whose age says nothing."""


class Feed:
    """Keeps a snapshot current from control's internal address, and answers what control asks.

    Control says too which gateways it hears: ``sharing`` hears it, and what that holds then is kept for the next start.
    ``tell`` gives more headers for each question, ``answer`` the answer to one of control's, ``others`` hears
    whether other gateways have the store, and when control was asked (monotonic seconds).
    """

    def __init__(
        self,
        snapshot: Snapshot,
        control_url: str,
        token: str,
        gateway: str,
        cache: Path,
        sharing: Sharing,
        tell: Callable[[], dict[str, str]] = dict,
        answer: Callable[[dict[str, Any]], Any] = _nothing,
        others: Callable[[bool, float], None] = _nobody,
    ) -> None:
        self._snapshot = snapshot
        self._file = cache / "snapshot.json"
        self._sharing, self._sharing_file = sharing, cache / "gateways.json"
        self._sharing_kept: list[str] = []
        self._url = f"{control_url}/internal/snapshot"
        self._headers = {"Authorization": f"Bearer {token}", "X-Corral-Gateway": gateway}
        self._tell, self._answer, self._others = tell, answer, others
        self._answers_url = f"{control_url}/internal/requests/{gateway}"
        self._answers: list[dict[str, Any]] = []
        self._wake = asyncio.Event()
        self.due = 0.0
        """When control is asked next (monotonic seconds)."""
        self._touched = 0.0
        self._now = "0"
        self._unkept: bytes | None = None
        """What is in force but not in the file yet: an older file must not be vouched for."""
        self._unkept_logged = False

    def load(self) -> None:
        """Start from the files of an earlier run, where there are some."""
        try:
            self._sharing.heard(msgspec.json.decode(self._sharing_file.read_bytes(), type=list[str]))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            log.warning("%s is not used: %s", self._sharing_file, error)
        try:
            data = msgspec.json.decode(self._file.read_bytes())
            # Its age is all that a wall clock says here: one that is set while this runs ends nothing.
            age = max(0.0, time.time() - self._file.stat().st_mtime)
            self._snapshot.apply(data)
            self._snapshot.confirmed = time.monotonic() - age
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is not used: %s", self._file, error)

    def poke(self) -> None:
        """Control says that something changed: ask now."""
        self._wake.set()

    async def run(self) -> None:
        """Poll until cancelled."""
        silent = told = False
        async with http_client(2.0) as client:
            while True:
                try:
                    changed = await self._poll(client)
                    silent = False
                    # Who made a change waits to hear that it is in force here: the next question says so, at once.
                    told = changed and not told
                    if told:
                        continue
                except (httpx.HTTPError, OSError, ValueError, KeyError, TypeError) as error:
                    if not silent:
                        log.warning("control gives no snapshot, the last one holds: %r", error)
                    silent = True
                except Exception:  # a fault of ours: the gateway goes on with what it has
                    log.exception("the snapshot was not read, the last one holds")
                self.due = time.monotonic() + POLL
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL):
                        await self._wake.wait()
                self._wake.clear()

    async def leave(self) -> None:
        """Tell control that this gateway ends: nobody need wait for it, or wonder whether it heard."""
        with contextlib.suppress(httpx.HTTPError, OSError):
            async with http_client(1.0) as client:
                await self._ask(client, {"X-Corral-Leaving": "1"})

    async def _ask(self, client: httpx.AsyncClient, more: dict[str, str]) -> httpx.Response:
        headers = self._headers | {AS_OF: self._now} | self._tell() | more
        response = await client.get(self._url, params={"since": self._snapshot.version}, headers=headers)
        self._now = response.headers.get(NOW, "0")
        return response

    async def _poll(self, client: httpx.AsyncClient) -> bool:
        now = time.monotonic()  # what is said was true after this, however late it is read
        response = await self._ask(client, {})
        age = float(response.headers.get(AGE, "0"))
        if not 0.0 <= age < math.inf or now - age < self._snapshot.confirmed - OLDER:
            raise ValueError("its keys are older than those in force here")
        if response.status_code == 200:
            self._snapshot.apply(msgspec.json.decode(response.content))
            self._unkept = response.content
        elif response.status_code != 304:
            raise ValueError(f"status {response.status_code}")
        self._snapshot.heard = now
        self._snapshot.confirmed = now - age
        self._others(ELSEWHERE in response.headers, now)
        self._sharing.heard(filter(None, response.headers.get(SHARING, "").split(",")))
        if ASKED in response.headers:
            await self._reply(client)
        if self._unkept is not None or self._sharing.names != self._sharing_kept or now - self._touched > TOUCH:
            self._remember(now)
        return response.status_code == 200

    async def _reply(self, client: httpx.AsyncClient) -> None:
        """Answer what control asks. An answer that it did not take is sent again when it asks the next time."""
        try:
            for _ in range(ROUNDS):
                data = msgspec.json.encode(self._answers)
                response = await client.post(self._answers_url, content=data, headers=self._headers)
                questions = msgspec.json.decode(response.raise_for_status().content)["questions"]
                self._answers = []
                if not questions:
                    return
                self._answers = [{"number": one["number"], "value": self._answer(one)} for one in questions]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            log.warning("control does not take what it asked for: %r", error)

    def _remember(self, now: float) -> None:
        # A disk that takes no file says nothing of control: the snapshot in force stays good.
        try:
            if self._unkept is not None:
                self._keep(self._file, self._unkept, self._date)
                self._unkept = None
            else:
                with contextlib.suppress(FileNotFoundError):
                    self._date(self._file)
            self._touched = now
            # Behind the date, which a full disk takes too.
            if (names := self._sharing.names) != self._sharing_kept:
                self._keep(self._sharing_file, msgspec.json.encode(names))
                self._sharing_kept = names
            self._unkept_logged = False
        except OSError as error:
            if not self._unkept_logged:
                log.error("the snapshot for a cold start is not kept, %s grows old: %s", self._file, error)
            self._unkept_logged = True

    def _keep(self, path: Path, content: bytes, date: Callable[[Path], None] = _undated) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_suffix(".new")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        date(draft)
        draft.replace(path)

    def _date(self, file: Path) -> None:
        """Have a file say when what is in it was confirmed."""
        moment = time.time() - (time.monotonic() - self._snapshot.confirmed)
        os.utime(file, (moment, moment))
