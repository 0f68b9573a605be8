"""What a Corral gateway answers otherwise than the Ollama behind it, on purpose. Whatever is not here is a failure."""

from __future__ import annotations

from dataclasses import dataclass

from conformance.exchange import Answer


@dataclass(frozen=True)
class Difference:
    """How a case differs: the gateway's ``status``, and why. ``fields``: last-event values that differ alone."""

    why: str
    status: int | None = None
    fields: tuple[tuple[str, object], ...] = ()


_OPTION = Difference("a caller's error is a 400; Ollama says 500", 400)
_PATH = Difference("routes are an allow-list; whatever is not on it does not exist", 404)
_N = Difference("one answer a request is all there is, and who asks for another number is told", 400)
_NAME = Difference("a name that cannot be is a caller's error; Ollama says 500", 400)
_MODEL = Difference("a body without a model is bad input, whatever the route", 400)

DIFFERENCES: dict[str, Difference] = {
    "generate-bad-option": _OPTION,
    "generate-bad-option-int": _OPTION,
    "generate-bad-option-list": _OPTION,
    "generate-bad-format": _OPTION,
    "chat-bad-option": _OPTION,
    "chat-bad-format": _OPTION,
    "chat-unload": Difference("keep_alive is the fleet's, not one caller's", fields=(("done_reason", "load"),)),
    "generate-no-model": _MODEL,
    "embed-no-model": _MODEL,
    "v1-completion-no-model": _MODEL,
    "v1-embeddings-no-model": _MODEL,
    "show-bad-name": _NAME,
    "show-no-tag": Difference("nobody holds a model of such a name; Ollama says 500", 404),
    "v1-chat-n-two": _N,
    "v1-chat-n-two-stream": _N,
    "v1-chat-n-zero": _N,
    "v1-completion-n-two": _N,
    "v1-completion-n-zero": _N,
    "v1-embeddings-empty": Difference("an empty input is a caller's error, not the runner's", 400),
    "path-unknown": _PATH,
    "path-wrong-method": _PATH,
    "path-wrong-method-tags": _PATH,
    "path-root": _PATH,
}

OVER_LONG_STATUS = 400
"""An over-long prompt is refused by name on every route, not cut without a word."""

ERROR_TYPE = "application/json"
"""The Content-Type of all a gateway's errors, where Ollama has a charset behind some; JSON has no such parameter."""


def content_type(expected: Answer) -> str:
    """What a gateway has as Content-Type of an answer that Ollama gives so."""
    return ERROR_TYPE if expected.status >= 400 else expected.content_type


MANAGEMENT = [
    ("POST", "/api/pull"),
    ("POST", "/api/push"),
    ("POST", "/api/create"),
    ("POST", "/api/copy"),
    ("DELETE", "/api/delete"),
    ("HEAD", "/api/blobs/sha256:" + "0" * 64),
    ("POST", "/api/blobs/sha256:" + "0" * 64),
]
"""Verbs that change what a node holds: 404 at a gateway, for operators alone in the control plane."""

ERROR_WORDS = frozenset({"error.code", "error.param", "error.type"})
"""Fields of an OpenAI error in which the gateway says what Ollama leaves null, as OpenAI itself does."""

V1_WORDS = frozenset({"chat-wrong-type", "completion-wrong-type", "messages-wrong-type", "embeddings-unknown-model"})
"""Cases of test_v1_equals_ollama whose error the gateway words otherwise: by the field, not Ollama's own types."""

V1_STATUS = {"embeddings-empty": 400}
"""Cases of test_v1_equals_ollama that are a caller's error, for which Ollama has a 500."""

V1_FIELDS = {
    # Announced before the prompt is counted: both are guesses, and message_delta has the count.
    "messages-stream": frozenset({"message.usage.input_tokens"}),
}
"""Fields of test_v1_equals_ollama compared by type alone."""

V1_BETTER = {"chat-max-completion-tokens": {"max_tokens": 3}}
"""OpenAI's present name of `max_tokens`, which Ollama 0.17.4 ignores; the gateway takes it as this field."""

# Without a case here, as no model of these tests thinks and calls: in a stream of `/v1/messages` the gateway ends each
# block before the next one begins, also where a call follows thinking at once (tests/unit/test_wire_tools.py).
