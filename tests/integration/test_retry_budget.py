"""Nodes that fail whatever they are asked are not buried in tries anew: a fifth of the requests, and what was saved."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from support.gateway import gateway, says
from support.held import MODEL, leading, led

from corral.gateway.recover import ATTEMPTS_MAX

REQUESTS, AT_ONCE = 300, 50
SHARE, SAVED = 0.2, 50
"""Of requests that may be tried anew, and tries that a gateway has at its start."""


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
        connections = httpx.Limits(max_connections=AT_ONCE)
        with httpx.Client(timeout=60, limits=connections) as client, ThreadPoolExecutor(AT_ONCE) as pool:
            asked = [pool.submit(client.post, address, json=body, headers=gw.auth) for _ in range(REQUESTS)]
            answers = [one.result() for one in asked]
        # Canaries, by which the gateway looks whether nodes are well again, are no attempts at a request.
        attempts = sum(one["body"].get("messages") == body["messages"] for node in gw.nodes for one in node.requests)
        retried = gw.retries("node") - before
    assert {answer.status_code for answer in answers} <= {502, 503}
    assert attempts > REQUESTS, "some were tried anew"
    assert attempts <= REQUESTS + SAVED + SHARE * (REQUESTS + earlier)
    assert retried == attempts - REQUESTS
