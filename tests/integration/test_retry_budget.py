"""Nodes that fail whatever they are asked are not buried in tries anew: a fifth of the requests, or ten a second."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from support.gateway import gateway, says
from support.held import MODEL, leading, led

from corral.gateway.recover import ATTEMPTS_MAX, BUDGET_FLOOR, BUDGET_SHARE

REQUESTS, AT_ONCE = 300, 50


def test_nodes_that_fail_all_have_a_fifth_more_attempts_than_there_are_requests(tmp_path: Path) -> None:
    limits = {"default": {"rpm": None, "tpm": None, "concurrency": None}}
    with gateway(tmp_path, gateway={"queue": {"length": REQUESTS, "wait": "60s"}}, limits=limits) as gw:
        leader = leading(gw)
        for node in gw.nodes:
            leader.place(node.name, MODEL, AT_ONCE)
        led(gw, leader)
        earlier = sum(len(node.requests) for node in gw.nodes)
        gw.forget()
        before = gw.retries("node")
        for node in gw.nodes:
            node.script = [says(500, {"error": "out of luck"})] * ATTEMPTS_MAX * REQUESTS
        body, address = gw.chat(stream=False), gw.url + "/api/chat"
        began = time.monotonic()
        connections = httpx.Limits(max_connections=AT_ONCE)
        with httpx.Client(timeout=60, limits=connections) as client, ThreadPoolExecutor(AT_ONCE) as pool:
            asked = [pool.submit(client.post, address, json=body, headers=gw.auth) for _ in range(REQUESTS)]
            answers = [one.result() for one in asked]
        took = time.monotonic() - began
        # Canaries, by which the gateway looks whether nodes are well again, are no attempts at a request.
        attempts = sum(one["body"].get("messages") == body["messages"] for node in gw.nodes for one in node.requests)
        retried = gw.retries("node") - before
    assert {answer.status_code for answer in answers} <= {502, 503}
    assert attempts > REQUESTS, "some were tried anew"
    assert retried <= BUDGET_SHARE * (REQUESTS + earlier) + BUDGET_FLOOR * (1.0 + took)
    assert retried == attempts - REQUESTS
