"""What a passphrase opens is age's own format, at a cost that no busy machine changes."""

from __future__ import annotations

import pyrage
import pytest

from corral.backup import passphrase

WORD = "correct horse b\u00e4ttery"


@pytest.fixture(scope="module")
def made() -> bytes:
    return passphrase.encrypt(b"a secret", WORD)


def test_age_opens_it(made: bytes) -> None:
    assert pyrage.passphrase.decrypt(made, WORD) == b"a secret" == passphrase.decrypt(made, WORD)


def test_what_age_made_is_opened_whatever_it_cost() -> None:
    # rage takes what fits the machine as it is just now: that of another, and of another time.
    assert passphrase.decrypt(pyrage.passphrase.encrypt(b"older", WORD), WORD) == b"older"


def test_its_cost_is_the_same_on_every_machine(made: bytes) -> None:
    assert made.split(b"\n")[1].endswith(b" 18")


@pytest.mark.parametrize("cost", [0, 23, 99])
def test_no_cost_beyond_bounds_is_paid(made: bytes, cost: int) -> None:
    with pytest.raises(ValueError, match="of a cost beyond bounds"):
        passphrase.decrypt(made.replace(b" 18\n", b" %d\n" % cost), WORD)


@pytest.mark.parametrize("at", ["salt", "wrapped", "mac", "nonce", "body", "tail"])
def test_what_was_changed_is_not_opened(made: bytes, at: str) -> None:
    head = made.index(b"\n---")
    place = {
        **{"salt": made.index(b"scrypt ") + 9, "wrapped": head - 9, "mac": head + 9},
        **{"nonce": len(made) - 30, "body": len(made) - 20, "tail": len(made) - 1},
    }[at]
    changed = made[:place] + (b"A" if made[place : place + 1] != b"A" else b"B") + made[place + 1 :]
    for wrong, word in ((changed, WORD), (made[:-1], WORD)) if at == "tail" else ((changed, WORD),):
        with pytest.raises(ValueError, match=r"wrong|changed"):
            passphrase.decrypt(wrong, word)


def test_another_passphrase_opens_nothing(made: bytes) -> None:
    with pytest.raises(ValueError, match="the passphrase is wrong"):
        passphrase.decrypt(made, WORD + " ")


def test_more_than_a_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="more than one chunk"):
        passphrase.encrypt(bytes(passphrase.CHUNK + 1), WORD)
