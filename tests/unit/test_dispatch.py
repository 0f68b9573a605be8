"""Where a request prefers to run, and how fast nodes are."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from types import ModuleType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.native import load

from corral.fleet import dispatch
from corral.fleet.dispatch import BLOCK, CHAIN_MAX, LEAST, Affinity, Speeds, beginnings, chain, messages, salt
from corral.wire.common import encode


def turns(*texts: str) -> list[int]:
    """A conversation's beginnings, as a node is sent it."""
    said = [{"role": "user", "content": text} for text in texts]
    body = encode({"model": "m", "messages": said, "options": {"num_predict": len(texts)}})
    return chain("t", "m", messages(body), 0)


def test_the_next_turn_of_a_conversation_prefers_the_node_of_the_last() -> None:
    affinity = Affinity()
    first = ['You are a "horse" [{"role": "x"}].', "Hello"]
    affinity.note(turns(*first), "n1")
    affinity.note(turns(first[0], "Other"), "n2")
    assert affinity.preferred(turns(*first, "Hi!", "And now?")) == ("n1", "n2")
    assert affinity.preferred(turns(first[0], "New")) == ("n2",), "the same tenant's beginning"
    assert affinity.preferred(turns("Something", "else")) == ()


@given(st.lists(st.sampled_from([b"}", b"]", b"}]", b"a"]), max_size=60).map(b"".join))
def test_the_last_message_ends_where_the_list_does(text: bytes) -> None:
    assert messages(b'{"role":' + text) == [text.partition(b"}]")[0] + b"},"]


def test_no_preference_tells_of_another_tenant_or_model() -> None:
    affinity = Affinity()
    affinity.note(chain("t", "m", [b"secret"], 0), "n1")
    assert affinity.preferred(chain("u", "m", [b"secret"], 0)) == ()
    assert affinity.preferred(chain("t", "n", [b"secret"], 0)) == ()


def test_messages_are_told_apart_where_they_end() -> None:
    assert turns("ab", "c")[-1] != turns("a", "bc")[-1]


def test_a_long_text_has_more_than_one_beginning_and_not_too_many() -> None:
    text = b"x" * BLOCK * 3
    assert chain("t", "m", [text + b"a"])[:3] == chain("t", "m", [text + b"b"])[:3]
    assert len(chain("t", "m", [b"x" * BLOCK * 1000])) == CHAIN_MAX


def test_what_is_read_in_no_time_is_not_looked_for() -> None:
    assert chain("t", "m", [b"x" * (LEAST - 1)]) == []
    assert len(chain("t", "m", [b"x" * LEAST, b"y"])) == 2


def test_what_is_remembered_is_bounded_and_what_a_node_forgot_is_forgotten() -> None:
    affinity = Affinity(limit=4)
    for value in range(10):
        affinity.note([value], f"n{value}")
    affinity.note([6], "n0")
    assert affinity.preferred(list(range(10))) == ("n9", "n8", "n7")
    affinity.forget("n9")
    assert affinity.preferred(list(range(10))) == ("n8", "n7", "n0")


def test_speeds_are_means_of_streams_that_are_long_enough() -> None:
    speeds = Speeds()
    speeds.note("n1", "m", 5, 1.0)
    assert speeds.of("n1", "m") == 0.0
    speeds.note("n1", "m", 60, 1.0)
    speeds.note("n1", "m", 160, 2.0)
    speeds.note("n2", "m", 20, 1.0)
    assert speeds.of("n1", "m") == 62.0
    assert speeds.best() == {"m": 62.0}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    return load("fleet/_beginnings.c", tmp_path_factory.mktemp("beginnings"))


PIECES = (
    *(b'{"role":', b"}]", b"},", b"}", b"]", b'{"role"', b"a", b"\0", b"x" * (BLOCK - 1), b"y" * BLOCK),
    b"z" * (BLOCK * CHAIN_MAX),
)


@given(st.lists(st.sampled_from(PIECES), max_size=20).map(b"".join), st.sampled_from([0, 1, LEAST, BLOCK]))
@example(b"", 0)
@example(b'{"role":', 0)
@example(b'{"role":' + b"x" * (BLOCK - 1) + b"}]", 0)
@example(b'{"role":' + b"x" * BLOCK + b"}]", 0)
def test_what_is_written_in_c_finds_the_same_beginnings(native: ModuleType, body: bytes, least: int) -> None:
    expected = chain("t", "m", messages(body), least)
    assert native.beginnings(salt("t", "m"), body, least) == expected
    if least == LEAST:
        assert beginnings("t", "m", body) == expected


def test_what_is_compiled_is_used() -> None:
    assert (dispatch._C is not None) == (find_spec("corral.fleet._beginnings") is not None)


def test_no_bytes_are_refused(native: ModuleType) -> None:
    for arguments in ((1, "text", 0), (1, b"text"), ("1", b"text", 0), (1, b"text", "0")):
        with pytest.raises(TypeError):
            native.beginnings(*arguments)
    with pytest.raises(OverflowError):
        native.beginnings(-1, b"text", 0)
