"""The keyed hashes of prompts and answers, and how an answer's text is hashed as it passes."""

from __future__ import annotations

import hmac
import json
from hashlib import sha256

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
