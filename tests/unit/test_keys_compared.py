"""A key's verifier is HMAC-SHA256, and a text is compared with each that its key has, in constant time: none is left
out once one has matched."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import defaultdict
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import pytest

from corral.control.auth import Gate
from corral.control.errors import Problem
from corral.gateway.authenticate import authenticate, build_key
from corral.store import keys
from corral.wire.errors import ApiError

PEPPER = b"p" * keys.PEPPER_BYTES
KEY_ID, RIGHT = keys.generate()
OTHER, WRONG = keys.secret_for(KEY_ID), keys.secret_for(KEY_ID)
VERIFIERS = [keys.verifier(PEPPER, text) for text in (RIGHT, OTHER)]
compare = hmac.compare_digest


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `hmac.compare_digest` was asked for, in hexadecimal digits: verifier and text's own."""
    asked = list[str]()

    def spy(one: Any, other: Any) -> bool:
        asked.extend(each if isinstance(each, str) else each.hex() for each in (one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    return asked


def test_a_verifier_is_hmac_sha256_of_the_whole_key() -> None:
    """By RFC 2104 itself: the pepper is shorter than a block of SHA-256, so it is filled up with zeros."""
    inner, outer = (bytes(byte ^ pad for byte in PEPPER.ljust(64, b"\0")) for pad in (0x36, 0x5C))
    assert keys.verifier(PEPPER, RIGHT) == sha256(outer + sha256(inner + RIGHT.encode()).digest()).hexdigest()


def all_of(text: str) -> list[str]:
    """Each verifier, with what the text comes to."""
    proof = keys.verifier(PEPPER, text)
    return [VERIFIERS[0], proof, VERIFIERS[1], proof]


@pytest.mark.parametrize("text", [RIGHT, OTHER, WRONG], ids=["first", "last", "none"])
def test_a_gateway_compares_with_each(compared: list[str], text: str) -> None:
    known = {KEY_ID: build_key({"id": KEY_ID, "verifiers": VERIFIERS}, {})}
    headers = {b"authorization": f"Bearer {text}".encode()}
    if text == WRONG:
        with pytest.raises(ApiError, match="unknown"):
            authenticate(headers, known, PEPPER, time.time(), {})
    else:
        assert authenticate(headers, known, PEPPER, time.time(), {}).id == KEY_ID
    assert compared == all_of(text)


@pytest.mark.parametrize("text", [RIGHT, OTHER, WRONG], ids=["first", "last", "none"])
def test_control_compares_with_each(compared: list[str], text: str) -> None:
    row = defaultdict[str, Any](lambda: None, id=KEY_ID, role="admin", tenant="default", models=["*"])

    async def read(*_: object) -> Any:
        return row, [(verifier, None) for verifier in VERIFIERS]

    settings = SimpleNamespace(gateway=SimpleNamespace(trusted_proxies=[]))
    control: Any = SimpleNamespace(settings=settings, pepper=PEPPER, database=SimpleNamespace(read=read))
    unused: Any = None
    used = list[str]()
    checked = Gate(unused, control, unused, used.append)._authenticate(text, "127.0.0.1")
    if text == WRONG:
        with pytest.raises(Problem, match="unknown"):
            asyncio.run(checked)
    else:
        assert asyncio.run(checked)[0] == KEY_ID
    assert compared == all_of(text)
    assert used == ([] if text == WRONG else [KEY_ID])
