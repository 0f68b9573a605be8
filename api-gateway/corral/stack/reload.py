"""`corral config reload`: what a changed corral.yaml can do to a stack that runs, and what waits for the next start."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote

from corral.config.settings import ModelSettings, NodeSettings, Settings, load
from corral.stack import haproxy, plan
from corral.stack.state import StateFolder, read_json, running, write_private

_ALSO_SETTINGS = ("OLLAMA_URL", "REDIS_URL")

Ask = Callable[[str, str, object], Any]
"""Method, path below /admin, body; the answer's JSON. Raises StackError."""


@dataclass
class Changes:
    """Nodes to add and to remove now, the catalogue if it is another, and fields (dotted) that need a restart."""

    add: list[NodeSettings] = field(default_factory=list)
    remove: list[NodeSettings] = field(default_factory=list)
    restart: list[str] = field(default_factory=list)
    models: tuple[ModelSettings, ...] | None = None


@dataclass(frozen=True)
class Reloaded:
    """What was done. ``file`` None: the stack was started without one."""

    file: str | None
    applied: list[str]
    restart: list[str]

    def as_dict(self) -> dict[str, Any]:
        return {"reloaded": True, **asdict(self)}


def remember(
    state: StateFolder, file: str | None, port: int | None, env: Mapping[str, str], given: Settings, nodes: bool
) -> None:
    """Keep what a stack was started with. ``nodes``: it uses those of the file."""
    said = {
        name: value
        for name, value in env.items()
        if (name.startswith("CORRAL_") or name in _ALSO_SETTINGS) and name != "CORRAL_ADMIN_KEY"
    }
    kept = {"file": file and os.path.abspath(file), "port": port, "env": said, "nodes": nodes}
    write_private(state.given, json.dumps({**kept, "settings": given.model_dump(mode="json")}))


def file_of(state: StateFolder) -> str | None:
    """The corral.yaml that a stack was started with; None: without one."""
    return (read_json(state.given) or {}).get("file")


def changes(old: Settings, new: Settings, nodes: bool) -> Changes:
    """What differs. ``nodes``: the stack uses those of the file, so they can come and go."""
    found = Changes()
    before, after = {node.name: node for node in old.nodes}, {node.name: node for node in new.nodes}
    if nodes:
        found.add = [node for name, node in after.items() if name not in before]
        found.remove = [node for name, node in before.items() if name not in after]
        for name in before.keys() & after.keys():
            fields = _differ(before[name].model_dump(mode="json"), after[name].model_dump(mode="json"))
            found.restart += [f"nodes.{name}.{one}" for one in fields]
    elif old.nodes != new.nodes:
        found.restart.append("nodes")
    if old.models != new.models:
        found.models = new.models
    others = {"nodes", "models"}
    found.restart += _differ(old.model_dump(mode="json", exclude=others), new.model_dump(mode="json", exclude=others))
    found.restart.sort()
    return found


def reload(state: StateFolder, ask: Ask) -> Reloaded:
    """Check the file that the stack was started with, do what can be done now, and have HAProxy read its own anew.

    Raises:
        ConfigError: the file is wrong; nothing was done.
        StackError: nothing runs, or a step failed; a second call goes on where the first one ended.
    """
    if not running(state):
        raise state.nothing_runs(" reads the configuration")
    kept = read_json(state.given)
    done = Reloaded(None, [], [])
    if kept is not None and kept["file"]:
        new = load(kept["file"], kept["env"], whole=True)
        if kept["port"] is not None:
            new = new.model_copy(update={"edge": new.edge.model_copy(update={"port": kept["port"]})})
        old = Settings.model_validate(kept["settings"])
        found = changes(old, new, kept["nodes"])
        done = Reloaded(kept["file"], list(_apply(found, ask)), found.restart)
        if found.add or found.remove or found.models is not None:
            _keep(state, kept, old, found)
    haproxy.reload(state)
    return done


def _apply(found: Changes, ask: Ask) -> Iterator[str]:
    if found.models is not None:
        # Before nodes come, which are given its models.
        ask("PUT", "/models/catalogue", [model.model_dump(mode="json") for model in found.models])
        yield "models: the catalogue is replaced; `corral models plan` shows what follows from that"
    if not found.add and not found.remove:
        return
    present = {str(node["name"]): str(node["url"]) for node in ask("GET", "/nodes", None)["nodes"]}
    fresh = {node.url for node in found.add}
    # New ones come first, so that the fleet is never smaller than it must be; one address has one name at a time.
    first = [node for node in found.remove if node.url in fresh]
    steps = [(node, False) for node in first] + [(node, True) for node in found.add]
    for node, wanted in [*steps, *((node, False) for node in found.remove if node not in first)]:
        if wanted and present.get(node.name) != node.url:
            ask("POST", "/nodes", node.model_dump(mode="json"))
            yield f"nodes: {node.name} added"
        elif not wanted and node.name in present:
            ask("DELETE", f"/nodes/{quote(node.name, safe='')}", None)
            yield f"nodes: {node.name} removed"


def _keep(state: StateFolder, kept: dict[str, Any], old: Settings, found: Changes) -> None:
    """Write down which nodes and models there are now, for a restart of control and for the next reload."""
    gone = {node.name for node in found.remove}
    nodes = (*(node for node in old.nodes if node.name not in gone), *found.add)
    changed: dict[str, Any] = {} if found.models is None else {"models": found.models}
    if found.add or found.remove:
        changed["nodes"] = nodes
    effective = load(state.settings, {}).model_copy(update=changed)
    write_private(state.settings, plan.dump(effective))
    given = old.model_copy(update=changed).model_dump(mode="json")
    write_private(state.given, json.dumps({**kept, "settings": given}))
    if "nodes" in changed and (stack := state.stack()):
        stack["nodes"] = [{"name": node.name, "url": node.url, "own": False} for node in nodes]
        write_private(state.stack_file, json.dumps(stack, indent=1))


def _differ(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> list[str]:
    """Dotted names of the fields whose values differ; a list is one field."""
    found: list[str] = []
    for name in old:
        if isinstance(old[name], dict) and isinstance(new[name], dict) and old[name].keys() == new[name].keys():
            found += _differ(old[name], new[name], f"{place}{name}.")
        elif old[name] != new[name]:
            found.append(place + name)
    return found
