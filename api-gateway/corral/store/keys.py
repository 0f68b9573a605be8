"""API keys: ``crl_<id>_<secret><crc32>``.

The checksum lets a gateway refuse a mistyped or invented key before it looks anything up; the verifier is
all that is stored. Pure functions: no database, no network.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
import string
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

ID_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"
ID_LENGTH: Final = 10
SECRET_ALPHABET: Final = string.ascii_letters + string.digits
SECRET_LENGTH: Final = 32
PEPPER_BYTES: Final = 32

_KEY_LIKE: Final = re.compile(rf"crl_([a-z2-7]{{{ID_LENGTH}}}_)?[A-Za-z0-9_]*", re.ASCII)
_SHAPE: Final = re.compile(rf"crl_([a-z2-7]{{{ID_LENGTH}}})_[A-Za-z0-9]{{{SECRET_LENGTH}}}([0-9a-f]{{8}})", re.ASCII)


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class PepperError(ValueError):
    """The pepper file is missing or is not 64 hexadecimal digits."""


def generate() -> tuple[str, str]:
    """Make a key: ``(key id, the whole key as its owner sees it once)``."""
    key_id = "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_LENGTH))
    return key_id, secret_for(key_id)


def secret_for(key_id: str) -> str:
    """A new secret for an id that exists already (rotation)."""
    secret = "".join(secrets.choice(SECRET_ALPHABET) for _ in range(SECRET_LENGTH))
    body = f"crl_{key_id}_{secret}"
    return f"{body}{zlib.crc32(body.encode()):08x}"


def parse(text: str) -> str | None:
    """The key id, or None where shape or checksum is wrong."""
    match = _SHAPE.fullmatch(text)
    if match is None or f"{zlib.crc32(text[:-8].encode()):08x}" != match[2]:
        return None
    return match[1]


def masked(text: str) -> str:
    """A text in which of whatever may be a key no more stands than its id."""
    return _KEY_LIKE.sub(lambda match: f"crl_{match[1] or ''}…", text)


def spans(text: str) -> list[tuple[int, int]]:
    """Where in a text stands whatever may be a key."""
    return [match.span() for match in _KEY_LIKE.finditer(text)]


def verifier(pepper: bytes, text: str) -> str:
    """HMAC-SHA256 of the whole key under the pepper (RFC 2104), as 64 hexadecimal digits."""
    return hmac.digest(pepper, text.encode(), "sha256").hex()


def allows(networks: Iterable[Network], address: str) -> bool:
    """Whether an address is in one of the networks; an IPv4 address in IPv6's clothes counts as what it is."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return any(parsed in network for network in networks)


def read_pepper(path: Path | str) -> bytes:
    """The 32 bytes of the pepper file.

    Raises:
        PepperError: the file is missing or malformed; says what to do.
    """
    try:
        text = Path(path).read_text(encoding="ascii").strip()
        pepper = bytes.fromhex(text)
    except FileNotFoundError:
        raise PepperError(
            f"{path}: no pepper; restore it from a backup, or run `corral up` to make a new state"
        ) from None
    except ValueError:
        raise PepperError(f"{path}: not {PEPPER_BYTES * 2} hexadecimal digits; restore it from a backup") from None
    if len(pepper) != PEPPER_BYTES:
        raise PepperError(f"{path}: {len(pepper)} bytes where {PEPPER_BYTES} are needed; restore it from a backup")
    return pepper
