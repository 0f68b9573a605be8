"""When a store that is away may admit again, as who is denied for want of it is told."""

from __future__ import annotations

from corral.store.share import back_in
from corral.store.sharing import Sharing
from corral.store.valkey import Valkey

NOW = 10_000.0


def test_it_is_told_what_it_forgot_or_its_connection_is_tried_again() -> None:
    store, sharing = Valkey("redis://127.0.0.1:1/0"), Sharing("gateway-1")
    store.connected, sharing.forgot = True, NOW - 0.5
    assert back_in(store, sharing, NOW) == 2.5, "it is told within three seconds"
    sharing.forgot = 0.0
    assert back_in(store, sharing, NOW) == 3.0, "it refuses"
    store.connected, store.due = False, NOW + 0.5
    assert back_in(store, sharing, NOW) == 0.5, "the next try of a connection"
    store.due = NOW - 1.0
    assert (back_in(store, sharing, NOW), back_in(None, sharing, NOW)) == (0.0, 0.0)
