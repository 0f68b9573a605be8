"""Which models another node can go on with: each model's file is tried once, when it is in memory somewhere.

An answer is written, then gone on with from several places as a gateway would do it after a node was lost
(`corral.wire.continuation`). It passes if every one ends as the undisturbed one did. Only such models are continued: a
template that says more than a prompt, a thinking model or parameters that bound answers could make it wrong unseen.

What was found is kept in the database: a control that starts, or takes over, goes by it, though no node has room for a
test.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import httpx
import msgspec

from corral import __version__
from corral.control.canary import stays
from corral.control.prober import Fleet, Member
from corral.fleet.catalogue import digest_of
from corral.fleet.node import canonical_name
from corral.store import answers, verdicts
from corral.store.asking import http_client
from corral.store.database import Database
from corral.store.verdicts import Verdict, fit
from corral.wire.continuation import GENERATE, Counting, Rendering, rest_of
from corral.wire.errors import UpstreamNonsense
from corral.wire.options import NO_POLICY, ModelPolicy, check

TICK = 1.0
SHARED = 5.0
"""The pause between two looks at what other controls found (seconds): seldom is there anything."""
AGAIN = 600.0
"""Seconds after which a file that did not pass is tried again: batches of others can change a greedy answer."""
PATIENCE = 60.0
TOKENS = 24
CUTS = (1, TOKENS // 2, TOKENS - 1)
TEXT = "Name the months of the year in order, each with its number of days."
PASSED = "passed"
SHOW = "/api/show"
Post = Callable[[str, Mapping[str, Any]], Awaitable[bytes]]
"""Posts a body to a path of a node: the body of its answer. Raises what `examine` does."""

log = logging.getLogger(__name__)


class Unfit(Exception):
    """Answers of this model cannot be continued; says why."""


class SelfTest:
    """Tries what has not been tried. ``verdicts`` are by digest; `on_change` hears which models passed.

    ``streams`` tells how many requests run on a node, None where nobody knows: a node that is full is left alone.
    ``judges``: whether it is this control that tries files; the others go by what it found.
    """

    def __init__(
        self,
        fleet: Fleet,
        policies: Mapping[str, ModelPolicy],
        streams: Callable[[str], Awaitable[int | None]],
        on_change: Callable[[dict[str, str]], None],
        database: Database,
        judges: Callable[[], bool],
    ) -> None:
        self._fleet, self._policies, self._streams, self._on_change = fleet, policies, streams, on_change
        self._database, self._judges = database, judges
        self.verdicts: dict[str, Verdict] = {}
        self._unsaved: dict[str, Verdict] = {}
        self._fresh = asyncio.Event()

    async def load(self) -> None:
        """Read what was found before, and tell of it."""
        self.verdicts.update(await self._database.read(verdicts.read))
        self._on_change(self.continuable())

    async def run(self) -> None:
        """Try until cancelled, one model at a time."""
        async with http_client(PATIENCE) as client:
            while True:
                await asyncio.sleep(TICK)
                for member, entry in self._due(time.time()) if self._judges() else ():
                    await self._try(client, member, entry)
                self._on_change(self.continuable())

    async def share(self) -> None:
        """Keep what is found in the database, and read what other controls find, until cancelled."""
        silent = False
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(SHARED):
                    await self._fresh.wait()
            self._fresh.clear()
            try:
                await self.exchange()
                silent = False
            except Exception as error:  # whatever it is: what is known holds meanwhile
                if not silent:
                    log.warning("which models are continued is not shared with other controls: %s", error)
                silent = True

    async def exchange(self) -> None:
        """Do so once. Raises what the database does."""
        if fresh := dict(self._unsaved):
            nodes = self._fleet.members.values()
            held = {_digest(entry) for node in nodes for entry in (*node.tags, *node.ps)}
            await self._database.write(verdicts.enter, fresh, held, time.time())
            self._unsaved = {digest: one for digest, one in self._unsaved.items() if fresh.get(digest) is not one}
        self.verdicts.update(await self._database.read(verdicts.read))
        self.verdicts.update(self._unsaved)
        self._on_change(self.continuable())

    def continuable(self) -> dict[str, str]:
        """The digest of each model, by name, that passed; where nodes differ, of one of them."""
        return {
            entry["name"]: str(entry["digest"])
            for member in self._fleet.members.values()
            for entry in member.usable
            if self.said(str(entry.get("digest") or "")) == PASSED
        }

    def said(self, digest: str) -> str | None:
        """What is known of a file; None before it was tried."""
        verdict = self.verdicts.get(digest_of(digest)) if digest else None
        return verdict.said if verdict is not None else None

    def _due(self, now: float) -> list[tuple[Member, dict[str, Any]]]:
        found: dict[str, tuple[Member, dict[str, Any]]] = {}
        current = {_versions(member) for member in self._fleet.members.values() if member.up}
        for member in self._fleet.members.values():
            for entry in member.ps if member.up else ():
                residence = member.measured.residents.get(entry["name"])
                if residence is not None and residence.failing:
                    continue  # its runner hangs: the test would only keep a slot of it
                digest = _digest(entry)
                known = self.verdicts.get(digest)
                # Of other versions it holds until it is tried anew: a fleet that is full has no room for that.
                if known is None or known.versions not in current or _again(known, now):
                    found.setdefault(digest, (member, entry))
        return list(found.values())

    async def _try(self, client: httpx.AsyncClient, member: Member, entry: Mapping[str, Any]) -> None:
        running = await self._streams(member.name)
        if running is not None and running >= member.slots:
            return
        name = canonical_name(entry["name"])
        digest, versions = _digest(entry), _versions(member)
        options = check({}, self._policies.get(name, NO_POLICY)) | {"temperature": 0.0, "num_predict": TOKENS}
        kept = {"model": entry["name"], "options": options}

        async def post(path: str, body: Mapping[str, Any]) -> bytes:
            async with member.loads:
                if path == SHOW:
                    return await _post(client, member.url + path, body)
                # As long as it is to stay now: somebody may have said something else since the last request.
                for now in await answers.resident(client, member.url, entry["name"], PATIENCE):
                    if now.get("digest") == entry.get("digest"):
                        stay = {"keep_alive": stays(now.get("expires_at"), time.time())}
                        return await _post(client, member.url + path, {**body, **stay})
                raise ValueError("it is not in memory any more")

        try:
            async with asyncio.timeout(PATIENCE):
                await examine(post, kept)
        except (Unfit, UpstreamNonsense) as reason:
            self._found(digest, str(reason), versions)
            log.info("%s: an answer that is cut is not continued: %s", name, reason)
        except (httpx.HTTPError, TimeoutError, ValueError, KeyError) as error:
            log.info("%s on %s: whether its answers can be continued is not known: %r", name, member.name, error)
        else:
            self._found(digest, PASSED, versions)
            log.info("%s: an answer that is cut is continued on another node", name)

    def _found(self, digest: str, said: str, versions: str) -> None:
        self.verdicts[digest] = self._unsaved[digest] = Verdict(fit(said), time.time(), versions)
        self._fresh.set()


def _again(known: Verdict, now: float) -> bool:
    return known.said != PASSED and not 0 <= now - known.at <= AGAIN  # a clock may have been set back


def _digest(entry: Mapping[str, Any]) -> str:
    return digest_of(str(entry.get("digest") or ""))


def _versions(member: Member) -> str:
    return fit(f"{__version__} {member.version}", 80)


async def examine(post: Post, kept: Mapping[str, Any]) -> None:
    """Write and continue a chat and a completion by `post`; `kept` are the fields of every body.

    Raises:
        Unfit: an answer was not continued to the same end, or could not be.
        UpstreamNonsense: the node does not render prompts, or not as Ollama does.
        httpx.HTTPError, ValueError: the node did not answer as one.
    """
    shown = answers.value(await post(SHOW, {"model": kept["model"]}))
    if "num_predict" in str(shown.get("parameters") or ""):
        raise Unfit("its own parameters bound every answer (num_predict)")
    chat = {**kept, "messages": [{"role": "user", "content": TEXT}]}
    for route, body in (("/api/chat", chat), ("/api/generate", {**kept, "prompt": TEXT})):
        pieces = await _pieces(post, route, body)
        if len(pieces) < len(CUTS):
            raise Unfit(f"{route}: an answer of {len(pieces)} lines shows nothing")
        for cut in sorted({min(cut, len(pieces) - 1) for cut in CUTS}):
            sent = "".join(pieces[:cut])
            rest = rest_of(msgspec.json.encode(body), sent, cut)
            assert rest is not None
            rendering = Rendering(0)
            rendering.feed(await post(route, msgspec.json.decode(rest.rendering)))
            rendering.finish()
            counts = []
            for text in (rendering.prompt, rendering.prompt + sent):
                counting = Counting(0)
                counting.feed(await post(GENERATE.decode(), msgspec.json.decode(rest.count(text))))
                counting.finish()
                counts.append(counting.found)
            again = msgspec.json.decode(rest.counted(counts[0], counts[1]).request(rendering.prompt))
            if "".join(await _pieces(post, GENERATE.decode(), again)) != "".join(pieces[cut:]):
                raise Unfit(f"{route}: cut after {cut} lines it went on otherwise")


async def _post(client: httpx.AsyncClient, url: str, body: object) -> bytes:
    status, content = await answers.fetch(client, "POST", url, body)
    if status in (400, 404, 501):
        raise Unfit(answers.shown(content))
    if status != 200:
        raise ValueError(f"status {status}: {answers.shown(content)}")
    return content


async def _pieces(post: Post, path: str, body: Mapping[str, Any]) -> list[str]:
    pieces: list[str] = []
    for line in (await post(path, {**body, "stream": True})).splitlines():
        value = answers.value(line)
        if value.get("error"):
            raise ValueError(str(value["error"]))
        part = value.get("message", value)
        if not isinstance(part, dict) or part.get("thinking") or part.get("tool_calls"):
            raise Unfit("its answers are more than text")
        said = part.get("content") if "message" in value else part.get("response")
        if isinstance(said, str) and said:
            pieces.append(said)
    return pieces
