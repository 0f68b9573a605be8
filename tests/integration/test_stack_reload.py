"""`corral config reload` on a stack that runs with a corral.yaml."""

from __future__ import annotations

import json
import os
import signal
from contextlib import closing
from pathlib import Path

import yaml
from support.control import FakeNode
from support.process import until
from support.stack import stack
from support.up import corral


def test_a_changed_file_is_applied_as_far_as_that_goes(tmp_path: Path) -> None:
    first, second, third = (FakeNode() for _ in range(3))
    with closing(first), closing(second), closing(third):
        file = tmp_path / "corral.yaml"

        def write(*nodes: FakeNode, **more: object) -> None:
            listed = [{"name": f"n{node.url.rpartition(':')[2]}", "url": node.url} for node in nodes]
            file.write_text(yaml.safe_dump({"nodes": listed, **more}))

        write(first, second)
        with stack(tmp_path / "state", "--config", str(file)) as running:

            def nodes() -> dict[str, str]:
                return {node["url"]: node["state"] for node in running.corral("nodes", "list")}

            unchanged = running.corral("config", "reload")
            assert unchanged == {"reloaded": True, "file": str(file), "applied": [], "restart": []}

            write(second, third, limits={"default": {"rpm": 7}})
            done = running.corral("config", "reload")
            assert sorted(line.split()[-1] for line in done["applied"]) == ["added", "removed"]
            assert done["restart"] == ["limits.default.rpm"]
            until(lambda: nodes() == {second.url: "ready", third.url: "ready"}, "both are in service")
            assert [node["url"] for node in running.corral("status")["nodes"]] == [second.url, third.url]
            effective = yaml.safe_load((running.state / "corral.yaml").read_text())
            assert [node["url"] for node in effective["nodes"]] == [second.url, third.url]
            assert running.corral("config", "reload")["applied"] == [], "what was done is not done again"

            file.write_text("limts: {}\n")
            refused = corral("config", "reload", state=running.state)
            assert (refused.returncode, "corral.yaml:1: unknown field" in refused.stderr) == (1, True)
            write(second, third)
            said = corral("config", "reload", state=running.state)
            assert f"{file}: right" in said.stdout, said.stderr
            assert "nothing has changed" in said.stdout

            # Who restarts control finds the nodes that there are now.
            control = running.corral("status")["control"]["pid"]
            os.kill(control, signal.SIGKILL)
            until(lambda: running.corral("status")["control"]["pid"] not in (None, control), "control is started again")
            until(lambda: running.corral("status")["control"]["state"] == "up", "control answers")
            assert set(nodes()) == {second.url, third.url}
    assert json.loads((tmp_path / "state/run/given.json").read_text())["file"] == str(file)
