"""A load test's result as a run would make it, from answers that were never given."""

from __future__ import annotations

import random

from corral.loadtest import answers, outcome, thresholds
from corral.loadtest.client import Answer
from corral.loadtest.guard import Target
from corral.loadtest.lengths import parse
from corral.loadtest.measure import Objectives, Recorder
from corral.loadtest.requests import Shape
from corral.loadtest.result import Result
from corral.loadtest.run import Options, Run
from corral.loadtest.schedule import Load, jobs


def result(command: str = "corral loadtest run", models: tuple[str, ...] = ("a", "b"), slow: float = 1.0) -> Result:
    """Two hundred requests on two nodes, each tenth failed."""
    target = Target("http://127.0.0.1:1", "127.0.0.1", 1, False, "127.0.0.1")
    load = Load(
        "poisson", tuple((model, 1.0) for model in models), ("k1",), 200, 60.0,
        rate=20.0, prompt_tokens=parse("64"), max_tokens=parse("64"),
    )  # fmt: skip
    options = Options(target, Shape(target, "native", "chat", True), load, ("secret-of-k1",))
    rng, recorder = random.Random(0), Recorder(Objectives(ttft=0.1), 0.0)
    for job in jobs(load):
        assert job.due is not None
        recorder.begun(job.due, 0.0)
        first = job.due + slow * rng.expovariate(10)
        reader = answers.reader("native", True)
        reader.times = [first + at * 0.02 for at in range(20)]
        answer = Answer(reader, status=200, kind="ok", ended=reader.times[-1])
        answer.headers = {"x-corral-node": f"node-{job.number % 2 + 1}", "x-corral-queue-ms": "3"}
        if job.number % 10 == 0:
            answer.kind, answer.reason = "truncated", "the connection was cut"
        recorder.ended(answer, job.due, job.model, "k1", 0)
    judged = [thresholds.parse("p95_ttft<1s"), thresholds.parse("error_rate<1%")]
    return outcome.result(options, Run(recorder, 1_700_000_000.0, 0.05, connections=9), command, judged)
