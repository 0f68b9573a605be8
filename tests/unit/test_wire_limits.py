"""What a body may hold, what of it is ignored, and what a model's policy makes of its options."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from corral.config.settings import ModelSettings
from corral.wire.common import CAPS, Caps
from corral.wire.decode import DECODERS, Decoded
from corral.wire.errors import ApiError
from corral.wire.options import ModelPolicy, check

CHATS = ["/api/chat", "/v1/chat/completions", "/v1/messages"]
ROUTES = [*CHATS, "/api/generate", "/v1/completions", "/api/embed", "/api/embeddings", "/v1/embeddings", "/api/show"]
PICTURE = "aGVsbG8="


def decode(route: str, body: dict[str, Any], policy: ModelPolicy | None = None, caps: Caps = CAPS) -> Decoded:
    return DECODERS[route](json.dumps(body).encode(), "r1", lambda model: policy, caps)


def small(route: str) -> dict[str, Any]:
    """A small right body of a route."""
    body: dict[str, Any] = {"model": "m"}
    if route in CHATS:
        body["messages"] = [{"role": "user", "content": "hello"}]
    if route == "/v1/messages":
        body["max_tokens"] = 5
    return body | ({"input": "a"} if route.endswith(("embed", "v1/embeddings")) else {})


def images(route: str, count: int) -> dict[str, Any]:
    """A chat with images."""
    url = f"data:image/png;base64,{PICTURE}"
    source = {"type": "base64", "media_type": "image/png", "data": PICTURE}
    part = {"type": "image_url", "image_url": {"url": url}} if "completions" in route else {}
    part = part or {"type": "image", "source": source}
    message: dict[str, Any] = {"role": "user", "content": [part] * count}
    if route == "/api/chat":
        message = {"role": "user", "content": "", "images": [PICTURE] * count}
    return small(route) | {"messages": [message]}


# -- what may name an upstream


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "name", ["api_base", "remote_host", "remote_model", "azure_endpoint", "fallbacks", "proxy_url"]
)
def test_a_field_that_could_name_an_upstream_is_refused_by_name(route: str, name: str) -> None:
    with pytest.raises(ApiError, match=f"`{name}` is not accepted") as refused:
        decode(route, {"unknown": 1} | small(route) | {name: "http://127.0.0.1:1"})
    assert (refused.value.status, refused.value.param) == (400, name)


@pytest.mark.parametrize("route", CHATS)
@pytest.mark.parametrize("url", ["http://a/b.png", "https://a", "file:///etc/passwd", "FTP://a", "gopher://a"])
def test_an_image_by_its_address_is_refused(route: str, url: str) -> None:
    body = images(route, 1)
    if route == "/api/chat":
        body["messages"][0]["images"] = [url]
    elif route == "/v1/messages":
        body["messages"][0]["content"][0]["source"] = {"type": "url", "url": url}
    else:
        body["messages"][0]["content"][0]["image_url"]["url"] = url
    # Each API by itself, in its own words: what all of them come to looks again.
    words = {
        "/api/chat": "inline as base64",
        "/v1/messages": "Only base64 images",
        "/v1/chat/completions": "base64 encoded data|invalid image input",
    }
    with pytest.raises(ApiError, match=words[route]) as refused:
        decode(route, body)
    assert refused.value.status == 400


def test_an_image_of_a_completion_too() -> None:
    with pytest.raises(ApiError, match="inline"):
        decode("/api/generate", {"model": "m", "prompt": "a", "images": ["http://a"]})


# -- what is ignored


@pytest.mark.parametrize("route", ROUTES)
def test_other_unknown_fields_are_ignored_and_counted(route: str) -> None:
    plain = decode(route, small(route))
    made = decode(route, {"user": "u-1", **small(route), "store": False, "metadata": {"a": [1]}})
    assert (plain.ignored, made.ignored) == (0, 3)
    assert made.body == plain.body


def test_a_field_with_a_name_of_its_own_on_the_wire_is_known() -> None:
    made = decode("/api/chat", small("/api/chat") | {"_debug_render_only": True})
    assert (made.ignored, json.loads(made.body)["_debug_render_only"]) == (0, True)
    made = decode("/api/chat", {"x": 1} | small("/api/chat") | {"_debug_render_only": True})
    assert (made.ignored, json.loads(made.body)["_debug_render_only"]) == (1, True)


def test_an_unknown_field_hides_no_error_behind_it() -> None:
    with pytest.raises(ApiError, match=r"messages\[0\].role"):
        decode("/api/chat", {"x": 1, "model": "m", "messages": [{"role": 3}]})


# -- caps


@pytest.mark.parametrize("route", CHATS)
def test_messages_images_tools_and_stops_are_capped(route: str) -> None:
    caps = Caps(messages=2, images=2, tools=2, stops=2)
    body = small(route)
    tool = {"name": "f"} if route == "/v1/messages" else {"type": "function", "function": {"name": "f"}}

    def stops(count: int) -> dict[str, Any]:
        texts = [str(number) for number in range(count)]
        return {
            "/api/chat": {"options": {"stop": texts}},
            "/v1/messages": {"stop_sequences": texts},
            "/v1/chat/completions": {"stop": texts},
        }[route]

    for fit, more, word in [
        (body | {"messages": body["messages"] * 2}, body | {"messages": body["messages"] * 3}, "2 messages"),
        (images(route, 2), images(route, 3), "2 images|2 messages"),
        (body | {"tools": [tool] * 2}, body | {"tools": [tool] * 3}, "2 tools"),
        (body | stops(2), body | stops(3), "2 stop strings"),
    ]:
        decode(route, fit, caps=caps)
        with pytest.raises(ApiError, match=f"at most ({word})"):
            decode(route, more, caps=caps)


@pytest.mark.parametrize("route", ["/api/embed", "/v1/embeddings"])
def test_inputs_are_capped(route: str) -> None:
    decode(route, {"model": "m", "input": ["a"] * 2}, caps=Caps(inputs=2))
    with pytest.raises(ApiError, match="at most 2 inputs"):
        decode(route, {"model": "m", "input": ["a"] * 3}, caps=Caps(inputs=2))


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("n", [0, 2, -1, 10**9])
def test_one_answer_a_request(route: str, n: int) -> None:
    decode(route, small(route) | {"n": 1})
    with pytest.raises(ApiError, match="n must be 1"):
        decode(route, small(route) | {"n": n})


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("depth", [70, 400, 5000])
def test_nesting_is_capped_in_what_is_ignored_too(route: str, depth: int) -> None:
    raw = json.dumps(small(route)).encode()[:-1] + b',"x":' + b"[" * depth + b"]" * depth + b"}"
    with pytest.raises(ApiError, match="nested deeper than 64"):
        DECODERS[route](raw, "r", lambda model: None, CAPS)


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/messages"])
def test_nesting_is_capped_in_the_parts_of_a_message(route: str) -> None:
    deep: Any = "x"
    for _ in range(70):
        deep = [deep]
    message = {"role": "user", "content": [{"type": "text", "text": "a", "x": deep}]}
    with pytest.raises(ApiError, match="nested deeper than 64"):
        decode(route, small(route) | {"messages": [message]})


# -- options


NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False))
RULES = st.one_of(st.just("refuse"), st.integers(-5, 5), st.fixed_dictionaries({"min": st.just(-1), "max": st.just(3)}))
NAMES = st.sampled_from(["num_predict", "temperature", "seed", "top_k", "num_keep"])


@given(st.dictionaries(NAMES, RULES), st.dictionaries(NAMES, NUMBERS))
def test_a_policy_holds_whatever_is_asked(rules: dict[str, Any], asked: dict[str, Any]) -> None:
    policy = ModelPolicy.from_entry({"options": rules, "num_ctx": 512})
    try:
        sent = check(asked, policy)
    except ApiError as error:
        assert error.status == 400 and error.param is not None
        name = error.param.removeprefix("options.")
        tiny = name == "temperature" and 0 < asked[name] < 1e-20
        assert rules.get(name) == "refuse" or abs(asked[name]) > 2**31 - 1 or tiny
        return
    assert sent["num_ctx"] == 512
    json.dumps(sent)
    for name, rule in rules.items():
        if rule == "refuse":
            assert name not in sent
        elif isinstance(rule, dict):
            assert name not in sent or -1 <= sent[name] <= 3
        else:
            assert sent[name] == rule


@pytest.mark.parametrize("asked", [{}, {"num_predict": -1}, {"num_predict": -2}, {"num_predict": 10**6}])
def test_a_bound_of_the_answer_holds_for_who_states_none(asked: dict[str, Any]) -> None:
    policy = ModelPolicy.from_entry({"options": {"num_predict": {"max": 100}}})
    assert check(asked, policy) == {"num_predict": 100}
    made = decode("/v1/chat/completions", small("/v1/chat/completions"), policy)
    assert (made.max_tokens, json.loads(made.body)["options"]["num_predict"]) == (100, 100)


RELOADING = {"num_ctx": 99, "num_gpu": 1, "num_thread": 3, "num_batch": 7, "main_gpu": 1, "use_mmap": False}


@pytest.mark.parametrize("policy", [None, ModelPolicy(num_ctx=2048, pinned={"num_thread": 1})])
def test_every_caller_has_the_same_runner(policy: ModelPolicy | None) -> None:
    """Other values of a runner's options, by any API and by none, are the same options at the node."""
    bodies = [
        decode("/api/chat", small("/api/chat") | {"options": RELOADING, "keep_alive": 0}, policy),
        decode("/api/chat", small("/api/chat"), policy),
        decode("/v1/chat/completions", small("/v1/chat/completions") | {"num_ctx": 5, "options": RELOADING}, policy),
        decode("/v1/messages", small("/v1/messages") | RELOADING, policy),
        decode("/api/embed", small("/api/embed") | {"options": RELOADING}, policy),
    ]
    runners = [
        {name: value for name, value in (json.loads(made.body).get("options") or {}).items() if name in RELOADING}
        for made in bodies
    ]
    assert runners == [{"num_ctx": 2048, "num_thread": 1} if policy else {}] * len(bodies)
    assert {json.loads(made.body)["keep_alive"] for made in bodies} == {-1}


