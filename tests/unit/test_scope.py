"""A key never makes one that may do more: whatever a child may, its maker may."""

from __future__ import annotations

import math
from dataclasses import replace
from fnmatch import fnmatchcase
from ipaddress import ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from corral.control.scope import LIMITS, ROLES, Scope, covers, excess, narrowed

DEFAULTS = {"rpm": 600, "tpm": None, "concurrency": 32, "daily_tokens": None, "monthly_tokens": None}
NAMES = ["", "a", "b", "ab", "aab", "a:b", "b*", "?", "a?b", "[a]", "ba]"]
ADDRESSES = ["10.0.0.1", "10.0.0.130", "10.1.0.1", "192.0.2.7", "2001:db8::1", "::1", "::ffff:10.0.0.1", "nowhere", ""]
NETWORKS = ["10.0.0.0/8", "10.0.0.0/24", "10.0.0.128/25", "10.1.0.1/32", "0.0.0.0/0", "::/0", "2001:db8::/32"]
MOMENTS = [0.0, 1.0, 99.0, 100.0, 101.0, 1e12]

globs = st.text("ab*?[]!:", min_size=1, max_size=5)
scopes = st.builds(
    Scope,
    role=st.sampled_from(ROLES),
    tenant=st.sampled_from(["default", "team"]),
    models=st.lists(globs | st.just("*"), min_size=1, max_size=3).map(tuple),
    networks=st.lists(st.sampled_from(NETWORKS).map(ip_network), max_size=3).map(tuple),
    expires=st.sampled_from([*MOMENTS, math.inf]),
    batch=st.booleans(),
    limits=st.fixed_dictionaries({name: st.none() | st.integers(1, 1000) for name in LIMITS}),
    weight=st.sampled_from([0.5, 1.0, 2.0, 10.0]),
)


def may_use(scope: Scope, name: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in scope.models)


def limit(scope: Scope, name: str) -> float:
    own = scope.limits.get(name)
    return next((one for one in (own, DEFAULTS[name]) if one is not None), math.inf)


@given(child=scopes, maker=scopes, name=st.text("ab:*?[]!", max_size=6))
@example(child=Scope(), maker=Scope(models=("a*",)), name="b")
@example(child=Scope(models=("?",)), maker=Scope(models=("a", "b")), name="c")
@example(child=Scope(weight=2.0), maker=Scope(), name="")
def test_a_child_never_exceeds_its_maker(child: Scope, maker: Scope, name: str) -> None:
    if excess(child, maker, DEFAULTS) is not None:
        return
    assert ROLES.index(child.role) <= ROLES.index(maker.role)
    for one in [*NAMES, name]:
        assert may_use(maker, one) or not may_use(child, one), one
    for address in ADDRESSES:
        assert maker.from_here(address) or not child.from_here(address), address
    for moment in MOMENTS:
        assert moment < maker.expires or not moment < child.expires
    assert child.batch or not maker.batch
    if maker.role != "admin":
        assert child.tenant == maker.tenant
        assert all(limit(child, field) <= limit(maker, field) for field in LIMITS)
        assert child.weight <= maker.weight


@given(scope=scopes)
def test_a_key_may_make_its_like(scope: Scope) -> None:
    assert excess(scope, scope, DEFAULTS) is None


@given(outer=globs, inner=globs, name=st.text("ab:*?[]!", max_size=6))
def test_a_glob_that_covers_another_matches_all_that_it_matches(outer: str, inner: str, name: str) -> None:
    if covers(outer, inner) and fnmatchcase(name, inner):
        assert fnmatchcase(name, outer)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ("*", "a*"),
        ("llama*", "llama3.2:3b"),
        ("llama*", "llama3*"),
        ("a?c*", "a?cd?"),
        ("*:3b", "*a:3b"),
        ("a**", "a*"),
    ],
)
def test_what_is_plainly_within_is_allowed(outer: str, inner: str) -> None:
    assert covers(outer, inner)


