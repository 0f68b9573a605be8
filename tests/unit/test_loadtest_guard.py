"""Load tests: this machine may be loaded, another only if it is named twice."""

from __future__ import annotations

import pytest

from corral.loadtest import guard
from corral.loadtest.errors import LoadTestError
from corral.loadtest.guard import ALLOW


def resolver(*addresses: str) -> guard.Resolve:
    return lambda host, port: list(addresses)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_loopback_may_be_loaded(address: str) -> None:
    found = guard.target("http://here:8080", None, {}, resolver(address))
    assert (found.host, found.port, found.address, found.tls) == ("here", 8080, address, False)


def test_the_real_resolver_knows_localhost() -> None:
    assert guard.target("http://localhost:1", None, {}).address in ("127.0.0.1", "::1")


@pytest.mark.parametrize("address", ["10.0.0.1", "192.0.2.7", "2001:db8::1", "::ffff:10.0.0.1", "0.0.0.0", "::"])
def test_another_machine_may_not(address: str) -> None:
    with pytest.raises(LoadTestError, match=r"--i-may-load there and CORRAL_LOADTEST_ALLOW=there"):
        guard.target("http://there", None, {}, resolver(address))


def test_a_name_with_one_address_elsewhere_may_not() -> None:
    with pytest.raises(LoadTestError, match=r"localhost \(192\.0\.2\.7\)"):
        guard.target("http://localhost", None, {}, resolver("127.0.0.1", "192.0.2.7"))


@pytest.mark.parametrize(
    ("told", "allowed"),
    [("there", None), (None, "there"), ("there", "other"), ("other", "there"), ("*", "*"), ("", "")],
)
def test_told_once_is_not_enough(told: str | None, allowed: str | None) -> None:
    env = {} if allowed is None else {ALLOW: allowed}
    with pytest.raises(LoadTestError):
        guard.target("http://there", told, env, resolver("192.0.2.7"))


def test_told_twice_is_enough() -> None:
    found = guard.target("https://There", "there", {ALLOW: "THERE"}, resolver("192.0.2.7"))
    assert (found.address, found.port, found.tls) == ("192.0.2.7", 443, True)


@pytest.mark.parametrize("url", ["there", "ftp://there", "http://u:p@127.0.0.1", "http://127.0.0.1/path", "http://a b"])
def test_a_wrong_address_is_named(url: str) -> None:
    with pytest.raises(LoadTestError, match="expected an address such as"):
        guard.target(url, None, {}, resolver("127.0.0.1"))


def test_an_unknown_name() -> None:
    with pytest.raises(LoadTestError, match="the name is not known"):
        guard.target("http://nowhere.invalid", None, {})
