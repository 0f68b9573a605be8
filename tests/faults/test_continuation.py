"""An answer that its node leaves after the first token: another node goes on with it, or the caller is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.fleet import MODEL, Fleet
from support.limits import unused
from support.load import TOLD, WHOLE, Answer, body_of
from support.process import until

GENERATE, COMPLETE = "/api/generate", "/v1/completions"
ROUTES = ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/messages")
TOKENS, CUT = 48, 30
"""Of an answer, and of those after which its node is at fault: a second, in which all who ask at once have a node."""
FAULTS: dict[str, dict[str, Any]] = {
    "the connection ends": {"kind": "cut_after"},
    "the connection is reset": {"kind": "reset"},
    "the runner fails": {"kind": "fail"},
    "nothing comes any more": {"kind": "hang"},
    "no JSON comes": {"kind": "nonsense"},
    "the last line is missing": {"kind": "no_done"},
}


def body(route: str, tokens: int = TOKENS, about: str = "the horses behind the river", **more: Any) -> bytes:
    """A streamed request of a route, with its usage.

    `about`: a prompt that is at two crashes is refused, so each test that makes one has its own.
    """
    prompt = f"Tell me of {about}."
    if route in (GENERATE, COMPLETE):
        made: dict[str, Any] = {"model": MODEL, "stream": True, "prompt": prompt}
        made |= {"options": {"num_predict": tokens}} if route == GENERATE else {"max_tokens": tokens}
    else:
        made = json.loads(body_of(route, MODEL, tokens, prompt))
    if route.startswith("/v1/c"):
        made["stream_options"] = {"include_usage": True}
    return json.dumps(made | more).encode()


def events(answer: Answer) -> list[dict[str, Any]]:
    """The objects of a stream of any API."""
    lines = [line.removeprefix("data: ") for line in answer.body.decode().splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def text(answer: Answer) -> str:
    """What the model said, by any API."""
    said = []
    for event in events(answer):
        for part in (event.get("message"), event, *(event.get("choices") or ()), event.get("delta")):
            if isinstance(part, dict):
                said += [part.get("response"), part.get("text"), (part.get("delta") or {}).get("content")]
                said += [part.get("content")]
    return "".join(part for part in said if isinstance(part, str))


def usage(answer: Answer) -> tuple[int, int]:
    """Tokens of prompt and answer as the caller hears them."""
    names = (
        ("prompt_eval_count", "eval_count"),
        ("prompt_tokens", "completion_tokens"),
        ("input_tokens", "output_tokens"),
    )
    found = (0, 0)
    for event in events(answer):
        for prompt, tokens in names:
            told = event.get("usage") or event
            if told.get(tokens):
                found = int(told[prompt]), int(told[tokens])
    return found


def marks(answer: Answer) -> list[Any]:
    """What its events say of nodes that went on with it."""
    return [event["corral"] for event in events(answer) if "corral" in event]


def ask(fleet: Fleet, route: str, content: bytes, name: str) -> Answer:
    """One request of a caller of its own."""
    client = fleet.client()
    try:
        return client.ask(route, content, name)
    finally:
        client.close()


@pytest.fixture
def ready(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet, its models tested; whatever a test did to its nodes is over."""
    fleet.stack.until_continued()
    yield fleet
    for node in fleet.nodes.values():
        node.well()
    # Each gateway leaves it alone for two seconds after it failed there.
    until(
        lambda: all(ask(fleet, ROUTES[0], body(ROUTES[0], 1), "s").node == "node-1" for _ in range(6)),
        "it is used",
        120,
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_another_node_goes_on_and_the_answer_is_the_same(
    ready: Fleet, fault: str, matrix: Callable[[str, str, str], None]
) -> None:
    contents = {route: body(route, about=fault) for route in ROUTES}

    def at_once(name: str) -> dict[str, Answer]:
        with ThreadPoolExecutor(len(ROUTES)) as pool:
            asked = {
                route: pool.submit(ask, ready, route, contents[route], name + route[1:].replace("/", "-"))
                for route in ROUTES
            }
            return {route: future.result() for route, future in asked.items()}

    undisturbed = at_once("undisturbed-")
    ready.nodes["node-1"].fault(after_tokens=CUT, **FAULTS[fault])
    # Who came later than that would find node-1 left alone for what it did to the first.
    answers = at_once(f"continued-{unused()}-{fault}-".replace(" ", "-"))
    disturbed = [route for route, answer in answers.items() if answer.node == "node-1"]
    assert len(disturbed) >= 2
    for route, answer in answers.items():
        before = undisturbed[route]
        assert (before.fate, marks(before), usage(before)[1]) == (WHOLE, [], TOKENS)
        assert (answer.fate, text(answer), usage(answer)) == (WHOLE, text(before), usage(before)), str(answer)
        (record,) = ready.records(answer.request_id)
        assert (record["outcome"], record["estimated"]) == ("ok", False)
        assert (record["prompt_tokens"], record["tokens"]) == usage(before)
        if route in disturbed:
            assert {json.dumps(mark) for mark in marks(answer)} == {'{"continued": ["node-1", "node-2"]}'}
            assert (record["node"], record["continued"]) == ("node-2", "node-1,node-2")
        else:
            assert (marks(answer), record["continued"]) == ([], None)
    measured = f"{len(disturbed)} of {len(answers)} gone on with, all equal to undisturbed ones"
    matrix(f"after the first token: {fault}", "exact, or told; usage counts once", measured)


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_more_than_text_ends_with_an_error_of_its_api(ready: Fleet, route: str) -> None:
    """Of each API one that a simulated node answers; all others are in tests/integration/test_not_continued.py."""
    # On both: a slot that a gateway could not give back yet makes node-1 the busier one.
    for node in ready.nodes.values():
        node.fault(kind="cut_after", after_tokens=5)
    thought = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "b"}]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": thought}]
    more: dict[str, Any] = {"logprobs": 1 if route == COMPLETE else True}
    if route == "/v1/messages":
        more = {"messages": [*turns, {"role": "user", "content": "c"}]}
    elif route == GENERATE:
        more = {"format": "json"}
    content = body(route, about=f"what {route} cannot be gone on with", **more)
    answer = ask(ready, route, content, f"told-{route}".replace("/", "-"))
    assert (answer.status, answer.fate) == (200, TOLD), answer.body[-300:]
    assert text(answer), "it was told before the first token"
    assert marks(answer) == []