@pytest.mark.parametrize("name", ["seed", "top_k", "num_predict"])
@pytest.mark.parametrize("value", [10**30, -(10**30), 1e300, 2**60])
@pytest.mark.parametrize("policy", [None, ModelPolicy(num_ctx=1)])
def test_a_whole_number_that_no_runner_can_hold_is_refused(name: str, value: float, policy: ModelPolicy | None) -> None:
    with pytest.raises(ApiError, match=f'"{name}" is out of range'):
        decode("/api/chat", small("/api/chat") | {"options": {name: value}}, policy)


@pytest.mark.parametrize("policy", [None, ModelPolicy(num_ctx=1)])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("repeat_penalty", value) for value in (0, 0.0, 1e-40, -0.5, 1e9)),
        *((name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-3e38, 3e38, 10**6)),
        ("temperature", 1e-39),
    ],
)
def test_an_option_that_ends_a_runner_is_refused(name: str, value: float, policy: ModelPolicy | None) -> None:
    with pytest.raises(ApiError, match=f'"{name}" is out of range') as refused:
        decode("/api/chat", small("/api/chat") | {"options": {name: value}}, policy)
    assert (refused.value.status, refused.value.param) == (400, f"options.{name}")
    if name != "repeat_penalty":
        with pytest.raises(ApiError, match="is out of range"):
            decode("/v1/chat/completions", small("/v1/chat/completions") | {name: value}, policy)


