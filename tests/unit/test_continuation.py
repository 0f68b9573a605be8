"""The rest of an answer that was cut: what is asked for, and what the caller sees of the seam."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.common import CAPS, Decoded
from corral.wire.continuation import Counting, Rendering, Rest, Resumed, rest_of, seam
from corral.wire.decode import DECODERS
from corral.wire.errors import UpstreamNonsense
from corral.wire.transcript import Transcript

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/api/chat": CHAT,
    "/api/generate": {"prompt": "hello"},
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hello"},
    "/v1/messages": {**CHAT, "max_tokens": 9},
}
MARK = {"continued": ["node-1", "node-2"]}


def decode(route: str, **more: Any) -> Decoded:
    body = {"model": "m", "stream": True, **BODIES[route], **more}
    return DECODERS[route](json.dumps(body).encode(), "r1", lambda model: None, CAPS)


def line(**fields: Any) -> bytes:
    return (
        json.dumps({"model": "m", "created_at": "2026-11-23T15:00:00Z", **fields}).encode().replace(b'": ', b'":')
        + b"\n"
    )


def said(chat: bool, text: str) -> bytes:
    part: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"response": text}
    return line(**part, done=False)


def last(text: str = "", prompt: int = 10, tokens: int = 3, reason: str = "stop", chat: bool = False) -> bytes:
    counts = {"done_reason": reason, "prompt_eval_count": prompt, "eval_count": tokens, "total_duration": 5}
    part: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"response": text}
    return line(**part, done=True, **counts)


def rest(options: dict[str, Any] | None = None, sent: str = "", tokens: int = 0, **more: Any) -> Rest:
    made = rest_of(json.dumps({"model": "m", "prompt": "p", "options": options, **more}).encode(), sent, tokens)
    assert made is not None
    return made


def resumed(of: Rest, route: str = "/api/generate") -> Resumed:
    decoded = decode(route)
    return Resumed(decoded.responder, decoded.upstream_path == b"/api/chat", of, 7, MARK)


def lines(out: bytes) -> list[dict[str, Any]]:
    return [json.loads(each) for each in out.splitlines() if each]


# -- what was said


@given(st.lists(st.text(min_size=1), min_size=1, max_size=80), st.booleans(), st.data())
def test_a_transcript_has_the_text_of_whole_lines_however_they_came(
    texts: list[str], chat: bool, data: st.DataObject
) -> None:
    whole = b"".join(said(chat, text) for text in texts)
    transcript, at = Transcript(chat), 0
    while at < len(whole):
        size = data.draw(st.integers(1, len(whole)))
        transcript.add(whole[at : at + size])
        at += size
    transcript.add(said(chat, "cut")[:-5])
    assert transcript.close()
    assert (transcript.text, transcript.tokens) == ("".join(texts), len(texts))


@pytest.mark.parametrize(
    "odd",
    [
        line(message={"role": "assistant", "content": "", "thinking": "hm"}, done=False),
        line(message={"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}, done=False),
        line(message={"role": "assistant", "content": "a"}, logprobs=[{}], done=False),
        line(message={"role": "assistant", "content": "a" * ((1 << 20) + 1)}, done=False),
        b"nonsense\n",
    ],
)
def test_more_than_text_is_not_continued(odd: bytes) -> None:
    transcript = Transcript(True)
    transcript.add(said(True, "a") + odd)
    assert not transcript.close()


@pytest.mark.parametrize("route", BODIES)
def test_a_stream_of_text_can_be_continued_and_nothing_else(route: str) -> None:
    assert decode(route).resumable
    assert not decode(route, stream=False).resumable
    unfit: list[dict[str, Any]] = []
    if route == "/api/chat":
        unfit = [{"tools": [{"type": "function"}]}, {"think": True}, {"format": "json"}, {"logprobs": True}]
    elif route == "/api/generate":
        unfit = [{"suffix": "x"}, {"think": True}, {"format": "json"}, {"logprobs": True}, {"images": ["aGVsbG8="]}]
        unfit += [{"_debug_render_only": True}]
    elif route == "/v1/chat/completions":
        unfit = [{"tools": [{"type": "function"}]}, {"reasoning_effort": "low"}, {"logprobs": True}]
        unfit += [{"response_format": {"type": "json_object"}}]
    elif route == "/v1/completions":
        unfit = [{"suffix": "x"}, {"logprobs": 1}]
    else:
        unfit = [{"tools": [{"name": "t"}]}, {"thinking": {"type": "enabled"}}]
    assert [more for more in unfit if decode(route, **more).resumable] == []


@pytest.mark.parametrize(
    "message",
    [{"images": ["aGVsbG8="]}, {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, {"thinking": "hm"}],
)
def test_nor_is_a_conversation_with_more_in_it(message: dict[str, Any]) -> None:
    decoded = decode("/api/chat", messages=[{"role": "user", "content": "a", **message}])
    assert rest_of(decoded.body, "", 0) is None


# -- what is asked for


def test_the_rest_is_asked_for_behind_the_rendered_prompt() -> None:
    body = decode("/api/chat", options={"num_predict": 20, "seed": 5, "stop": ["x"]}, shift=False).body
    made = rest_of(body, "and so", 2)
    assert made is not None
    assert json.loads(made.rendering) == {**json.loads(body), "_debug_render_only": True}
    assert json.loads(made.request("<p>")) == {
        **{"model": "m", "prompt": "<p>and so", "raw": True, "stream": True, "truncate": False, "keep_alive": -1},
        **{"options": {"num_predict": 18, "seed": 5, "stop": ["x"]}, "shift": False},
    }
    more = made.more("and so on", 3)
    assert json.loads(more.request("<p>"))["options"]["num_predict"] == 17
    assert "options" not in json.loads(rest().request("p"))
    assert json.loads(rest({"num_predict": -1}, "a", 5).request("p"))["options"]["num_predict"] == -1


def test_the_rendered_prompt_is_read_from_the_nodes_answer() -> None:
    rendering = Rendering(4)
    whole = line(done=False, _debug_info={"rendered_template": "<p>"})
    assert rendering.feed(whole[:9]) + rendering.feed(whole[9:]) == b""
    rendering.finish()
    assert (rendering.prompt, rendering.tokens) == ("<p>", 4)
    for wrong in (b"{}", b"[]", b'{"_debug_info":{"rendered_template":1}}', b'{"_debug_info":7}'):
        other = Rendering(0)
        other.feed(wrong)
        with pytest.raises(UpstreamNonsense):
            other.finish()


def test_each_count_is_of_the_whole_prompt_for_one_token_and_loads_nothing_anew() -> None:
    body = decode("/api/chat", options={"num_predict": 20, "seed": 5}, shift=False).body
    made = rest_of(body, "and so", 2)
    assert made is not None
    assert json.loads(made.count("<p>and so")) == {**json.loads(made.request("<p>")), "stream": False} | {
        "options": {"num_predict": 1, "seed": 5}
    }
    counting = Counting(4)
    whole = last("x", prompt=17)
    assert counting.feed(whole[:9]) + counting.feed(whole[9:]) == b""
    counting.finish()
    assert (counting.found, counting.tokens, counting.prompt_tokens) == (17, 4, 0), "it is no usage of the caller's"
    for untold in (b"{}", b'{"prompt_eval_count":-1}', b'{"prompt_eval_count":"7"}'):
        other = Counting(0)
        other.feed(untold)
        other.finish()
        assert other.found == 0
    with pytest.raises(UpstreamNonsense):
        Counting(0).finish()


@pytest.mark.parametrize(
    ("limit", "prompt", "whole", "tokens"),
    [
        (60, 41, 71, 30),  # ten emoji: ten lines
        (60, 41, 49, 10),  # no fewer than lines: a space has become one token with the prompt's last one
        (60, 41, 131, 60),  # no node goes beyond the limit
        (None, 41, 71, 30),
        (None, 41, 131, 40),  # nor are there more tokens than bytes
        (60, 0, 71, 10),  # it told nothing
        (60, 41, 0, 10),
    ],
)
def test_what_was_sent_is_as_many_tokens_as_the_next_node_counts(
    limit: int | None, prompt: int, whole: int, tokens: int
) -> None:
    made = rest({"num_predict": limit} if limit else None, "\U0001f426" * 10, 10).counted(prompt, whole)
    assert (made.tokens, made.prompt) == (tokens, prompt)
    if limit:
        assert json.loads(made.request("p"))["options"]["num_predict"] == max(1, limit - tokens)
    assert made.more("more", 3).prompt == prompt


# -- what the caller sees


def test_a_native_chat_goes_on_in_its_own_lines_and_counts_once() -> None:
    decoded = decode("/api/chat")
    inner = decoded.responder
    inner.feed(said(True, "one ") + said(True, "two ")[:-9])
    # What comes with it is sent: nobody writes it again.
    assert inner.feed(said(True, "two ")[-9:] + b'{"error":"unexpected EOF"}\n') == said(True, "two ")
    made = Resumed(inner, True, rest({"num_predict": 9}, "one two ", 2), 7, MARK)
    out = made.feed(said(False, "three") + last(prompt=12, tokens=2, reason="length"))
    shown = lines(out + made.finish())
    assert [each["message"] for each in shown] == [{"role": "assistant", "content": text} for text in ("three", "")]
    end = shown[-1]
    assert (end["done"], end["done_reason"], end["total_duration"]) == (True, "length", 5)
    assert (end["prompt_eval_count"], end["eval_count"]) == (10, 4)
    assert end["corral"] == MARK
    assert "response" not in end
    assert (made.prompt_tokens, made.tokens, made.done, made.sent()) == (10, 4, True, "one two three")


def test_lines_of_several_tokens_count_as_what_they_are() -> None:
    """Five emoji of three tokens each, the other five on the next node: 30 tokens, and the prompt as it was."""
    made = resumed(rest({"num_predict": 30}, "\U0001f426" * 5, 5).counted(41, 56))
    pieces = [said(False, "\U0001f426") for _ in range(5)]
    (*_, end) = lines(made.feed(b"".join(pieces) + last(prompt=56, tokens=15, reason="length")))
    assert (end["prompt_eval_count"], end["eval_count"]) == (41, 30)
    # What only lacked its last line is not taken for one that has 20 tokens left.
    mute = resumed(rest({"num_predict": 30}, "\U0001f426" * 10, 10).counted(41, 71))
    shown = lines(mute.feed(said(False, "\U0001f426") + last(prompt=71, tokens=1, reason="length")))
    assert [(each["response"], each["done"]) for each in shown] == [("", True)]
    assert (shown[0]["prompt_eval_count"], shown[0]["eval_count"]) == (41, 30)
    # A last line that has no counts, or that is not waited for.
    untold = resumed(rest(None, "\U0001f426", 1).counted(41, 44))
    (end,) = lines(untold.feed(last(prompt=0, tokens=2)))
    assert (end["prompt_eval_count"], end["eval_count"]) == (41, 5)


def test_openai_and_anthropic_hear_of_it_in_their_last_event() -> None:
    for route in ("/v1/chat/completions", "/v1/completions", "/v1/messages"):
        decoded = decode(route, **({"stream_options": {"include_usage": True}} if "messages" not in route else {}))
        chat = decoded.upstream_path == b"/api/chat"
        begun = decoded.responder.feed(said(chat, "one ") + b'{"cut')
        made = Resumed(decoded.responder, chat, rest(None, "one ", 1), 7, MARK)
        out = begun + made.feed(said(False, "two") + last(prompt=11, tokens=2)) + made.finish()
        events = [json.loads(each[6:]) for each in out.decode().splitlines() if each.startswith("data: {")]
        marked = [event for event in events if "corral" in event]
        assert {json.dumps(event["corral"]) for event in marked} == {json.dumps(MARK)}
        assert "stop" in json.dumps(marked[0]) or "end_turn" in json.dumps(marked[0])
        usage = next(event["usage"] for event in reversed(events) if event.get("usage"))
        assert sorted(usage.values())[:2] == [3, 10]


def test_an_answer_that_lacked_its_last_line_alone_gets_it() -> None:
    made = resumed(rest({"num_predict": 2}, "one two", 2))
    end = lines(made.feed(said(False, " three") + last(prompt=12, tokens=1, reason="length")))
    assert [(each["response"], each["done"]) for each in end] == [("", True)]
    assert (end[0]["done_reason"], end[0]["prompt_eval_count"], end[0]["eval_count"]) == ("length", 10, 2)


def test_a_node_that_fails_at_the_rest_is_told_from_its_line() -> None:
    made = resumed(rest(None, "one", 1))
    (sent,) = lines(made.feed(said(False, " two") + b'{"error":"unexpected EOF"}\n'))
    assert made.error is not None
    assert (sent["response"], made.sent(), made.tokens) == (" two", "one two", 2), (
        "who goes on with it has what was sent"
    )
    made = resumed(rest(None, "one", 1))
    with pytest.raises(UpstreamNonsense):
        made.feed(said(False, " two") + b"nonsense\n")
    assert made.sent() == "one", "nothing that came with nonsense is sent"
    ended = resumed(rest(None, "one", 1))
    ended.feed(last())
    with pytest.raises(UpstreamNonsense):
        ended.feed(said(False, "more"))


STOPS = ["<end>", "\n\n", "aab"]


@given(st.text("<end>\nab ", max_size=24), st.integers(0, 24), st.lists(st.integers(1, 4), min_size=30, max_size=30))
def test_a_stop_string_across_the_seam_ends_the_answer_there(whole: str, cut: int, sizes: list[int]) -> None:
    """As if nothing had been cut, but that what was sent before the seam is sent."""
    places = [at for stop in STOPS if (at := whole.find(stop)) >= 0]
    sent, after = whole[:cut], whole[cut:]
    if any(stop in sent for stop in STOPS) or any(stop in after for stop in STOPS):
        return  # that is the nodes' own work
    made = resumed(rest({"stop": STOPS}, sent, 1))
    out, at = b"", 0
    for size in sizes:
        if at < len(after) and not made.done:
            out += made.feed(said(False, after[at : at + size]))
            at += size
    if not made.done:
        out += made.feed(last())
    shown = lines(out)
    text = "".join(each["response"] for each in shown)
    assert shown[-1]["done"] is True
    assert sent + text == (whole[: max(min(places), len(sent))] if places else whole)
    assert made.sent() == sent + text
    if places:
        assert shown[-1]["done_reason"] == "stop"


def test_a_stop_string_that_is_complete_leaves_the_rest_unwanted() -> None:
    assert seam("abc<en", ["<end>", "x"]) == ("d>",)
    made = resumed(rest({"stop": ["<end>"]}, "abc<en", 3))
    assert not made.early
    out = lines(made.feed(said(False, "d> and more")))
    assert made.early and made.done
    assert (out[-1]["response"], out[-1]["done_reason"], out[-1]["prompt_eval_count"]) == ("", "stop", 7)


def test_what_comes_in_one_piece_behind_a_stop_string_is_not_wanted_either() -> None:
    made = resumed(rest({"stop": ["<end>"]}, "abc<en", 3))
    out = lines(made.feed(said(False, "d>") + said(False, " and more") + last()))
    assert made.early and [each["done"] for each in out] == [True]
