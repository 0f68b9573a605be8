"""What the leader believes of the store."""

from __future__ import annotations

from corral.control.known import REBUILD, Rebuilt


def test_a_store_that_was_flushed_is_not_believed_before_it_has_been_told() -> None:
    rebuilt = Rebuilt()
    assert rebuilt.whole(None, None, 1.0), "no gateway has ever come"
    assert rebuilt.whole(b"10", b"10", 2.0)
    assert not rebuilt.whole(b"10", None, 3.0), "flushed while it was looked at"
    assert not rebuilt.whole(None, None, 3.5)
    assert not rebuilt.whole(None, b"20", 4.0), "told while it was looked at"
    assert rebuilt.whole(b"20", b"20", 4.5)
    assert not rebuilt.whole(None, None, 10.0)
    assert not rebuilt.whole(None, None, 10.0 + REBUILD - 0.1)
    assert rebuilt.whole(None, None, 10.0 + REBUILD), "no gateway is left that could tell it"