def test_options_at_their_bounds_are_taken() -> None:
    for options in (
        {"repeat_penalty": 1e-3, "presence_penalty": -1e3, "frequency_penalty": -1e3, "temperature": 1e-20},
        {"repeat_penalty": 1e3, "presence_penalty": 1e3, "frequency_penalty": 1e3, "temperature": 1e9},
        {"repeat_penalty": 1, "temperature": 0.0},
        {"temperature": -1.0, "repeat_last_n": -1},
    ):
        made = decode("/api/chat", small("/api/chat") | {"options": options})
        assert json.loads(made.body)["options"] == options


def test_log_probabilities_are_asked_for_as_ollama_asks_for_them() -> None:
    def asked(route: str, **more: Any) -> dict[str, Any]:
        body = json.loads(decode(route, small(route) | more).body)
        return {name: body[name] for name in ("logprobs", "top_logprobs") if body.get(name)}

    chat, completion = "/v1/chat/completions", "/v1/completions"
    assert asked(chat, logprobs=True, top_logprobs=3) == {"logprobs": True, "top_logprobs": 3}
    # What is out of range is the node's to refuse, whether probabilities are wanted or not.
    assert asked(chat, top_logprobs=21) == {"top_logprobs": 21}
    assert asked(chat, logprobs=False, top_logprobs=-1) == {"top_logprobs": -1}
    assert asked(completion, logprobs=3) == {"logprobs": True, "top_logprobs": 3}
    assert asked(completion, logprobs=-1) == asked(completion, logprobs=0) == {}


