"""Budgets of a day and a month when Valkey is emptied and gateways are killed: two gateways behind their edge."""

from __future__ import annotations

import os
import signal
from urllib.parse import urlsplit

import httpx
from support.fleet import MODEL, QUICK, Fleet
from support.limits import unused
from support.load import CHAT, CUT, Answer, Client, body_of
from support.process import until
from support.servers import valkey


def spend(fleet: Fleet, key: str, count: int) -> int:
    """Requests of ten tokens each; how many were answered."""
    answers = []
    for number in range(count):
        client = fleet.client(key)
        answers.append(client.ask(CHAT, body_of(CHAT, QUICK, 10), f"spend-{number}"))
        client.close()
    assert {answer.status for answer in answers} <= {200, 429}
    return sum(answer.status == 200 for answer in answers)


def test_no_budget_begins_anew_with_an_empty_store(fleet: Fleet) -> None:
    key = fleet.key("budget", "--daily-tokens", "1500")
    first = spend(fleet, key, 200)
    assert 5 <= first < 200, "its day is used up"
    with fleet.valkey_client() as plain:
        plain.sendall(b"FLUSHALL\r\n")
        assert plain.recv(16) == b"+OK\r\n"
    assert spend(fleet, key, 50) == 0
    fleet.valkey.process.end(signal.SIGKILL)
    assert spend(fleet, key, 50) == 0
    fleet.valkey = fleet.enter(valkey(fleet.folder, urlsplit(fleet.valkey.url).port))
    assert spend(fleet, key, 50) == 0
    until(fleet.store_used, "both gateways are back in the store", every=0.1)
    assert spend(fleet, key, 50) == 0


def test_no_budget_begins_anew_with_an_empty_store_and_new_gateways(fleet: Fleet) -> None:
    """Nobody is left who was there: what was used is known from the records alone."""
    daily = fleet.key("daily", "--daily-tokens", "1500")
    monthly = fleet.key("monthly", "--monthly-tokens", "1500")
    spent = unused()
    fleet.stack.corral("tenants", "create", spent, "--daily-tokens", "1500")
    shared = fleet.key("shared", "--tenant", spent, "--new-tenant", "--daily-tokens", "100000")
    keys = (daily, monthly, shared)
    for key in keys:
        assert 5 <= spend(fleet, key, 200) < 200, "it is used up"
    gateways = fleet.stack.corral("status")["gateways"]
    with fleet.valkey_client() as plain:
        for gateway in gateways:
            os.kill(gateway["pid"], signal.SIGSTOP)  # nobody is left to tell the store anything
        plain.sendall(b"FLUSHALL\r\n")
        assert plain.recv(16) == b"+OK\r\n"
        for gateway in gateways:
            os.kill(gateway["pid"], signal.SIGKILL)
    for gateway in gateways:
        until(lambda gateway=gateway: _ready(gateway["url"]), "the gateway is back", 60)  # type: ignore[misc]
    until(lambda: _ready(fleet.stack.url), "the edge has found one again", 60)
    assert [spend(fleet, key, 30) for key in keys] == [0, 0, 0]


def test_what_a_killed_gateway_had_reserved_is_what_its_record_says(fleet: Fleet) -> None:
    """A guess of 1500 tokens and more; what was generated until the gateway was killed is what counts in the end."""
    cut = unused()
    fleet.stack.corral("tenants", "create", cut, "--monthly-tokens", "200000")
    key = fleet.key("killed", "--tenant", cut, "--new-tenant", "--daily-tokens", "100000")
    victim, other = fleet.stack.corral("status")["gateways"]

    def left() -> int:
        answer = httpx.get(other["url"] + "/api/tags", headers={"Authorization": f"Bearer {key}"})
        return int(answer.headers["x-ratelimit-remaining-tokens"])

    # A gateway that misses the store for 50 ms says what is left of its share.
    until(lambda: left() == 100_000, "nothing is used")
    client, name = Client(victim["url"], key), f"killed-{cut}"

    def kill(answer: Answer) -> None:
        until(lambda: fleet.admitted(answer.request_id)[0]["tokens"], "control knows how far it is")
        assert left() < 100_000 - 1500
        os.kill(victim["pid"], signal.SIGKILL)

    answer = client.ask(CHAT, body_of(CHAT, MODEL, 1500), name, kill)
    client.close()
    assert answer.fate == CUT
    (record,) = fleet.records(name, seconds=60)
    assert record["outcome"] == "interrupted"
    used = record["prompt_tokens"] + record["tokens"]
    assert 0 < used < 1500
    until(lambda: left() == 100_000 - used, "the guess is no longer counted", every=0.2)
    # The tenant's sum too: the key's limit is the one with less left, as long as that is 10,000.
    fleet.stack.corral("tenants", "limit", cut, "--monthly-tokens", "10000")
    until(lambda: left() == 10_000 - used, "nor for its tenant", every=0.2)


def _ready(url: str) -> bool:
    try:
        return httpx.get(url + "/health/ready", timeout=1).status_code == 200
    except httpx.HTTPError:
        return False
