"""What a passphrase opens: an age file with a scrypt stanza, of one chunk (C2SP, "The age file encryption format", v1).

rage, which does all else here, chooses the cost of scrypt by how fast it finds the machine at that moment, and refuses
what would take 16 times as long as it then thinks is right: on a busy machine backups came out weak, and good ones were
not opened. Here it is what age itself takes, and what is taken is bounded by memory (4 GiB) alone.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from base64 import b64decode, b64encode
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

COST: Final = 18
COST_MAX: Final = 22
CHUNK: Final = 64 << 10
_HEAD: Final = re.compile(
    rb"(age-encryption\.org/v1\n-> scrypt ([A-Za-z0-9+/]{22}) ([1-9][0-9]?)\n([A-Za-z0-9+/]{43})\n---) "
    rb"([A-Za-z0-9+/]{43})\n"
)
_LAST: Final = bytes(11) + b"\1"
"""The nonce of the first chunk, which is the last one too."""


def encrypt(data: bytes, passphrase: str) -> bytes:
    """At most 64 KiB as an age file for a passphrase."""
    if len(data) > CHUNK:
        raise ValueError(f"{len(data)} bytes are more than one chunk")
    file_key, salt, nonce = os.urandom(16), os.urandom(16), os.urandom(16)
    wrapped = ChaCha20Poly1305(_stretched(passphrase, salt, COST)).encrypt(bytes(12), file_key, None)
    head = b"age-encryption.org/v1\n-> scrypt %b %d\n%b\n---" % (_text(salt), COST, _text(wrapped))
    body = ChaCha20Poly1305(_derived(file_key, nonce, b"payload")).encrypt(_LAST, data, None)
    return head + b" %b\n" % _text(_mac(file_key, head)) + nonce + body


def decrypt(data: bytes, passphrase: str) -> bytes:
    """What such a file holds.

    Raises:
        ValueError: the passphrase is wrong, or it is no such file, or would take more memory than it may.
    """
    found = _HEAD.match(data)
    if found is None or int(found[3]) > COST_MAX:
        raise ValueError("no age file for a passphrase, or of a cost beyond bounds")
    head, salt, cost, wrapped, mac = found[1], _bytes(found[2]), int(found[3]), _bytes(found[4]), _bytes(found[5])
    nonce, body = data[found.end() : found.end() + 16], data[found.end() + 16 :]
    try:
        file_key = ChaCha20Poly1305(_stretched(passphrase, salt, cost)).decrypt(bytes(12), wrapped, None)
        if not hmac.compare_digest(mac, _mac(file_key, head)):
            raise ValueError("its head was changed")
        return ChaCha20Poly1305(_derived(file_key, nonce, b"payload")).decrypt(_LAST, body, None)
    except InvalidTag:
        raise ValueError("the passphrase is wrong, or it was changed") from None


def _stretched(passphrase: str, salt: bytes, cost: int) -> bytes:
    salted = b"age-encryption.org/v1/scrypt" + salt
    most = (1 << cost + 10) + (1 << 20)  # a KiB for each step and some; OpenSSL would allow 32 MiB
    return hashlib.scrypt(passphrase.encode(), salt=salted, n=1 << cost, r=8, p=1, maxmem=most, dklen=32)


def _derived(key: bytes, salt: bytes, what: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt, what).derive(key)


def _mac(file_key: bytes, head: bytes) -> bytes:
    return hmac.digest(_derived(file_key, b"", b"header"), head, "sha256")


def _text(data: bytes) -> bytes:
    return b64encode(data).rstrip(b"=")


def _bytes(text: bytes) -> bytes:
    return b64decode(text + b"=" * (-len(text) % 4), validate=True)
