"""The four targets: real Ollama and the embedded node, each bare and through a gateway."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conformance.cases import Case
from conformance.exchange import Answer, Target, send
from support.servers import Server
from support.stack import Stack

TARGETS = ("ollama", "node", "gateway-ollama", "gateway-node")
BARE = TARGETS[:2]
GATEWAYS = TARGETS[2:]
VOCABULARY = 49_152

TargetOf = Callable[[str], Target]


@pytest.fixture(scope="session")
def target_of(
    request: pytest.FixtureRequest, start_stack: Callable[..., Stack], tmp_path_factory: pytest.TempPathFactory
) -> TargetOf:
    """A target by its name; what it needs is started at its first use."""
    made: dict[str, Target] = {}
    failed: dict[str, str] = {}

    def make(name: str) -> Target:
        if name.startswith("gateway-"):
            # Which tokens the model of these tests has, so that `context` is taken.
            config = tmp_path_factory.mktemp(name) / "corral.yaml"
            config.write_text(f"gateway: {{request: {{token_ids: {VOCABULARY}}}}}\n")
            stack = start_stack("--config", str(config), "--attach", make_once(name.removeprefix("gateway-")).url)
            return Target(name, stack.url, stack.key)
        server: Server = request.getfixturevalue({"ollama": "ollama", "node": "embedded_node"}[name])
        return Target(name, server.url)

    def make_once(name: str) -> Target:
        # A target that does not start is not tried again for each of its tests.
        if name in failed:
            pytest.fail(f"{name} did not start: {failed[name]}", pytrace=False)
        if name not in made:
            try:
                made[name] = make(name)
            except Exception as error:
                failed[name] = str(error)
                raise
        return made[name]

    return make_once


@pytest.fixture(scope="session", params=TARGETS)
def target(request: pytest.FixtureRequest, target_of: TargetOf) -> Target:
    """Each of the four."""
    return target_of(request.param)


@pytest.fixture(scope="session", params=BARE)
def bare(request: pytest.FixtureRequest, target_of: TargetOf) -> Target:
    """The two without a gateway."""
    return target_of(request.param)


@pytest.fixture(scope="session", params=GATEWAYS)
def gateway(request: pytest.FixtureRequest, target_of: TargetOf) -> Target:
    """The two through a gateway."""
    return target_of(request.param)


@pytest.fixture(scope="session")
def truth(target_of: TargetOf) -> Callable[[Case], Answer]:
    """Real Ollama's answer to a case."""
    answers: dict[str, Answer] = {}

    def answer(case: Case) -> Answer:
        if case.name not in answers:
            answers[case.name] = send(target_of("ollama"), case.method, case.path, case.body, case.raw)
        return answers[case.name]

    return answer
