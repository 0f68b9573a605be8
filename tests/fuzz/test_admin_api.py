"""Control's admin API by its own description, as it says and as it does not: nothing that is sent fails in control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from support.control import FakeNode, Running, make_key
from support.fuzz import fuzz

from corral.control.app import _api


@pytest.fixture
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    node = FakeNode()
    made = Running(tmp_path_factory.mktemp("control") / "state", nodes=[{"url": node.url}])
    yield made
    made.close()
    node.close()


# Control shares this process and, with its jitter, Python's `random`, which Hypothesis takes for a strategy's doing.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
def test_no_call_of_the_admin_api_is_a_fault_of_controls(control: Running) -> None:
    described = schemathesis.openapi.from_dict(_api(None).openapi())
    operations = [one.ok() for one in described.get_all_operations() if one.ok().path.startswith("/admin/")]
    assert len(operations) >= 30
    key = str(control.admin.headers["authorization"])
    known = {"key": make_key(control)["id"], "tenant": "default", "name": "node-1"}
    asked: Counter[str] = Counter()
    seen: Counter[int] = Counter()

    def check(case: Any, there: bool) -> None:
        if there:
            # What exists is not found by chance.
            case.path_parameters = {name: known.get(name, value) for name, value in case.path_parameters.items()}
        answer = case.call(base_url=control.url, headers={"Authorization": key}, timeout=20)
        asked[case.operation.label] += 1
        seen[answer.status_code] += 1
        told = described.raw_schema["paths"][case.operation.path][case.operation.method.lower()]["responses"]
        assert str(answer.status_code) in told, f"{answer.status_code}: {answer.text}\n{case.as_curl_command()}"
        assert answer.status_code < 500, f"{answer.status_code}: {answer.text}\n{case.as_curl_command()}"

    each = [
        one.as_strategy(generation_mode=mode)
        for one in operations
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    ]
    # Each of them first, however slow the machine is: among so many, chance alone leaves some out for long.
    few = settings(max_examples=2, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    for one in operations:
        few(given(one.as_strategy(), st.just(True))(check))()
    assert len(asked) == len(operations)
    fuzz(check, st.one_of(each), st.booleans(), share=2 / 7)
    assert min(seen[status] for status in (200, 201, 400, 401, 404, 409)) > 0, seen
