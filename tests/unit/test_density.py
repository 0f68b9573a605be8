"""What a key's prompts taught about the guess of the next one's tokens."""

from __future__ import annotations

from typing import Any

from corral.gateway.admit import reserve
from corral.gateway.settle import learn
from corral.gateway.snapshot import Snapshot
from corral.wire.decode import DECODERS

LIMITS = {"rpm": None, "tpm": None, "concurrency": None, "daily_tokens": None, "monthly_tokens": None}


def decoded() -> Any:
    body = b'{"model": "m", "prompt": "%b", "options": {"num_predict": 7}}' % (b"a" * 4000)
    return DECODERS["/api/generate"](body, "r", lambda name: None)


def test_a_guess_grows_to_what_is_counted_and_is_never_less_than_the_first() -> None:
    density = 1.0
    for _ in range(12):
        density = learn(density, 100, 260)
    assert 2.5 < density < 2.6
    for _ in range(12):
        density = learn(density, 100, 5)
    assert density == 1.0
    for _ in range(50):
        density = learn(density, 1, 10**9)
    assert 3.9 < density <= 4.0


def test_a_reservation_is_made_by_it() -> None:
    request = decoded()
    assert reserve(request, 100) == request.estimate + 7
    assert reserve(request, 100, 2.0) == request.estimate * 2 + 7
    assert reserve(None, 100, 2.0) == 0


def test_a_new_snapshot_does_not_forget_it() -> None:
    snapshot = Snapshot(LIMITS)
    entry = {"id": "k", "tenant": "t", "verifiers": [], "models": ["*"], **LIMITS}
    snapshot.apply({"version": "1", "keys": [entry], "nodes": []})
    snapshot.keys["k"].density = 1.5
    snapshot.apply({"version": "2", "keys": [entry | {"rpm": 5}], "nodes": []})
    assert snapshot.keys["k"].density == 1.5
