"""Bodies of callers: each becomes a body that a node may have, or an error of theirs."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st
from support.fuzz import PUNCTUATION, changes, fuzz, mutated

from corral.wire import bodies
from corral.wire.common import CAPS
from corral.wire.decode import DECODERS
from corral.wire.errors import ApiError
from corral.wire.options import ModelPolicy

REFUSED = frozenset(bodies.UPSTREAM_FIELDS)
RUNNER = ("num_ctx", "num_gpu", "num_thread", "num_batch", "main_gpu", "use_mmap")
NAMES = st.sampled_from(
    [
        *(
            "model",
            "messages",
            "prompt",
            "input",
            "stream",
            "options",
            "keep_alive",
            "truncate",
            "format",
            "tools",
            "system",
        ),
        *("max_tokens", "stop", "n", "temperature", "content", "role", "images", "tool_calls", "function", "arguments"),
        *(
            "type",
            "text",
            "image_url",
            "url",
            "source",
            "data",
            "thinking",
            "reasoning_effort",
            "response_format",
            "name",
        ),
        *(
            "num_ctx",
            "num_predict",
            "seed",
            "top_k",
            "tool_use_id",
            "input_schema",
            "stream_options",
            "logprobs",
            "suffix",
        ),
        *(
            "api_base",
            "remote_host",
            "user",
            "metadata",
            "_debug_render_only",
            "dimensions",
            "encoding_format",
            "context",
        ),
    ]
)
WORDS = st.sampled_from(
    ["m", "user", "tool", "system", "json", "text", "image_url", "base64", "tool_use", "tool_result"]
)
LEAVES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), WORDS),
    *(st.just("data:image/png;base64,aGk="), st.just("http://a/b"), st.just(10**30), st.just("\ud800")),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5), max_leaves=20
)
MESSAGE = {"role": "user", "content": "hello"}
VALID: dict[str, Any] = {
    "model": "m",
    "messages": [MESSAGE, {"role": "user", "content": [{"type": "text", "text": "a"}]}],
    "prompt": "a",
    "input": ["a"],
    "max_tokens": 5,
    "options": {"num_ctx": 5, "seed": 1, "stop": ["a"]},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "stream": False,
}
TOKENS = [
    *PUNCTUATION,
    b"\\",
    b"\\ud800",
    b"null",
    b"1e999",
    b"-",
    b'"x":',
    b"\xff",
    b"[" * 90,
]
POLICY = ModelPolicy(num_ctx=512, pinned={"num_thread": 1}, refused=frozenset(("num_gpu",)), clamped={"top_k": (1, 5)})


def check(route: str, fields: dict[str, Any], edits: list[tuple[int, int, bytes]], policy: ModelPolicy | None) -> None:
    raw = mutated(json.dumps(VALID | fields).encode("utf-8", "surrogatepass"), edits)
    try:
        decoded = DECODERS[route](raw, "r1", lambda model: policy, CAPS)
    except ApiError as error:
        assert error.status == 400 and error.message
        error.message.encode("utf-8", "surrogatepass")
        return
    sent = json.loads(decoded.body)
    assert decoded.upstream_path.startswith(b"/api/")
    assert not REFUSED & sent.keys()
    assert decoded.estimate >= 0 and decoded.ignored >= 0
    if route == "/api/show":
        return
    assert sent["keep_alive"] == -1
    if route != "/api/embeddings":
        assert sent["truncate"] is False
    if "embed" not in route:
        assert sent["stream"] is True
    options = sent.get("options") or {}
    held = {name: value for name, value in options.items() if name in RUNNER}
    assert held == ({"num_ctx": 512, "num_thread": 1} if policy else {})
    assert all("://" not in image for message in sent.get("messages") or [] for image in message.get("images") or [])


def test_bodies() -> None:
    fields = st.dictionaries(NAMES, VALUES, max_size=4)
    routes = st.sampled_from(sorted(DECODERS))
    assert fuzz(check, routes, fields, changes(*TOKENS), st.sampled_from([None, POLICY])) > 100
