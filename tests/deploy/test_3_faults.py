"""Each container but the edge is killed under light load."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence

import pytest
from deploy.site import SLOW, Site
from support.load import CUT, TOLD, WHOLE, Load

CLIENTS = 3


def _killed(
    site: Site,
    say: list[str],
    service: str,
    serving: Callable[[Load], object] = lambda load: None,
    tokens: Sequence[int] = (12, 24),
    think: float = 1.5,
) -> Load:
    """Kill a service's container under load, once ``serving`` returns; the load, after it is back and has gone on."""
    with site.load(f"killed-{service}", CLIENTS, tokens, think) as load:
        load.more(CLIENTS, seconds=SLOW)
        # Asked before: what is waited for lasts no longer than the engine may take to tell.
        pid = site.pid(service)
        serving(load)
        os.kill(pid, signal.SIGKILL)  # as a crash is: the engine has to start it again
        killed = time.monotonic()
        site.back(service, pid)
        seconds = time.monotonic() - killed
        load.more(2 * CLIENTS, seconds=SLOW)
    fates = ", ".join(f"{count} {fate}" for fate, count in sorted(load.fates.items()))
    say.append(f"killed {service}: healthy again in {seconds:.1f} s; of {len(load.answers)} requests: {fates}")
    return load


@pytest.mark.parametrize("service", ["redis", "postgres", "control"])
def test_what_is_not_on_the_token_path_loses_nothing(site: Site, say: list[str], service: str) -> None:
    load = _killed(site, say, service)
    assert load.unlike(WHOLE) == []
    # Records waited in the spools where they could not be shipped.
    site.recorded([answer.request_id for answer in load.answers])


def test_a_node_loses_nothing(site: Site, say: list[str]) -> None:
    def streams(load: Load) -> None:
        begun = load.streaming

        def there(_: object) -> bool:
            return any(answer.node == "ollama-1" for answer in list(begun.values()))

        load.until(there, "ollama-1 streams", SLOW)

    load = _killed(site, say, "ollama-1", streams, tokens=[48])
    # What had begun to stream is ended in the form of its API, and never silently; all else is answered elsewhere.
    assert load.unlike(WHOLE, TOLD) == []
    told = [answer for answer in load.answers if answer.fate == TOLD]
    assert [str(answer) for answer in told if not answer.text] == []
    say.append(f"    told that their stream ended: {len(told)}, each after its first token")
    site.recorded([answer.request_id for answer in load.answers])
    site.knows("ollama-1", "ollama-2")


@pytest.mark.parametrize("service", ["api-gateway-1", "api-gateway-2"])
def test_a_gateway_loses_nothing_that_the_edge_may_replay(site: Site, say: list[str], service: str) -> None:
    def streams(load: Load) -> None:
        # All of them have had their first token, and some are this gateway's. None ended while HAProxy was asked.
        def busy(_: object) -> bool:
            before = set(load.streaming)
            asked = len(before) == CLIENTS and int(site.gateway(service)["scur"]) > 0
            return asked and set(load.streaming) == before

        load.until(busy, f"{service} has a stream", SLOW)

    before = int(site.gateway("BACKEND")["wredis"])
    load = _killed(site, say, service, streams, tokens=[64], think=0.2)
    replayed = int(site.gateway("BACKEND")["wredis"]) - before
    assert load.unlike(WHOLE, CUT) == []
    cut = [answer for answer in load.answers if answer.fate == CUT]
    assert cut, "it had no stream"
    assert [str(answer) for answer in cut if not answer.first] == [], "it had not begun: the edge may replay it"
    say.append(
        f"    replayed by the edge: {replayed}; cut after their first token, which nobody may replay: {len(cut)}"
    )
    whole = [answer.request_id for answer in load.answers if answer.fate == WHOLE]
    site.recorded(whole, [answer.request_id for answer in cut])


def test_monitoring_comes_back(site: Site, say: list[str]) -> None:
    # None needs another to start: killed at once, they come back side by side.
    killed = time.monotonic()
    pids = {service: site.pid(service) for service in ("prometheus", "alertmanager", "grafana")}
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    for service, pid in pids.items():
        site.back(service, pid)
    say.append(f"killed {', '.join(pids)}: all healthy again in {time.monotonic() - killed:.1f} s")
