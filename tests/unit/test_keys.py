"""API keys: shape, checksum, verifier, pepper file."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from corral.control.keys import Cidr
from corral.gateway.authenticate import authorize, build_key, not_found
from corral.store import keys
from corral.wire.errors import ApiError


def test_a_generated_key_parses_to_its_id() -> None:
    for _ in range(200):
        key_id, text = keys.generate()
        assert keys.parse(text) == key_id
        assert text.startswith(f"crl_{key_id}_")


@pytest.mark.parametrize("position", [4, 10, 15, 30, 46, 50, 54])
def test_one_wrong_character_is_refused(position: int) -> None:
    _, text = keys.generate()
    other = "b" if text[position] != "b" else "c"
    assert keys.parse(text[:position] + other + text[position + 1 :]) is None


@given(st.text())
def test_no_other_text_is_a_key(text: str) -> None:
    assert keys.parse(text) is None


def test_a_trailing_newline_is_no_part_of_a_key() -> None:
    _, text = keys.generate()
    assert keys.parse(text + "\n") is None
    assert keys.parse(text.upper()) is None


def test_the_verifier_depends_on_key_and_pepper() -> None:
    _, text = keys.generate()
    first = keys.verifier(b"p" * 32, text)
    assert len(bytes.fromhex(first)) == 32
    assert first != keys.verifier(b"q" * 32, text)
    assert first != keys.verifier(b"p" * 32, keys.secret_for(keys.parse(text) or ""))


def test_rotation_keeps_the_id() -> None:
    key_id, text = keys.generate()
    other = keys.secret_for(key_id)
    assert other != text
    assert keys.parse(other) == key_id


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no pepper"), ("zz", "hexadecimal"), ("ab" * 31, "31 bytes"), ("", "0 bytes")],
)
def test_a_wrong_pepper_file_says_what_to_do(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "pepper"
    if content is not None:
        path.write_text(content)
    with pytest.raises(keys.PepperError, match=says) as caught:
        keys.read_pepper(path)
    assert "restore it from a backup" in str(caught.value)


def test_a_pepper_file_is_32_bytes(tmp_path: Path) -> None:
    path = tmp_path / "pepper"
    path.write_text("0f" * 32 + "\n")
    assert keys.read_pepper(path) == b"\x0f" * 32


def test_an_address_in_other_clothes_counts_as_what_it_is() -> None:
    assert keys.allows([ip_network("10.0.0.0/8")], "::ffff:10.2.3.4")
    assert not keys.allows([ip_network("::/0")], "::ffff:10.2.3.4")
    assert not keys.allows([ip_network("0.0.0.0/0"), ip_network("::/0")], "10.1.1.1, 10.1.1.2")
    assert not keys.allows([ip_network("0.0.0.0/0"), ip_network("::/0")], "")


@pytest.mark.parametrize(
    ("globs", "model", "may"),
    [
        (None, "any", True),
        (["*"], "any", True),
        (["llama*"], "llama3.2:3b", True),
        (["llama*"], "LLAMA3.2:3b", False),
        (["llama*"], "my-llama", False),
        (["m"], "m:latest", True),
        (["m:latest"], "m", True),
        (["m"], "m:other", False),
        (["a", "m:*"], "m:other", True),
        (["library/m"], "m", False),
    ],
)
def test_a_key_is_for_the_models_that_its_globs_match(globs: list[str] | None, model: str, may: bool) -> None:
    key = build_key({"id": "k", "verifiers": [], "models": globs}, {})
    if may:
        authorize(key, model)
        return
    with pytest.raises(ApiError, match=f"model '{model}' not found") as refused:
        authorize(key, model)
    assert refused.value.status == 404, "as one that nobody has"


@pytest.mark.parametrize(
    ("globs", "model", "more"),
    [
        (None, "Llama3", "; did you mean 'llama3'?"),
        (["llama*"], "LLAMA3:latest", "; did you mean 'llama3'?"),
        (["llama*"], "lLaMa3:70b-q4", "; did you mean 'llama3:70B-Q4'?"),
        (["llama*"], "Secret", ""),
        (["llama*"], "llama4", ""),
        (None, "llama3:71b", ""),
    ],
)
def test_a_name_that_differs_in_its_case_alone_is_told_of_to_those_who_may_use_it(
    globs: list[str] | None, model: str, more: str
) -> None:
    key = build_key({"id": "k", "verifiers": [], "models": globs}, {})
    held = {"llama3:latest", "llama3:70B-Q4", "secret:latest"}
    error = not_found(key, model, held)
    assert (error.status, error.code, error.message) == (404, "model_not_found", f"model '{model}' not found{more}")
    if not key.may_use(model):
        with pytest.raises(ApiError) as refused:
            authorize(key, model, held)
        assert refused.value.message == error.message


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ("10.1.2.3/16", "10.1.0.0/16"),
        ("2001:db8::1", "2001:db8::1/128"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:192.0.2.7", "192.0.2.7/32"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::/0", "::/0"),
    ],
)
def test_a_network_is_kept_as_callers_are_seen(asked: str, kept: str) -> None:
    assert TypeAdapter(Cidr).validate_python(asked) == kept


def test_a_network_of_ipv4_in_ipv6_lets_its_callers_in() -> None:
    kept = ip_network(TypeAdapter(Cidr).validate_python("::ffff:10.0.0.0/104"))
    assert keys.allows([kept], "10.1.2.3") and keys.allows([kept], "::ffff:10.1.2.3")
    assert not keys.allows([kept], "11.0.0.1")
