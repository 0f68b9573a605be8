"""Hypothesis for a time in place of a number of examples: CORRAL_FUZZ_SECONDS for all targets together, two minutes."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

TARGETS = 7
"""The admin API counts for two."""
SECONDS = float(os.environ.get("CORRAL_FUZZ_SECONDS", "120"))
PUNCTUATION = (b'"', b"{", b"}", b"[", b"]", b",", b":")
"""What JSON is made of, for edits of it."""

_PHASES = (Phase.explicit, Phase.generate, Phase.target, Phase.shrink)


def fuzz(check: Callable[..., None], *strategies: st.SearchStrategy[Any], share: float = 1 / TARGETS) -> int:
    """Call `check` with what the strategies make until its share of the time is over; how many examples it had.

    A failure is shrunk and raised with the seed that makes it again; put it into a test of its own.
    """
    deadline = time.monotonic() + SECONDS * share
    examples = 0

    def counted(values: tuple[Any, ...]) -> None:
        nonlocal examples
        examples += 1
        check(*values)

    while True:
        number = random.SystemRandom().getrandbits(48)
        run = given(st.tuples(*strategies))(lambda values: counted(values))
        rules = settings(
            max_examples=200, deadline=None, database=None, phases=_PHASES, suppress_health_check=list(HealthCheck)
        )
        try:
            seed(number)(rules(run))()
        except BaseException as error:
            error.add_note(f"seed {number}")
            raise
        if time.monotonic() > deadline:
            return examples


def cuts(data: bytes, places: Sequence[int]) -> list[bytes]:
    """`data` in pieces, cut at places modulo its length; none of them empty."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in pairwise(edges)]


def mutated(data: bytes, changes: Sequence[tuple[int, int, bytes]]) -> bytes:
    """`data` with pieces put in the place of others: (where, how many bytes go, what comes)."""
    for where, gone, put in changes:
        start = where % (len(data) + 1)
        data = data[:start] + put + data[start + gone :]
    return data


PLACES = st.lists(st.integers(0, 1 << 16), max_size=6)


def changes(*tokens: bytes) -> st.SearchStrategy[list[tuple[int, int, bytes]]]:
    """Strategies for `mutated`: tokens that mean something to the reader, and bytes that mean nothing."""
    put = st.one_of(st.sampled_from(tokens), st.binary(max_size=4))
    return st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 6), put), max_size=6)
