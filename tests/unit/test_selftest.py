"""Which models control tries to continue answers of."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import httpx

from corral.control.measured import Residence
from corral.control.prober import Member
from corral.control.selftest import SelfTest


def test_a_runner_that_hangs_is_not_tried() -> None:
    entry = {"name": "m:latest", "digest": "sha256:" + "1" * 64}
    member = Member("n", "http://n", up=True, ps=[entry])
    residence = member.measured.residents["m:latest"] = Residence(since=0.0, fresh=False, failing=True)
    fleet: Any = SimpleNamespace(members={"n": member})
    made = SelfTest(fleet, {}, lambda name: None, lambda known: None)  # type: ignore[arg-type,return-value]
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

    async def nobody(name: str) -> int | None:
        return None

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            made = SelfTest(SimpleNamespace(), {}, nobody, lambda known: None)  # type: ignore[arg-type]
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

    async def nobody(name: str) -> int | None:
        return None

    async def run() -> SelfTest:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            made = SelfTest(SimpleNamespace(), {}, nobody, lambda known: None)  # type: ignore[arg-type]
            await made._try(client, Member("n", "http://n", up=True), entry)
            return made

    (verdict,) = asyncio.run(run()).verdicts.values()
    assert "no JSON" in str(verdict) or "no rendered" in str(verdict)
