"""Continuing an answer that was cut: the requests for the rest of it, and the rest in the form that was begun.

A node renders the request's prompt without running the model (`_debug_render_only`); the prompt and what was sent, as
`raw`, give the rest. Ollama closes a trailing message of an assistant, so that no chat can be continued as one.

How many tokens were sent no node has told, and lines are fewer: Ollama holds back bytes that are no character yet, and
what may begin a stop string, the model's own ones too. So the node that goes on counts the prompt without and with what
was sent (`prompt_eval_count`). It tokenises the text anew, as it does for the rest too: where a model had written other
tokens than its tokeniser makes of the same text, which a greedy answer hardly has, neither can be exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from corral.wire import answers
from corral.wire.common import MARK, Lines, Responder, count, decode_line, encode, fields_of, text
from corral.wire.errors import UpstreamNonsense
from corral.wire.lines import RENDERED

GENERATE: Final = b"/api/generate"
RENDERED_MAX: Final = 64 << 20

_body: Final[Callable[[bytes], dict[str, Any]]] = msgspec.json.Decoder(dict[str, Any]).decode
_UNFIT = ("tools", "format", "images", "logprobs", "suffix", "context", "_debug_render_only")
_UNFIT_MESSAGE = ("images", "tool_calls", "thinking", "tool_name", "tool_call_id")


class Rest:
    """What is asked of the next node: ``rendering`` is the body that has the prompt rendered.

    ``tokens`` were sent of at most ``limit`` (None: no bound): as many as lines until they are `counted`. ``prompt``:
    tokens of the prompt alone, 0 before that.
    """

    def __init__(self, body: dict[str, Any], sent: str, tokens: int, prompt: int = 0) -> None:
        options: dict[str, Any] = body.get("options") or {}
        limit = options.get("num_predict")
        self._body, self._options = body, options
        self.sent, self.tokens, self.prompt = sent, tokens, prompt
        self.limit: int | None = limit if isinstance(limit, int) and limit > 0 else None
        self.stops: list[str] = [stop for stop in options.get("stop") or [] if isinstance(stop, str) and stop]
        self.rendering: bytes = encode({**body, "_debug_render_only": True})

    def more(self, sent: str, tokens: int) -> Rest:
        """The same after more was sent, all of it counted."""
        return Rest(self._body, sent, tokens, self.prompt)

    def counted(self, prompt: int, whole: int) -> Rest:
        """The same after a node counted the prompt (0: it told no count), and the prompt with what was sent.

        A line that was sent brought a token at least, a token a byte at least, and no node goes beyond the limit.
        """
        if not prompt:
            return self
        most = len(self.sent.encode()) if self.limit is None else self.limit
        return Rest(self._body, self.sent, max(self.tokens, min(whole - prompt, most)), prompt)

    def count(self, text: str) -> bytes:
        """The body of `/api/generate` whose answer has the count of `text`, at the price of one token.

        Counted in order, the prompt is read but once: what a node has just read it still has.
        """
        return self._generate(text, {**self._options, "num_predict": 1}, False)

    def request(self, rendered: str) -> bytes:
        """The body of `/api/generate` that goes on behind `rendered` and what was sent."""
        options = dict(self._options)
        if self.limit is not None:
            # Where nothing is left but the last line, one token is asked for to have its counts, and left out.
            options["num_predict"] = max(1, self.limit - self.tokens)
        return self._generate(rendered + self.sent, options, True)

    def _generate(self, prompt: str, options: dict[str, Any], stream: bool) -> bytes:
        body = self._body
        made: dict[str, Any] = {
            "model": body["model"],
            "prompt": prompt,
            "raw": True,
            "stream": stream,
            "truncate": False,
        }
        if options:
            made["options"] = options
        for name in ("keep_alive", "shift"):
            if name in body:
                made[name] = body[name]
        return encode(made)


def rest_of(upstream_body: bytes, sent: str, tokens: int) -> Rest | None:
    """What is to be asked for; None where the request is for more than text, which cannot be continued."""
    body = _body(upstream_body)
    if body.get("think") or any(body.get(name) for name in _UNFIT):
        return None
    for message in body.get("messages") or ():
        if any(message.get(name) for name in _UNFIT_MESSAGE):
            return None
    return Rest(body, sent, tokens)


class Aside(Responder):
    """An answer of which nothing goes to the caller: ``fields`` are its object's once it is finished."""

    done = True  # an object is whole when the node's answer is

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens  # of the answer so far, should the caller leave now
        self.fields: dict[str, msgspec.Raw] = {}
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> bytes:
        self._size += len(data)
        if self._size > RENDERED_MAX:
            raise UpstreamNonsense(f"an answer of more than {RENDERED_MAX} bytes")
        self._parts.append(data)
        return b""

    def finish(self) -> bytes:
        self.fields = fields_of(b"".join(self._parts))
        return b""


