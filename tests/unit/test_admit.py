"""How long a request may take, by what its caller says."""

from __future__ import annotations

import pytest

from corral.gateway.admit import DEADLINE, _said, duration
from corral.wire.errors import ApiError


@pytest.mark.parametrize(
    ("said", "seconds"), [(b"1500", 1.5), (b"1800001", 1800.0), (b"9" * 400, 1800.0), (b"9" * 4000, 1800.0)]
)
def test_a_deadline_of_any_length_is_one(said: bytes, seconds: float) -> None:
    assert duration({DEADLINE: said}, 1800.0) == seconds


@pytest.mark.parametrize(
    ("said", "status"),
    [
        *((said, 400) for said in (b"nan", b"1e3", b"", b"9" * 5000, b"1_000", b"+7", b"--1", b"-")),
        *((b"0", 503), (b"-1", 503)),
    ],
)
def test_what_is_no_deadline_or_past(said: bytes, status: int) -> None:
    with pytest.raises(ApiError) as refused:
        duration({DEADLINE: said}, 1800.0)
    assert refused.value.status == status


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (1, "1 s"), (120, "120 s"), (121, "3 min"), (180, "3 min"), (3599, "1 h 0 min"), (3600, "1 h 0 min"),
        (43_201, "12 h 1 min"),
    ],
)  # fmt: skip
def test_a_wait_is_said_for_a_person_and_never_less_than_it_is(seconds: int, said: str) -> None:
    assert _said(seconds) == said
