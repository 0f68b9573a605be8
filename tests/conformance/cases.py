"""What every target is asked, compared with real Ollama: each route, streamed and not, right and wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MODEL = "smollm2:135m"
# Ollama's trained context is 8,192 tokens for this model; a word of this prompt is a token.
TOO_LONG = "word " * 9000
LONGER_THAN_256 = "word " * 400

GREEDY = {"temperature": 0, "seed": 0, "num_predict": 4}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}},
}
COUNTS = ("done_reason", "prompt_eval_count", "eval_count")
USAGE = ("usage.prompt_tokens", "usage.completion_tokens")


@dataclass(frozen=True)
class Case:
    """One request. ``equal``: paths of the last event whose values, not only types, are Ollama's.

    ``words``: an error's text is Ollama's own on the embedded node. ``bare``: not asked of a gateway, which does not
    take the option, or have the route, that it is about.
    """

    name: str
    method: str
    path: str
    body: Any = None
    raw: bytes | None = None
    equal: tuple[str, ...] = ()
    words: bool = False
    bare: bool = False


def _user(text: str = "Say hi.") -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _generate(name: str, equal: tuple[str, ...] = COUNTS, words: bool = False, **fields: Any) -> Case:
    body = {"model": MODEL, "prompt": "Say hi.", "stream": False, "options": GREEDY} | fields
    return Case(f"generate-{name}", "POST", "/api/generate", body, equal=equal, words=words)


def _chat(name: str, equal: tuple[str, ...] = COUNTS, words: bool = False, **fields: Any) -> Case:
    body = {"model": MODEL, "messages": _user(), "stream": False, "options": GREEDY} | fields
    return Case(f"chat-{name}", "POST", "/api/chat", body, equal=equal, words=words)


def _embed(name: str, equal: tuple[str, ...] = ("prompt_eval_count",), words: bool = False, **fields: Any) -> Case:
    return Case(f"embed-{name}", "POST", "/api/embed", {"model": MODEL} | fields, equal=equal, words=words)


def _v1(name: str, equal: tuple[str, ...] = USAGE, words: bool = False, **fields: Any) -> Case:
    body = {"model": MODEL, "messages": _user(), "temperature": 0, "seed": 0, "max_tokens": 4} | fields
    return Case(f"v1-chat-{name}", "POST", "/v1/chat/completions", body, equal=equal, words=words)


def _completion(name: str, equal: tuple[str, ...] = USAGE, words: bool = False, **fields: Any) -> Case:
    body = {"model": MODEL, "prompt": "Say hi.", "temperature": 0, "seed": 0, "max_tokens": 4} | fields
    return Case(f"v1-completion-{name}", "POST", "/v1/completions", body, equal=equal, words=words)


def _message(name: str, equal: tuple[str, ...] = (), **fields: Any) -> Case:
    body = {"model": MODEL, "messages": _user(), "temperature": 0, "max_tokens": 4} | fields
    return Case(f"messages-{name}", "POST", "/v1/messages", body, equal=equal)


MESSAGE_USAGE = ("stop_reason", "usage.input_tokens", "usage.output_tokens")

NATIVE = [
    _generate("whole"),
    _generate("stream", stream=True),
    _generate("stream-by-default", stream=None),
    _generate("raw", raw=True),
    _generate("system", system="You are a cat."),
    _generate("template", template="{{ .Prompt }}"),
    _generate("context", context=[1, 9690, 198]),
    _generate(
        "stop", equal=("done_reason",), prompt="1 2 3", raw=True, options=GREEDY | {"stop": [" ", "\n", "e", "a"]}
    ),
    _generate("one-token", options=GREEDY | {"num_predict": 1}),
    _generate("unknown-option", options=GREEDY | {"nonsense": 1}),
    _generate("json", equal=(), format="json", options=GREEDY | {"num_predict": 24}),
    _generate("logprobs", logprobs=True, top_logprobs=2),
    _generate("logprobs-too-many", equal=(), words=True, logprobs=True, top_logprobs=21),
    _generate("logprobs-negative", equal=(), words=True, logprobs=True, top_logprobs=-1, stream=True),
    _generate("no-bound-of-repeats", options=GREEDY | {"repeat_last_n": -1, "num_keep": -2}),
    _generate("render-only", equal=("_debug_info.rendered_template",), _debug_render_only=True),
    _generate("load", equal=("done_reason", "response"), prompt=""),
    _generate("load-stream", equal=("done_reason", "response"), prompt="", stream=True),
    _generate("suffix-unsupported", equal=(), words=True, suffix="b"),
    _generate("too-long-refused", equal=(), words=True, prompt=TOO_LONG, truncate=False),
    _generate("bad-option", equal=(), words=True, options={"temperature": "hot"}),
    _generate("bad-option-int", equal=(), words=True, options={"num_predict": "many"}),
    _generate("bad-option-list", equal=(), words=True, options={"stop": 5}),
    _generate("bad-format", equal=(), format="yaml"),
    _chat("whole", equal=(*COUNTS, "message.role")),
    _chat("stream", stream=True),
    _chat("system", messages=[{"role": "system", "content": "You are a cat."}, *_user()]),
    _chat("turns", messages=[*_user(), {"role": "assistant", "content": "hi"}, *_user("Again.")]),
    _chat("logprobs", logprobs=True, top_logprobs=2),
    _chat("logprobs-stream", logprobs=True, stream=True),
    _chat("logprobs-too-many", equal=(), words=True, logprobs=True, top_logprobs=21, stream=True),
    _chat("logprobs-negative", equal=(), words=True, top_logprobs=-1),
    _chat("render-only", equal=("_debug_info.rendered_template",), _debug_render_only=True),
    _chat("load", equal=("done_reason", "message"), messages=[]),
    _chat("unload", equal=("message",), messages=[], keep_alive=0),
    _chat("tools-unsupported", equal=(), words=True, tools=[TOOL]),
    _chat("think-unsupported", equal=(), words=True, think=True),
    _chat("too-long-refused", equal=(), words=True, messages=_user(TOO_LONG), truncate=False),
    _chat("bad-option", equal=(), words=True, options={"temperature": "hot"}),
    _chat("bad-format", equal=(), format="yaml"),
    _embed("one", input="hello"),
    _embed("list", input=["hello", "there you are"]),
    _embed("dimensions", input="hello", dimensions=8),
    _embed("none", equal=()),
    _embed("empty", equal=(), input=[]),
    _embed("empty-text", equal=(), input=""),
    _embed("number", equal=(), words=True, input=5),
    _embed("too-long-refused", equal=(), words=True, input=TOO_LONG, truncate=False),
    Case("embeddings", "POST", "/api/embeddings", {"model": MODEL, "prompt": "hello"}),
    Case("embeddings-empty", "POST", "/api/embeddings", {"model": MODEL, "prompt": ""}),
    Case("show", "POST", "/api/show", {"model": MODEL}, equal=("details.family", "capabilities")),
    Case("show-name", "POST", "/api/show", {"name": MODEL}),
    Case("tags", "GET", "/api/tags", equal=("models.0.name", "models.0.model", "models.0.details")),
    Case("version", "GET", "/api/version", equal=("version",)),
]

_SHORT_CONTEXT = {"model": MODEL, "stream": False, "options": GREEDY | {"num_ctx": 256}}
CUT = [
    Case(name, "POST", path, _SHORT_CONTEXT | fields, equal=COUNTS, bare=True)
    for name, path, fields in (
        ("generate-too-long-cut", "/api/generate", {"prompt": LONGER_THAN_256}),
        ("chat-too-long-cut", "/api/chat", {"messages": _user(LONGER_THAN_256)}),
    )
]

# Contexts that are soon full: the row goes on whatever the kernels round, so that all targets write as much.
_ROW = {"raw": True, "prompt": "row, " * 6 + "row,"}
_FULL = GREEDY | {"num_ctx": 64, "num_predict": 80, "repeat_penalty": 1.0}
_COUNTING = _user("Count from one to ninety in digits, with commas.")
_TURNS = [*_user("word " * 30), {"role": "assistant", "content": "yes " * 20}, *_user("and " * 20)]
SMALL = [
    Case(
        f"{name}-small",
        "POST",
        path,
        {"model": MODEL, "stream": False} | fields,
        equal=equal,
        words=not equal,
        bare=True,
    )
    for name, path, equal, fields in (
        ("generate-full", "/api/generate", COUNTS, {**_ROW, "options": _FULL}),
        ("generate-full-unshifted", "/api/generate", COUNTS, {**_ROW, "options": _FULL, "shift": False}),
        ("chat-full-unshifted", "/api/chat", COUNTS, {"messages": _COUNTING, "options": _FULL, "shift": False}),
        (
            "chat-full-unshifted-stream",
            "/api/chat",
            COUNTS,
            {"messages": _COUNTING, "options": _FULL, "shift": False, "stream": True},
        ),
        (
            "chat-turns-dropped",
            "/api/chat",
            COUNTS[1:2],
            {"messages": _TURNS, "options": _FULL | {"num_predict": 1}, "shift": False},
        ),
        ("chat-turns-refused", "/api/chat", (), {"messages": _TURNS, "options": _FULL, "truncate": False}),
        (
            "chat-turns-refused-stream",
            "/api/chat",
            (),
            {"messages": _TURNS, "options": _FULL, "truncate": False, "stream": True},
        ),
        *(
            (f"embed-{name}", "/api/embed", equal, {"input": given, "options": {"num_ctx": 64}} | fields)
            for given in (["word " * 100, "hello"],)
            for name, equal, fields in (
                ("too-long", ("prompt_eval_count",), {}),
                ("too-long-cut", ("prompt_eval_count",), {"truncate": True}),
                ("too-long-refused", (), {"truncate": False}),
            )
        ),
        ("embed-fits", "/api/embed", ("prompt_eval_count",), {"input": "word " * 63, "options": {"num_ctx": 64}}),
        (
            "embed-one-too-many",
            "/api/embed",
            (),
            {"input": "word " * 64, "options": {"num_ctx": 64}, "truncate": False},
        ),
        ("embeddings-too-long", "/api/embeddings", (), {"prompt": "word " * 100, "options": {"num_ctx": 64}}),
    )
]

OPENAI = [
    _v1("whole", equal=(*USAGE, "choices.0.finish_reason", "object", "system_fingerprint")),
    _v1("stream", equal=(), stream=True),
    _v1("stream-usage", equal=(), stream=True, stream_options={"include_usage": True}),
    _v1("json", equal=(), response_format={"type": "json_object"}, max_tokens=24),
    _v1("schema", equal=(), response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}),
    _v1("parts", messages=[{"role": "user", "content": [{"type": "text", "text": "Say hi."}]}]),
    _v1("logprobs", logprobs=True, top_logprobs=1),
    _v1("logprobs-too-many", equal=(), words=True, logprobs=True, top_logprobs=21),
    _v1("logprobs-too-many-unasked", equal=(), words=True, top_logprobs=21),
    _v1("logprobs-negative", equal=(), words=True, logprobs=True, top_logprobs=-1, stream=True),
    _v1("n-one", n=1),
    _v1("n-two", n=2),
    _v1("n-two-stream", equal=(), n=2, stream=True),
    _v1("n-zero", n=0),
    _v1("no-messages", equal=(), messages=[]),
    _v1("tools-unsupported", equal=(), tools=[TOOL]),
    _completion("whole", equal=(*USAGE, "choices.0.finish_reason", "object")),
    _completion("stream", equal=(), stream=True),
    _completion("stream-usage", equal=("usage",), stream=True, stream_options={"include_usage": True}),
    _completion("logprobs-too-many", equal=(), words=True, logprobs=21),
    _completion("logprobs-negative", logprobs=-1),
    _completion("n-two", n=2),
    _completion("n-zero", n=0),
    Case("v1-embeddings", "POST", "/v1/embeddings", {"model": MODEL, "input": ["a", "b"]}, equal=("usage", "model")),
    Case("v1-embeddings-base64", "POST", "/v1/embeddings", {"model": MODEL, "input": "a", "encoding_format": "base64"}),
    Case("v1-embeddings-empty", "POST", "/v1/embeddings", {"model": MODEL, "input": ""}),
    Case("v1-models", "GET", "/v1/models", equal=("data.0.id", "data.0.owned_by")),
    Case("v1-model", "GET", f"/v1/models/{MODEL}", equal=("id", "object", "owned_by")),
    Case("v1-model-unknown", "GET", "/v1/models/nope"),
]

ANTHROPIC = [
    _message("whole", equal=MESSAGE_USAGE),
    _message("stream", stream=True),
    _message("system", equal=MESSAGE_USAGE, system="You are a cat."),
    _message(
        "blocks", equal=MESSAGE_USAGE, messages=[{"role": "user", "content": [{"type": "text", "text": "Say hi."}]}]
    ),
    _message("no-messages", messages=[]),
    _message("no-max-tokens", max_tokens=None),
]

POSTS = {
    "generate": "/api/generate",
    "chat": "/api/chat",
    "embed": "/api/embed",
    "embeddings": "/api/embeddings",
    "show": "/api/show",
    "v1-chat": "/v1/chat/completions",
    "v1-completion": "/v1/completions",
    "v1-embeddings": "/v1/embeddings",
    "messages": "/v1/messages",
}


def _wrong(name: str, path: str) -> list[Case]:
    # One body with the fields of every API; each takes what it knows.
    everything = {"prompt": "x", "messages": _user("x"), "input": "x", "max_tokens": 4}
    native = path.startswith("/api/")
    return [
        Case(f"{name}-unknown-model", "POST", path, {"model": "nope", **everything}, words=native),
        Case(f"{name}-no-model", "POST", path, everything),
        Case(f"{name}-model-of-wrong-type", "POST", path, {**everything, "model": 5}),
        Case(f"{name}-bad-json", "POST", path, raw=b"{nope"),
        Case(f"{name}-no-body", "POST", path),
    ]


_NOT_STREAMED = {"model": "made", "stream": False}
_UNKNOWN_BLOB = {"x.bin": "sha256:" + "0" * 64}
MANAGEMENT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "copy": (
        "POST",
        "/api/copy",
        {
            "empty": {},
            "unknown": {"source": "nope", "destination": "made"},
            "bad-source": {"source": "a b", "destination": "made"},
            "quoted-source": {"source": 'a"b\\', "destination": "made"},
            "no-destination": {"source": MODEL},
            "bad-destination": {"source": MODEL, "destination": "../made"},
            "of-wrong-type": {"source": 5},
        },
    ),
    "delete": (
        "DELETE",
        "/api/delete",
        {
            "empty": {},
            "unknown": {"model": "nope"},
            "unknown-name": {"name": "nope"},
            "bad-name": {"model": "a b"},
            "quoted-name": {"model": 'a"b'},
            "of-wrong-type": {"model": 5},
        },
    ),
    "create": (
        "POST",
        "/api/create",
        {
            "empty": {},
            "bad-name": {"model": "a b"},
            "of-wrong-type": {"model": 5},
            "of-nothing": {"model": "made"},
            "of-nothing-whole": _NOT_STREAMED,
            "of-no-files": {"model": "made", "files": {}},
            "of-bad-name": {"model": "made", "from": "a b"},
            "of-bad-name-whole": _NOT_STREAMED | {"from": "a b"},
            "of-absolute-path": {"model": "made", "files": {"/x.gguf": "sha256:0"}},
            "of-path-not-clean": {"model": "made", "files": {"./x.gguf": "sha256:0"}},
            "of-bad-digest": {"model": "made", "files": {"x.gguf": "nonsense"}},
            "of-bad-digest-whole": _NOT_STREAMED | {"files": {"x.gguf": "nonsense"}},
            "of-no-type": _NOT_STREAMED | {"files": {"x.bin": "nonsense"}},
            "of-unknown-type": _NOT_STREAMED | {"files": _UNKNOWN_BLOB},
            "with-bad-template": {"model": "made", "from": MODEL, "template": "{{ .Bad"},
            "with-bad-template-whole": _NOT_STREAMED | {"from": MODEL, "template": "{{ .Bad"},
        },
    ),
}


def _managed(name: str, method: str, path: str, bodies: dict[str, Any]) -> list[Case]:
    return [
        Case(f"{name}-no-body", method, path, words=True, bare=True),
        Case(f"{name}-bad-json", method, path, raw=b"{nope", words=True, bare=True),
        *(Case(f"{name}-{what}", method, path, body, words=True, bare=True) for what, body in bodies.items()),
    ]


MANAGED = [case for name, (method, path, bodies) in MANAGEMENT.items() for case in _managed(name, method, path, bodies)]
SHOWN = [
    Case(f"show-{what}", "POST", "/api/show", {"model": name}, words=True)
    for what, name in (("empty-name", ""), ("bad-name", "a b"), ("no-tag", "nope:"), ("unknown-name", "nope/nope"))
]
WRONG = [case for name, path in POSTS.items() for case in _wrong(name, path)]
PATHS = [
    Case("path-unknown", "GET", "/api/nope"),
    Case("path-wrong-method", "GET", "/api/generate"),
    Case("path-wrong-method-tags", "POST", "/api/tags"),
    Case("path-root", "GET", "/"),
]

CASES = NATIVE + CUT + SMALL + OPENAI + ANTHROPIC + WRONG + MANAGED + SHOWN + PATHS
