"""Who asks for a gateway's health hears that it goes before it does."""

from __future__ import annotations

from corral.gateway.checks import LEAST, MOST, SILENT, Checks


def test_nobody_who_asks_is_waited_for_who_has_heard_it_twice() -> None:
    checks = Checks()
    assert checks.ask("a", 10.0)
    assert checks.ask("b", 10.5)
    checks.leave(11.0)
    assert not checks.heard(11.0)
    assert [checks.ask("a", 11.1), checks.ask("a", 11.2)] == [False, False]
    assert not checks.heard(11.2)
    assert not checks.ask("b", 11.3)
    assert not checks.heard(11.3)
    assert not checks.ask("b", 11.4)
    assert not checks.heard(11.4), "a gateway that came up just now is not found yet"
    assert checks.heard(11.0 + LEAST)


def test_who_did_not_ask_for_a_while_asks_anew() -> None:
    checks = Checks()
    assert checks.anew("a", 10.0)
    checks.ask("a", 10.0)
    assert not checks.anew("a", 10.0 + SILENT) and checks.anew("a", 10.1 + SILENT)
    assert checks.anew("b", 10.0)


def test_who_asks_no_more_is_not_waited_for_and_nobody_for_ever() -> None:
    checks = Checks()
    checks.leave(10.0)
    assert checks.heard(10.0)
    checks = Checks()
    checks.ask("a", 10.0)
    checks.leave(10.0)
    assert not checks.heard(10.0 + SILENT)
    assert checks.heard(10.1 + SILENT)
    for number in range(10):
        checks.ask(f"{number}", 10.0 + number / 4)  # always another one
    assert not checks.heard(12.5)
    assert checks.heard(10.0 + MOST)