SCHEMAS = [
    {"type": "string", "maxLength": 2001},
    {"type": "string", "minLength": -1},
    {"type": "string", "maxLength": 5000.0},
    {"type": "string", "minLength": 5, "maxLength": 3},
    {"type": "array", "minItems": 10**30},
    {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "array", "maxItems": 3000}]}},
    {"type": "string", "pattern": "^a{3000}$"},
    {"type": "string", "pattern": "^(b{2}|a{0,3000})$"},
    {"type": "string", "pattern": "^a{ +0000000003000}$"},
    {"type": "string", "pattern": r"^\\{3000}$"},
    {"type": "string", "pattern": "^a{" + "9" * 5000 + ",}$"},
    {"type": "object", "properties": {"enum": {"type": "string", "maxLength": 5000}}},
    {"$defs": {"default": {"type": "string", "maxLength": 5000}}},
]
FINE = [
    {"type": "string", "minLength": 0, "maxLength": 2000, "pattern": r"^a{2,2000}b{3}c{1,}\{3000\}$"},
    {"type": "array", "minItems": 2000, "maxItems": 2000, "items": {"type": "integer", "maximum": 10**9}},
    {"type": "object", "properties": {"maxLength": {"type": "integer"}, "pattern": {"enum": [5000, True]}}},
]


def schema_bodies(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Bodies of each route that takes a schema."""
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    chat, openai = "/api/chat", "/v1/chat/completions"
    return [
        (chat, small(chat) | {"format": schema}),
        ("/api/generate", {"model": "m", "prompt": "p", "format": schema}),
        (openai, small(openai) | {"response_format": form}),
    ]


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_a_schema_that_ends_a_runner_is_refused(schema: dict[str, Any]) -> None:
    for route, body in schema_bodies(schema):
        with pytest.raises(ApiError, match=r"^format: ") as refused:
            decode(route, body)
        assert (refused.value.status, refused.value.param) == (400, "format")


@pytest.mark.parametrize("schema", FINE, ids=range(len(FINE)))
def test_a_schema_within_its_bounds_goes_to_the_node_as_it_is(schema: dict[str, Any]) -> None:
    for route, body in schema_bodies(schema):
        assert json.loads(decode(route, body).body)["format"] == schema


def test_a_seed_may_be_as_large_as_json_counts() -> None:
    made = decode("/v1/chat/completions", small("/v1/chat/completions") | {"seed": 2**53})
    assert json.loads(made.body)["options"]["seed"] == 2**53


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"tempereture": 1}, "'tempereture' is no option of Ollama"),
        ({"temperature": "hot"}, "expected refuse, a number"),
        ({"seed": 1.5}, "a whole number"),
        ({"seed": True}, "a whole number"),
        ({"num_ctx": {"max": 4096}}, "reload the model"),
        ({"use_mmap": 1}, "true or false"),
        ({"stop": "x"}, "a list of texts"),
        ({"stop": {"max": 3}}, "no number"),
        ({"top_k": {}}, "min"),
        ({"top_k": {"most": 3}}, "min"),
        ({"top_k": {"min": 5, "max": 3}}, "min is above max"),
        ({"num_ctx": 4096}, "differ"),
    ],
)
def test_a_policy_that_means_nothing_stops_the_start(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        ModelSettings(name="m", num_ctx=2048, options=options)


def test_a_policy_as_it_is_written() -> None:
    options = {"num_gpu": "refuse", "num_thread": 1, "temperature": {"min": 0, "max": 1.5}, "num_predict": {"max": 9}}
    entry = ModelSettings(name="m", num_ctx=2048, options=options).model_dump(mode="json")
    policy = ModelPolicy.from_entry(entry)
    assert check({"temperature": 9.5, "num_ctx": 1}, policy) == {
        "temperature": 1.5,
        "num_predict": 9,
        "num_ctx": 2048,
        "num_thread": 1,
    }
    with pytest.raises(ApiError, match=r'"num_gpu" is refused'):
        check({"num_gpu": 0}, policy)


CONTEXT = {"model": "m", "prompt": "hello", "stream": True}


@pytest.mark.parametrize("ids", [[1], [0, 2, 3], [-1], [1 << 40]])
def test_a_context_is_not_taken(ids: list[int]) -> None:
    with pytest.raises(ApiError, match="/api/chat") as refused:
        decode("/api/generate", CONTEXT | {"context": ids})
    assert (refused.value.status, refused.value.param) == (400, "context")


def test_a_context_is_taken_whose_ids_are_below_what_corral_yaml_says() -> None:
    caps = Caps(token_ids=100)
    taken = decode("/api/generate", CONTEXT | {"context": [0, 99]}, caps=caps)
    assert json.loads(taken.body)["context"] == [0, 99]
    assert not taken.resumable, "nobody else could go on with it"
    for ids in ([100], [5, -1], [1 << 40, 1]):
        with pytest.raises(ApiError, match="from 0 to 99"):
            decode("/api/generate", CONTEXT | {"context": ids}, caps=caps)


def test_an_empty_context_is_none() -> None:
    assert decode("/api/generate", CONTEXT | {"context": []}).resumable
