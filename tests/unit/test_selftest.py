"""Which models control tries to continue answers of."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from corral.control.measured import Residence
from corral.control.prober import Member
from corral.control.selftest import CUTS, PASSED, TOKENS, SelfTest
from corral.node import app
from corral.node.main import build


def made_for(fleet: Any) -> SelfTest:
    async def nobody(name: str) -> int | None:
        return None

    database: Any = None
    return SelfTest(fleet, {}, nobody, lambda known: None, database, lambda: True)


def test_a_runner_that_hangs_is_not_tried() -> None:
    entry = {"name": "m:latest", "digest": "sha256:" + "1" * 64}
    member = Member("n", "http://n", up=True, ps=[entry])
    residence = member.measured.residents["m:latest"] = Residence(since=0.0, fresh=False, failing=True)
    fleet: Any = SimpleNamespace(members={"n": member})
    made = made_for(fleet)
    assert made._due(0.0) == []
    residence.failing = False
    assert made._due(0.0) == [(member, entry)]


def test_a_model_stays_no_longer_than_was_said_meanwhile() -> None:
    """Somebody who asks the node itself has it kept for a minute: what comes after that does not make it an hour."""
    entry = {"name": "m:latest", "model": "m:latest", "size": 1, "digest": "sha256:" + "1" * 64}
    until, seen = [time.time() + 3600], list[float]()

    def there() -> dict[str, Any]:
        return entry | {"expires_at": datetime.fromtimestamp(until[0], UTC).isoformat()}

    def said(*lines: dict[str, Any]) -> httpx.Response:
        content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        return httpx.Response(200, stream=httpx.ByteStream(content))

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/api/ps":
            return said({"models": [there()]})
        if request.url.path == "/api/show":
            return said({"parameters": ""})
        body = json.loads(request.content)
        seen.append(float(body["keep_alive"].removesuffix("s")))
        until[0] = time.time() + 60
        if "_debug_render_only" in body:
            return said({"_debug_info": {"rendered_template": "prompt"}})
        if not body["stream"]:
            return said({"response": "a", "done": True, "prompt_eval_count": 3})
        lines = [{"message": {"content": "a"}}] * 4 if "messages" in body else [{"response": "a"}] * 4
        return said(*lines)

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            made = made_for(SimpleNamespace())
            await made._try(client, Member("n", "http://n", up=True), there())

    asyncio.run(run())
    assert seen[0] > 3500 and len(seen) > 2
    assert all(55 < stays <= 60 for stays in seen[1:])


def test_a_node_that_renders_no_prompt_does_not_end_the_tests_of_others() -> None:
    """An older Ollama takes no notice of what asks for the prompt, and streams."""

    def said(*lines: dict[str, Any]) -> httpx.Response:
        content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        return httpx.Response(200, stream=httpx.ByteStream(content))

    entry = {"name": "m:latest", "model": "m:latest", "size": 1, "digest": "sha256:" + "1" * 64}
    entry["expires_at"] = datetime.fromtimestamp(time.time() + 3600, UTC).isoformat()

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/api/ps":
            return said({"models": [entry]})
        if request.url.path == "/api/show":
            return said({"parameters": ""})
        return said(*[{"message": {"content": "a"}}] * 4)

    async def run() -> SelfTest:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            made = made_for(SimpleNamespace())
            await made._try(client, Member("n", "http://n", up=True), entry)
            return made

    (verdict,) = asyncio.run(run()).verdicts.values()
    assert "no object" in str(verdict) or "no rendered" in str(verdict)


class Beside(httpx.AsyncBaseTransport):
    """To a node that has read a word more than the prompt it shows, whenever it goes on behind so many lines."""

    def __init__(self, node: httpx.ASGITransport, behind: int) -> None:
        self._node, self._behind = node, behind

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else {}
        if body.get("raw") and body["stream"] and body["options"]["num_predict"] == TOKENS - self._behind:
            body["prompt"] = f"so {body['prompt']}"
            request = httpx.Request("POST", request.url, json=body)
        return await self._node.handle_async_request(request)


@pytest.mark.parametrize("behind", [None, *CUTS])
def test_a_model_that_goes_on_otherwise_is_not_continued(behind: int | None) -> None:
    """A simulated node: its text depends on all that it has read, to the last word."""
    simulation = {"models": [{"name": "m", "load": 0.0, "prefill": 1e9, "decode": 1e9}]}

    async def run() -> tuple[SelfTest, dict[str, Any]]:
        node = httpx.ASGITransport(app.create(build("simulated", None, None, 1, 1, simulation, False)))
        async with httpx.AsyncClient(transport=node if behind is None else Beside(node, behind)) as client:
            await client.post("http://n/api/generate", json={"model": "m", "keep_alive": -1})
            (entry,) = (await client.get("http://n/api/ps")).json()["models"]
            tags = (await client.get("http://n/api/tags")).json()["models"]
            member = Member("n", "http://n", up=True, ps=[entry], tags=tags)
            fleet: Any = SimpleNamespace(members={"n": member})
            made = made_for(fleet)
            await made._try(client, member, entry)
            return made, entry

    made, entry = asyncio.run(run())
    if behind is None:
        assert made.said(entry["digest"]) == PASSED
        assert made.continuable() == {"m:latest": entry["digest"]}
    else:
        assert made.said(entry["digest"]) == f"/api/chat: cut after {behind} lines it went on otherwise"
        assert made.continuable() == {}
