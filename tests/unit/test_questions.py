"""What control asks gateways: who is waited for, who is named, and answers that come late."""

from __future__ import annotations

import asyncio
from typing import Any

from corral.control.gateways import Gateway
from corral.control.questions import Questions, Told
from corral.control.requests import understood, waits


class Serving:
    """A hub that knows these gateways."""

    def __init__(self, present: list[str], absent: list[str]) -> None:
        self.known, self.nudged = (present, absent), 0

    def serving(self) -> tuple[list[str], list[str]]:
        return self.known

    def nudge(self) -> None:
        self.nudged += 1


def made(present: list[str], absent: list[str] | None = None) -> tuple[Questions, Serving]:
    hub = Serving(present, absent or [])
    return Questions(hub), hub  # type: ignore[arg-type]


def test_all_that_are_present_answer_and_the_others_are_named() -> None:
    async def run() -> None:
        questions, hub = made(["a", "b"], ["c"])
        asking = asyncio.create_task(questions.ask("list", within=10))
        await asyncio.sleep(0)
        assert hub.nudged == 1
        [asked] = questions.of("a")
        assert (asked["what"], questions.of("c")) == ("list", [])
        questions.take("a", [{"number": asked["number"], "value": 1}])
        assert questions.of("a") == [], "it is asked once"
        questions.take("c", [{"number": asked["number"], "value": 3}])
        questions.take("b", [{"number": asked["number"], "value": 2}])
        told = await asking
        assert (told.answers, told.silent) == ({"a": 1, "b": 2}, ["c"])
        questions.take("b", [{"number": asked["number"], "value": 9}, {"number": [], "value": 9}, {}])

    asyncio.run(run())


def test_who_says_nothing_in_time_is_named_and_not_waited_for() -> None:
    async def run() -> None:
        questions, _ = made(["a", "b"])
        asking = asyncio.create_task(questions.ask("list", within=0.05))
        await asyncio.sleep(0)
        questions.take("b", [{"number": questions.of("b")[0]["number"], "value": 2}])
        told = await asking
        assert (told.answers, told.silent) == ({"b": 2}, ["a"])
        assert questions.of("a") == [], "nobody waits for it any more"

    asyncio.run(run())


def test_only_one_is_asked_where_only_one_can_know() -> None:
    async def run() -> None:
        questions, _ = made(["a", "b"], ["c"])
        asking = asyncio.create_task(questions.ask("cancel", "r", only="b", within=10))
        await asyncio.sleep(0)
        assert questions.of("a") == []
        questions.take("b", [{"number": questions.of("b")[0]["number"], "value": True}])
        assert (await asking).answers == {"b": True}
        assert (await questions.ask("cancel", "r", only="c")).silent == ["c"]

    asyncio.run(run())


def test_queues_of_several_gateways_add_up() -> None:
    def gateway(**queues: Any) -> Gateway:
        return Gateway("g", 0.0, "", queues={f"{name}:latest": row for name, row in queues.items()})

    told = waits(
        [gateway(m=[3, 2.0, 2, 0.0, 4.0]), gateway(m=[1, 9.5, 2, 0.0, 8.0], n=[1, 1.0, 0, 30.0, 4.0]), gateway()]
    )
    assert told == [
        {"model": "m:latest", "waiting": 4, "oldest": 9.5, "estimate": 12.5},
        {"model": "n:latest", "waiting": 1, "oldest": 1.0, "estimate": 38.0},
    ]


def test_a_gateway_whose_answer_makes_no_sense_is_as_good_as_silent() -> None:
    entry: dict[str, Any] = {
        **{name: "x" for name in ("id", "request_id", "key", "tenant", "route", "model")},
        **{"state": "queued", "position": 2, "waited": 1.0, "node": None, "tokens": 0, "attempts": 0, "age": 1.0},
        "ticket": ["x", "y", 4, 0.0, 4.0],
    }
    wrong: list[dict[str, Any]] = [
        {"ticket": ["x", "y", 1, 1.0, 1e308]},
        {"ticket": ["x", ["y"], 1, 1.0, 1.0]},
        {"age": "x"},
        {"position": -1},
        {"state": "gone"},
    ]
    answers: dict[str, Any] = {
        "good": {"requests": [entry], "total": 1},
        "number": 5,
        "empty": {},
        "half": {"requests": [{}], "total": 1},
        **{f"wrong{at}": {"requests": [entry, entry | fault], "total": 2} for at, fault in enumerate(wrong)},
    }
    told = understood(Told(answers, ["away"]))
    assert list(told.answers) == ["good"]
    assert told.silent == sorted(["away", *answers.keys() - {"good"}])
    [one] = told.answers["good"]["requests"]
    assert (one["position"], list(one["ticket"])) == (2, entry["ticket"])