@pytest.mark.parametrize(("outer", "inner"), [("a*", "*"), ("a", "a*"), ("a?", "a*"), ("[ab]", "?"), ("?", "[!x]")])
def test_what_is_not_or_may_not_be_is_refused(outer: str, inner: str) -> None:
    assert not covers(outer, inner)


@pytest.mark.parametrize(
    ("child", "word"),
    [
        (Scope("admin", models=("a*",)), "role"),
        (Scope(models=("a*",), tenant="other"), "tenant"),
        (Scope(models=("a1", "b")), "models"),
        (Scope(models=("a*",)), "networks"),
        (Scope(models=("a*",), networks=(ip_network("10.0.0.0/8"),)), "networks"),
        (Scope(models=("a*",), networks=(ip_network("10.0.0.0/25"),)), "expires"),
        (Scope(models=("a*",), networks=(ip_network("10.0.0.0/25"),), expires=9.0), "class"),
        (Scope(models=("a*",), networks=(ip_network("10.0.0.0/25"),), expires=9.0, batch=True, weight=1.5), "weight"),
        (Scope(models=("a*",), networks=(ip_network("10.0.0.0/25"),), expires=9.0, batch=True), "rpm"),
        (
            Scope(models=("a*",), networks=(ip_network("10.0.0.0/25"),), expires=9.0, batch=True, limits={"rpm": 6}),
            "rpm",
        ),
    ],
)
def test_the_reason_names_the_field(child: Scope, word: str) -> None:
    maker = Scope("operator", "default", ("a*",), (ip_network("10.0.0.0/24"),), 9.0, True, {"rpm": 5})
    assert (excess(child, maker, DEFAULTS) or "").startswith(f"{word}: ")


@given(child=scopes, maker=scopes, name=st.text("ab:*?[]!", max_size=6))
@example(child=Scope(models=("a*", "b")), maker=Scope(models=("ab*", "c")), name="ab")
@example(child=Scope(), maker=Scope(models=("[a]*",)), name="a")
@example(child=Scope(limits={"rpm": None}), maker=Scope(limits={"rpm": 5}), name="")
def test_a_child_is_narrowed_to_its_maker_and_no_further(child: Scope, maker: Scope, name: str) -> None:
    # What of a key is never changed is as it was when it was made: within its maker.
    child = replace(child, role="inference", tenant=maker.tenant, networks=maker.networks, expires=0.0, batch=True)
    changes = narrowed(child, maker, DEFAULTS)
    limits = {**child.limits, **{one: changes[one] for one in LIMITS if one in changes}}
    after = replace(
        child,
        models=tuple(changes.get("models", child.models)),
        weight=changes.get("weight", child.weight),
        limits=limits,
    )
    assert excess(after, maker, DEFAULTS) is None
    assert narrowed(after, maker, DEFAULTS) == {}
    assert not changes if excess(child, maker, DEFAULTS) is None else changes
    for one in [*NAMES, name]:
        assert may_use(child, one) or not may_use(after, one), one
    for one in LIMITS:
        most = math.inf if maker.role == "admin" else limit(maker, one)
        assert limit(after, one) == min(limit(child, one), most)


def test_of_its_models_a_child_keeps_those_of_both() -> None:
    def left(child: list[str], maker: list[str]) -> list[str]:
        changes = narrowed(Scope(models=tuple(child)), Scope(models=tuple(maker)), DEFAULTS)
        return changes.get("models", child)

    assert left(["*"], ["llama*", "qwen*"]) == ["llama*", "qwen*"]
    assert left(["llama3*", "qwen*"], ["llama*"]) == ["llama3*"]
    assert left(["*", "llama3*"], ["llama*"]) == ["llama3*", "llama*"]
    assert left(["phi*"], ["llama*"]) == [" "]
    assert left(["llama3*"], ["*"]) == ["llama3*"]
