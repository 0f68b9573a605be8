"""What a refused caller is told: `Retry-After` is long enough, not much longer, and agrees with `x-ratelimit-…`."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from support.gateway import Gateway, answer, gateway
from support.held import Held
from support.process import until


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("gateway")) as started:
        yield started


@pytest.fixture
def gw(shared: Gateway) -> Gateway:
    shared.forget()
    return shared


def seconds(answer: httpx.Response, of: str) -> float:
    return float(answer.headers[f"x-ratelimit-reset-{of}"].removesuffix("ms")) / 1e3


def agrees(answer: httpx.Response, wait: float) -> bool:
    """Never less than it takes, and later for some than for others, by a tenth or a second."""
    spread = max(1.0, wait / 10)
    return wait - 0.01 <= int(answer.headers["Retry-After"]) <= math.ceil(wait + spread)


@pytest.mark.parametrize("limits", [{"rpm": 30}, {"rpm": 30, "tpm": 1_000_000}])
def test_of_requests_a_minute(gw: Gateway, limits: dict[str, int]) -> None:
    headers = {"Authorization": f"Bearer {gw.new_key(**limits)}"}
    while (refused := gw.post(headers=headers)).status_code == 200:
        pass
    came = time.monotonic()
    assert (refused.status_code, refused.headers["x-ratelimit-limit-requests"]) == (429, "30")
    # The minute is whole again after the reset; one request of it two seconds after it is used up.
    assert agrees(refused, seconds(refused, "requests") - 60 + 2)
    until(lambda: time.monotonic() - came >= int(refused.headers["Retry-After"]), "it is time")
    assert gw.post(headers=headers).status_code == 200


def test_of_tokens_a_minute(gw: Gateway) -> None:
    headers = {"Authorization": f"Bearer {gw.new_key(tpm=1000)}"}
    held = Held()
    for node in gw.nodes:
        node.script.append(held)
    body = gw.chat(stream=False, options={"num_predict": 900})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(gw.post, body=body, headers=headers)
        until(lambda: held.running == 1, "one runs")
        refused = gw.post(body=body, headers=headers)
        held.release()
        assert running.result().status_code == 200
    assert (refused.status_code, refused.headers["x-ratelimit-limit-tokens"]) == (429, "1000")
    assert 0 <= int(refused.headers["x-ratelimit-remaining-tokens"]) < 100
    assert 50 < seconds(refused, "tokens") <= 65
    assert agrees(refused, seconds(refused, "tokens")), "all of it was reserved at once, and is free again at once"


@pytest.mark.parametrize("limits", [{}, {"tpm": 1_000_000}])
def test_of_requests_at_the_same_time(gw: Gateway, limits: dict[str, int]) -> None:
    headers = {"Authorization": f"Bearer {gw.new_key(concurrency=1, **limits)}"}
    began = time.monotonic()

    def slow(connection: socket.socket) -> None:
        threading.Event().wait(2.5)
        connection.sendall(answer())

    held = Held()
    for node in gw.nodes:
        node.script.append(slow)
    assert gw.post(headers=headers).status_code == 200
    took = time.monotonic() - began
    for node in gw.nodes:
        node.script[:] = [held]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(gw.post, headers=headers)
        until(lambda: held.running == 1, "one runs")
        refused = gw.post(headers=headers)
        held.release()
        assert running.result().status_code == 200
    assert refused.status_code == 429
    assert 3 <= int(refused.headers["Retry-After"]) <= math.ceil(took + 1), "as long as the first one took"
