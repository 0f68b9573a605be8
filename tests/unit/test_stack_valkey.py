"""Which Valkey `corral up` uses."""

from __future__ import annotations

from typing import Any

import pytest
from support.process import free_port

from corral.config.settings import Settings
from corral.stack.plan import _valkey


@pytest.mark.parametrize(
    ("store", "own"),
    [
        ({}, True),
        ({"valkey": "redis://127.0.0.1:{port}/0"}, True),
        ({"valkey": "redis://:secret@127.0.0.1:{port}/0"}, False),
        ({"valkey": "redis://127.0.0.1:{port}/0", "valkey_password_file": "/secrets/valkey"}, False),
        ({"valkey": "redis://elsewhere:{port}/0"}, False),
    ],
)
def test_one_with_a_password_is_somebody_s(store: dict[str, Any], own: bool) -> None:
    port = free_port()
    given = Settings.model_validate({"store": {name: value.format(port=port) for name, value in store.items()}})
    assert _valkey(given, free_port())[0] is own