def test_it_can_be_gone_on_with_twice_but_not_for_ever(ready: Fleet) -> None:
    # Of its own: a prompt at two crashes is refused from then on.
    name = unused()
    content = body("/api/chat", messages=[{"role": "user", "content": f"Who is at two crashes, if not {name}?"}])
    undisturbed = ask(ready, "/api/chat", content, "undisturbed")
    for node in ready.nodes.values():
        node.fault(kind="fail", after_tokens=5)
    answer = ask(ready, "/api/chat", content, f"twice-{name}")
    assert answer.fate == TOLD
    assert text(undisturbed).startswith(text(answer))
    (record,) = ready.records(f"twice-{name}")
    # Which one is first is by the slots that are in use: one may not have been given back yet.
    assert record["continued"].startswith(("node-1,node-2", "node-2,node-1"))
    assert record["attempts"] <= 3
    assert 5 <= record["tokens"] <= 15
    again = ask(ready, "/api/chat", content, "refused")
    assert (again.status, b"refused" in again.body) == (400, True)


def test_a_stop_string_that_the_seam_divides_ends_the_answer(ready: Fleet) -> None:
    route = "/api/chat"
    whole = text(ask(ready, route, body(route), "undisturbed"))
    words = whole.split(" ")
    stop = f"{words[7]} {words[8]}"
    content = body(route, options={"num_predict": TOKENS, "stop": [stop]})
    undisturbed = ask(ready, route, content, "stopped")
    ready.nodes["node-1"].fault(kind="cut_after", after_tokens=8)
    answer = ask(ready, route, content, "stopped-at-seam")
    assert answer.fate == WHOLE
    # The simulated node sends what may begin a stop string, which Ollama holds back: that is out.
    assert text(answer) in (text(undisturbed), text(undisturbed) + words[7])
    assert events(answer)[-1]["done_reason"] == "stop"
