"""The procedures for models and nodes, run block by block on a stack with real Ollama nodes and a real registry."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.process import until
from support.runbook import Shell, sections
from support.servers import MODEL, REPOSITORY
from support.site import OllamaNode, Source, digests, resident
from support.site import source as sources
from support.stack import Stack, stack


@dataclass
class Place:
    """A stack with two nodes, its corral.yaml, and a shell in the folder of that."""

    folder: Path
    source: Source
    stack: Stack
    nodes: list[OllamaNode]
    shell: Shell

    def write(self, *models: dict[str, Any]) -> None:
        """Have corral.yaml name these models."""
        listed = [{"name": f"node-{number}", "url": node.url} for number, node in enumerate(self.nodes[:2], 1)]
        given = {"nodes": listed, "mirror": {"registry": self.source.registry.name, "insecure": True}}
        (self.folder / "corral.yaml").write_text(yaml.safe_dump({**given, "models": list(models)}, sort_keys=False))

    def blocks(self, name: str, heading: str, **variables: str) -> str:
        """Run all blocks under a heading."""
        return "".join(self.shell.run(block, **variables) for block in sections(name)[heading])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("procedures")
    with ExitStack() as exits:
        source = exits.enter_context(sources(folder))
        nodes = [OllamaNode(folder / f"ollama-{number}") for number in (1, 2, 3)]
        for node in nodes:
            exits.callback(lambda node=node: node.process.end())
        made = Place(folder, source, None, nodes, None)  # type: ignore[arg-type]
        made.write()
        made.stack = exits.enter_context(stack(folder / "state", "--config", str(folder / "corral.yaml")))
        variables = {"URL": made.stack.url, "KEY": made.stack.key, "MODEL": MODEL}
        made.shell = Shell(folder, made.stack.state, **variables)
        yield made


def model(digest: str | None, **more: Any) -> dict[str, Any]:
    stated = {} if digest is None else {"digest": digest}
    return {"name": MODEL, **stated, "copies": 2, "num_ctx": 2048, "options": {"num_thread": 1}, **more}


def test_a_model_is_added_updated_rolled_back_and_removed(place: Place) -> None:
    source, name = place.source, "model-deployment"
    source.publish("first")
    place.write(model(source.first))
    said = place.blocks(name, "Add a model")
    assert '"response"' in said and f'"expected": "{source.first}"' in said

    source.publish("second")
    update, unknown, recorded = sections(name)["Update a model version"]
    told = place.shell.run(unknown)
    assert f"wrong digest: got {source.second}" in told
    assert [digests(node.url)[MODEL] for node in place.nodes[:2]] == [source.first] * 2
    place.shell.run(update, NEW=source.second)
    assert [digests(node.url)[MODEL] for node in place.nodes[:2]] == [source.second] * 2

    said = place.blocks(name, "Roll back", OLD=source.first)
    assert f"copy {MODEL} on node-1 from corral-previous/" in said
    assert [f"sha256:{resident(node.url)[0]['digest']}" for node in place.nodes[:2]] == [source.first] * 2

    place.write(model(None))
    place.shell.run("corral config reload && corral models apply --yes")
    place.shell.run(recorded)
    assert [digests(node.url)[MODEL] for node in place.nodes[:2]] == [source.second] * 2

    place.write()
    assert "no models" in place.blocks(name, "Remove a model")
    assert [digests(node.url) for node in place.nodes[:2]] == [{}, {}]


def test_a_node_is_added_maintained_and_removed(place: Place) -> None:
    source, name = place.source, "scaling"
    source.publish("first")
    place.write(model(source.first))
    place.shell.run("corral config reload && corral models apply --yes")
    place.write(model(source.first, copies=3))
    variables = {"NODE": "node-3", "NODE_URL": place.nodes[2].url}
    assert place.nodes[0].url in place.blocks(name, "Before", **variables)
    place.blocks(name, "Add a node", **variables)
    assert len(resident(place.nodes[2].url)) == 1
    place.blocks(name, "Maintenance of a node", **variables)
    names = ["node-1", "node-2", "node-3"]

    def ready() -> bool:
        states = {node["name"]: node["state"] for node in place.stack.corral("nodes", "list")}
        return states == dict.fromkeys(names, "ready")

    until(ready, "all are in service")
    place.blocks(name, "Remove a node", **variables)
    assert [node["name"] for node in place.stack.corral("nodes", "list")] == ["node-1", "node-2"]


def test_preload_models(place: Place) -> None:
    source = place.source
    source.publish("first")
    place.write(model(source.first, copies=1))
    place.shell.run(f"corral config reload && (corral models unload {MODEL} || true)")

    def script(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [str(REPOSITORY / "scripts/preload-models"), *arguments, "--state", str(place.stack.state)]
        env = {key: value for key, value in os.environ.items() if not key.startswith("CORRAL_")}
        return subprocess.run(argv, capture_output=True, text=True, timeout=240, env=env)

    done = script()
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert [len(resident(node.url)) for node in place.nodes[:2]] == [1, 1], "on every node, whatever copies says"
    assert script(MODEL, "--node", "node-1").stdout == "nothing to do\n"
    failed = script("nosuch:1b")
    assert failed.returncode == 1
    for node in ("node-1", "node-2"):
        assert f"corral: {node}: nosuch:1b: the pull of " in failed.stderr

    victim = place.nodes[1]
    victim.kill()
    until(lambda: place.stack.corral("nodes", "list")[1]["state"] == "down", "it is down")
    failed = script()
    assert (failed.returncode, f"corral: node-2: {MODEL}: the node is down" in failed.stderr) == (1, True)
    victim.start()
    until(lambda: place.stack.corral("nodes", "list")[1]["state"] == "ready", "it is back")
    assert resident(victim.url) == [], "one copy was asked for, and there is one"
    ask = {"model": MODEL, "prompt": "a", "stream": False, "options": {"num_predict": 1}}
    answer = httpx.post(place.stack.url + "/api/generate", json=ask, headers=place.stack.headers(), timeout=60)
    assert answer.status_code == 200
    assert "catalogue" in place.shell.run("corral doctor || true")
