"""The keyed hashes of prompts and answers, and how an answer's text is hashed as it passes."""

from __future__ import annotations

import _hashlib
import hmac
import json
import shutil
from hashlib import sha256
from importlib.util import find_spec
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.native import load

from corral.store import content
from corral.store.content import Hashes, Keyed
from corral.wire.transcript import TEXT_MAX, TOGETHER, Transcript


def line(text: str, **more: object) -> bytes:
    return json.dumps({"model": "m", "message": {"role": "assistant", "content": text, **more}}).encode() + b"\n"


def test_a_keyed_hash_is_hmac_of_the_digest() -> None:
    for key in (b"k", bytes(range(32)), bytes(64)):
        for text in (b"", b"Guten Tag!"):
            digest = sha256(text).digest()
            assert Keyed(key).of(digest) == hmac.digest(key, digest, "sha256").hex()
            assert Keyed(key).of(digest) == Keyed(key).of(digest)


def test_prompts_and_answers_and_installations_have_keys_of_their_own() -> None:
    digest = sha256(b"the same text").digest()
    one, other = Hashes(bytes(32)), Hashes(b"\1" * 32)
    made = {keyed.of(digest) for keyed in (one.prompt, one.answer, other.prompt, other.answer)}
    assert len(made) == 4 and digest.hex() not in made
    # By RFC 5869, step 2: these values hold for what is in the records of older versions, too.
    assert (
        one.prompt.of(digest)
        == hmac.digest(hmac.digest(bytes(32), b"corral audit prompt\x01", "sha256"), digest, "sha256").hex()
    )


def test_the_text_is_hashed_whatever_the_cuts_and_however_long_it_is() -> None:
    words = [f"wörd {number} " for number in range(3 * TOGETHER + 5)]
    data = b"".join(line(word) for word in words)
    for size in (7, 1000, len(data)):
        said = Transcript(True, keep=False, hashed=True)
        for start in range(0, len(data), size):
            said.add(data[start : start + size])
        assert said.digest() == sha256("".join(words).encode()).digest()
        assert said.text == "" and not said.close(), "nothing is kept that nobody wants"
    long = Transcript(True, hashed=True)
    for _ in range(3):
        long.add(line("x" * TEXT_MAX))
    assert long.digest() == sha256(b"x" * 3 * TEXT_MAX).digest()
    assert not long.close()


def test_thinking_and_tools_are_no_part_of_the_text() -> None:
    said = Transcript(True, hashed=True)
    said.add(line("", thinking="hm") + line("yes", tool_calls=[{"function": {"name": "f"}}]) + line("!"))
    said.add(b'{"model":"m","message":null,"done":true}\n{"cut')
    assert said.digest() == sha256(b"yes!").digest()
    said.add(b'": 5}}\n')
    assert said.digest() is None, "it is not known what was said"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    made = load("store/_keyed.c", tmp_path_factory.mktemp("keyed"))
    assert made.use(_hashlib.__file__)
    return made


@given(st.binary(max_size=64), st.binary(max_size=300))
def test_what_is_written_in_c_gives_the_same_hashes(native: ModuleType, key: bytes, text: bytes) -> None:
    digest = sha256(text).digest()
    expected = hmac.digest(key, digest, "sha256").hex()
    halves = native.halves(key)
    assert native.of_text(halves, text) == native.of_digest(halves, digest) == expected
    assert native.of_text(halves, text) == expected, "a half is used more than once"
    assert Keyed(key).of_text(text) == expected


def test_a_long_text_is_hashed_whole(native: ModuleType) -> None:
    text = bytes(range(256)) * 40_000
    assert native.of_text(native.halves(b"k"), text) == hmac.digest(b"k", sha256(text).digest(), "sha256").hex()


def test_what_is_no_half_no_digest_and_no_bytes_is_refused(native: ModuleType) -> None:
    halves = native.halves(b"k")
    for call in (
        lambda: native.of_text(b"", b"text"),
        lambda: native.of_text(halves[:-1], b"text"),
        lambda: native.of_digest(halves, b"short"),
        lambda: native.halves(b"k" * 65),
    ):
        with pytest.raises(ValueError):
            call()
    for call in (
        lambda: native.of_text(halves, "text"),
        lambda: native.of_text(halves),
        lambda: native.of_text(halves, b"text", b"more"),
        lambda: native.halves("k"),
        lambda: native.use(b"path"),
    ):
        with pytest.raises(TypeError):
            call()


def test_what_is_compiled_is_used() -> None:
    assert (content._C is not None) == (find_spec("corral.store._keyed") is not None)


def test_a_library_that_is_not_there_or_has_nothing_of_it_is_not_used(native: ModuleType) -> None:
    assert not native.use("/nowhere/_hashlib.so")
    assert native.use(_hashlib.__file__), "and what was found before serves"
