"""What the audit trail's tamper evidence is made of: pure functions of rows and hashes, no I/O.

A sealed record has a place (``pos``, from 1 without gaps) in the stream of its writer (``gw``). Its content is a JSON
object of its fields that are not null, in the order of their names; ``leaf`` is RFC 6962's hash of that content. The
chain's link after a record is SHA-256 of 0x02, the link before it and the record's leaf; before the first it is
ZERO. A checkpoint holds the link and the Merkle root (RFC 6962, section 2.1) of each range of records that came since
the checkpoint before, and the SHA-256 of that one; it is signed by Ed25519 (RFC 8032).

Records that are older than the chain have no place; each checkpoint holds the root of all of them that there are, in
the order of their numbers (``seq``), which stand in their content as ``pos``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from hashlib import sha256
from typing import Any

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from corral.store.tables import audit

ZERO = bytes(32)
"""The link before a stream's first record, and what the first checkpoint names as the one before it."""

FIELDS = tuple(sorted(str(column.name) for column in audit.columns if column.name not in ("seq", "leaf")))
"""What of a row is hashed. One that a later version adds is null, and so left out, in what was sealed before."""

NESTED = ("before", "after")
_encode = msgspec.json.Encoder().encode
_encode_sorted = msgspec.json.Encoder(order="deterministic").encode


def content(row: Mapping[str, Any]) -> bytes:
    """The bytes of a record that are hashed; `row` has its ``gw`` and ``pos``."""
    value = {name: row[name] for name in FIELDS if row[name] is not None}
    # Objects within may come back from a database in another order.
    return _encode_sorted(value) if "before" in value or "after" in value else _encode(value)


def leaf_of(data: bytes) -> bytes:
    """The Merkle leaf of a record's content."""
    return sha256(b"\0" + data).digest()


def link_after(link: bytes, leaf: bytes) -> bytes:
    """The chain's link after a record."""
    return sha256(b"\2" + link + leaf).digest()


class Merkle:
    """The root of a row of leaves that come one by one; keeps a hash for each power of two."""

    def __init__(self, leaves: Iterable[bytes] = ()) -> None:
        self._count = 0
        self._peaks: list[bytes] = []
        for leaf in leaves:
            self.add(leaf)

    def add(self, leaf: bytes) -> None:
        """One more leaf."""
        self._peaks.append(leaf)
        self._count += 1
        count = self._count
        while not count & 1:
            right = self._peaks.pop()
            self._peaks[-1] = sha256(b"\1" + self._peaks[-1] + right).digest()
            count >>= 1

    def root(self) -> bytes:
        """The root of what came so far."""
        if not self._peaks:
            return sha256().digest()
        node = self._peaks[-1]
        for peak in reversed(self._peaks[:-1]):
            node = sha256(b"\1" + peak + node).digest()
        return node


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Records `first` to `last` of a stream: the chain's link after them, their Merkle root (both hex).

    ``dropped``: retention removes the stream's records up to there, from this checkpoint on; 0 for none. A checkpoint
    that only says so has no records: ``first`` is then ``last`` + 1.
    """

    stream: str
    first: int
    last: int
    link: str
    root: str
    dropped: int = 0


class Older(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Records older than the chain: those numbered 1 to `last` without a place, from `until` on (epoch seconds).

    How many, and their Merkle root (hex). Retention removes those before ``until``.
    """

    last: int
    until: float
    count: int
    root: str


class OlderRoot:
    """The root of records older than the chain, which come one by one in the order of their numbers."""

    def __init__(self, until: float) -> None:
        self._until, self._tree = until, Merkle()
        self.count = 0

    def add(self, row: Mapping[str, Any]) -> bool:
        """Take a record; false where it is before `until`, and not counted."""
        if row["ts"] < self._until:
            return False
        self._tree.add(leaf_of(content(row)))
        self.count += 1
        return True

    def root(self) -> str:
        """The root (hex) of what was counted."""
        return self._tree.root().hex()


# Without `older` it is encoded, and so signed, as it was before there was that field.
class Checkpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One checkpoint. ``ts`` is epoch seconds, ``previous`` the digest of the one before, ``key`` the signer's id.

    ``older`` is None in those of versions that did not sign it.
    """

    number: int
    ts: float
    key: str
    previous: str
    streams: tuple[Span, ...]
    older: Older | None = None


class Signed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint as a line of the file; ``signature`` (hex) is of the checkpoint's encoding."""

    checkpoint: Checkpoint
    signature: str

    def line(self) -> bytes:
        """It as it is written, without a line end."""
        return _encode_sorted(self)

    def digest(self) -> str:
        """What the next checkpoint names it by."""
        return sha256(self.line()).hexdigest()


_decode = msgspec.json.Decoder(Signed).decode


def read_checkpoint(line: str | bytes) -> Signed:
    """A line of the file. Raises ValueError where it is none."""
    return _decode(line)


class Signer:
    """Signs checkpoints with an Ed25519 key, given as the hex of its 32 secret bytes."""

    def __init__(self, text: str) -> None:
        """Raises ValueError where `text` is no such key."""
        self._key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(text.strip()))
        self.public = self._key.public_key().public_bytes_raw().hex()
        self.id = key_id(self.public)

    def sign(
        self, number: int, ts: float, previous: str, streams: Iterable[Span], older: Older | None = None
    ) -> Signed:
        """A checkpoint of these spans."""
        checkpoint = Checkpoint(number, ts, self.id, previous, tuple(streams), older)
        return Signed(checkpoint, self._key.sign(_encode_sorted(checkpoint)).hex())


def key_id(public: str) -> str:
    """What a public key (hex) is called in checkpoints: the first half of its SHA-256."""
    return sha256(bytes.fromhex(public)).hexdigest()[:32]


@lru_cache(maxsize=16)
def _key_of(public: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))


def signed_by(signed: Signed, public: str) -> bool:
    """Whether a checkpoint is signed by the key of these public bytes (hex)."""
    try:
        _key_of(public).verify(bytes.fromhex(signed.signature), _encode_sorted(signed.checkpoint))
    except (InvalidSignature, ValueError):
        return False
    return True
