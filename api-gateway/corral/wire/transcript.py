"""What a node has said in a stream so far: kept so that another node can go on with it, hashed for the record."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any, Final

import msgspec

from corral.wire.lines import ChatLine, GenerateLine

TEXT_MAX: Final = 1 << 20
"""Characters of an answer that are kept: a longer one is not continued."""
TOGETHER: Final = 32
"""Pieces that are read at once: reading each by itself costs three times as much."""
BYTES: Final = 1 << 14
"""Bytes of pieces that are read at once, however few they are: a caller who takes nothing must not fill the memory."""

_chat: Final[Callable[[bytes], list[Any]]] = msgspec.json.Decoder(ChatLine).decode_lines
_generate: Final[Callable[[bytes], list[Any]]] = msgspec.json.Decoder(GenerateLine).decode_lines


class Transcript:
    """The text in the lines that went to the caller.

    ``tokens`` are the lines that brought text, the least that was generated: Ollama writes one a token, but for those
    whose bytes are no characters yet or may begin a stop string. ``text`` and ``tokens`` are true after `close`.

    ``most``: characters of the text that are captured whatever stands beside it, for the record; it is `hashed` too.
    ``keep``: the text is wanted. ``hashed``: its SHA-256 is, however long it is and whatever stands beside it.
    """

    def __init__(self, chat: bool, keep: bool = True, hashed: bool = False, most: int = 0) -> None:
        self.text = ""
        self.tokens = 0
        self._chat = chat
        self._pieces: list[bytes] = []
        self._waiting = 0
        self._texts: list[str] = []
        self._size = 0
        self._rest = b""
        self._plain = keep
        self._hash: Any = sha256() if hashed else None
        self._room = most
        self._captured: list[str] = []

    def add(self, data: bytes) -> None:
        """Bytes of the node's body, in any cut, once what they say has gone to the caller."""
        pieces = self._pieces
        pieces.append(data)
        self._waiting += len(data)
        if len(pieces) >= TOGETHER or self._waiting >= BYTES:
            self._read()

    def close(self) -> bool:
        """Have the text; False where there was more than text (thinking, tool calls, probabilities) or too much of it.

        What came of a line that was cut did not go to the caller, and is no part of it.
        """
        self._read()
        self._rest = b""
        self.text = "".join(self._texts)
        self._texts = [self.text]
        return self._plain

    def digest(self) -> bytes | None:
        """SHA-256 of the text so far (UTF-8), without thinking and tool calls; None where it is not known."""
        self._read()
        return self._hash.digest() if self._hash is not None else None

    def captured(self) -> str:
        """The beginning of the text so far: as much as there was room for, and a little more."""
        self._read()
        return "".join(self._captured)

    def _read(self) -> None:
        data = self._rest + b"".join(self._pieces)
        self._pieces, self._waiting = [], 0
        whole, _, self._rest = data.rpartition(b"\n")
        if not (self._plain or self._hash is not None) or not whole.strip():
            return
        try:
            lines = _chat(whole) if self._chat else _generate(whole)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._plain, self._hash = False, None
            return
        if self._hash is not None:
            parts = [line.message if self._chat else line for line in lines]
            said = "".join([part.content for part in parts if part is not None and part.content])
            self._hash.update(said.encode())
            if self._room > 0:
                self._captured.append(said)
                self._room -= len(said)
        if self._plain:
            self._keep(lines)

    def _keep(self, lines: list[Any]) -> None:
        for line in lines:
            part = line.message if self._chat else line
            if part is None or part.thinking or part.tool_calls or line.logprobs:
                self._plain, self._texts = False, []
                return
            if part.content:
                self._texts.append(part.content)
                self._size += len(part.content)
                self.tokens += 1
        if self._size > TEXT_MAX:
            self._plain, self._texts = False, []