class Rendering(Aside):
    """The answer that holds the rendered prompt: ``prompt`` once it is finished."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.prompt = ""

    def finish(self) -> bytes:
        super().finish()
        shown = fields_of(bytes(self.fields.get(RENDERED, b"{}")))
        prompt = bytes(shown.get("rendered_template", b"")).strip()
        if prompt[:1] != b'"':
            raise UpstreamNonsense("no rendered prompt")
        self.prompt = text(decode_line(b'{"p":%b}' % prompt)["p"])
        return b""


class Counting(Aside):
    """The answer that holds a count: ``found`` tokens of a text once it is finished, 0 where the node told none."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.found = 0

    def finish(self) -> bytes:
        super().finish()
        self.found = answers.number(self.fields, "prompt_eval_count")
        return b""


class Resumed(Responder):
    """The rest of an answer, passed to the responder that wrote its beginning.

    The lines of `/api/generate` become those of the request's own route. The last one counts the whole answer once:
    the prompt as the first node had it (without what was sent), the tokens of all nodes. ``mark`` is put into it.
    """

    stream = True
    started = True

    def __init__(self, inner: Responder, chat: bool, rest: Rest, estimate: int, mark: dict[str, Any]) -> None:
        inner.resume()
        self._inner, self._chat, self._estimate, self._mark = inner, chat, estimate, mark
        self._mute = rest.limit is not None and rest.tokens >= rest.limit
        self._before = self.tokens = rest.tokens
        self._prompt = rest.prompt
        self._lines = Lines()
        self._texts = [rest.sent]
        self._ends = () if self._mute else seam(rest.sent, rest.stops)
        self._held = ""
        self.content_type = inner.content_type

    def sent(self) -> str:
        """All text that went to the caller."""
        return "".join(self._texts)

    def feed(self, data: bytes) -> bytes:
        texts = len(self._texts)
        try:
            return self._feed(data)
        except Exception:
            del self._texts[texts:]  # nothing of this piece is sent: who goes on has to write it
            raise

    def _feed(self, data: bytes) -> bytes:
        out: list[bytes] = []
        for line in self._lines.split(data):
            if self.early:
                break  # it is whole: nothing more is wanted of the node
            if self.done:
                raise UpstreamNonsense("lines after the last one")
            value = decode_line(line)
            if "error" in value:
                self.error = answers.in_band_error(value["error"])
                break
            out.append(self._line(value))
        return b"".join(out)

    def _line(self, value: dict[str, Any]) -> bytes:
        piece = text(value.get("response"))
        last = value.get("done") is True
        if self._mute:
            piece = ""
        elif piece:
            self.tokens += 1
        if self._ends:
            piece, stopped = self._at_seam(piece, last)
            if stopped:
                self.early = not last
                return self._last(value, piece, "stop")
        if last:
            return self._last(value, piece, "length" if self._mute else "")
        return self._pass(value, piece, {}) if piece else b""

    def _at_seam(self, piece: str, last: bool) -> tuple[str, bool]:
        """What may go on of text behind a possible beginning of a stop string, and whether it has become one."""
        held = self._held + piece
        if any(held.startswith(end) for end in self._ends):
            return "", True
        if not last and any(end.startswith(held) for end in self._ends):
            self._held = held
            return "", False
        self._held, self._ends = "", ()
        return held, False

    def _last(self, value: dict[str, Any], piece: str, reason: str) -> bytes:
        asked = count(value.get("prompt_eval_count"))
        more = 0 if self._mute else count(value.get("eval_count"))
        # The next node's prompt has what was sent in it.
        prompt = self._prompt or (max(0, asked - self._before) if asked else self._estimate)
        tokens = self.tokens if self.early else self._before + more
        counts: dict[str, Any] = {
            "done": True,
            "done_reason": reason or value.get("done_reason") or "stop",
            "prompt_eval_count": prompt,
            "eval_count": tokens,
            MARK: self._mark,
        }
        out = self._pass(value, piece, counts)
        self.done, self.prompt_tokens, self.tokens = True, prompt, tokens
        return out

    def _pass(self, value: dict[str, Any], piece: str, more: dict[str, Any]) -> bytes:
        if piece:
            self._texts.append(piece)
        native: dict[str, Any] = {"model": value.get("model", ""), "created_at": value.get("created_at", "")}
        if self._chat:
            native["message"] = {"role": "assistant", "content": piece}
        else:
            native["response"] = piece
        native["done"] = False
        native.update(more)
        if more:
            for name, field in value.items():
                if name not in native and name not in ("response", "context"):
                    native[name] = field
        return self._inner.feed(encode(native) + b"\n")

    def finish(self) -> bytes:
        return self._inner.finish()


def seam(sent: str, stops: list[str]) -> tuple[str, ...]:
    """What would complete a stop string that `sent` ends with the beginning of."""
    ends: list[str] = []
    for stop in stops:
        for length in range(1, len(stop)):
            if sent.endswith(stop[:length]):
                ends.append(stop[length:])
    return tuple(ends)
