"""Every route of control by every role by every way to write its path: denied unless this table allows it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from support.control import FakeNode, Running, make_key
from support.routes import INTERNAL, OPERATOR, WHO
from support.tricks import absolute, ask, tricks

from corral.control import auth
from corral.control.app import _api
from corral.store import keys as keytext
from corral.store.database import Database, resolve
from corral.store.tables import disabled_models, keys, nodes, tenants

OPEN = {("GET", "/health"), ("GET", "/docs"), ("GET", "/openapi.json"), ("HEAD", "/openapi.json")}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE")
NOBODY = ("none", "nonsense", "unknown", "revoked", "expired", "elsewhere", "inference")


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    node = FakeNode()
    made = Running(tmp_path_factory.mktemp("control") / "state", nodes=[{"url": node.url}])
    yield made
    made.close()
    node.close()


@pytest.fixture(scope="module")
def roles(control: Running) -> dict[str, str]:
    """The text of a key of each kind."""
    made = {role: make_key(control, role=role)["key"] for role in ("inference", "operator", "admin")}
    made["elsewhere"] = make_key(control, role="admin", networks=["192.0.2.0/24"])["key"]
    gone = {state: make_key(control, role="admin") for state in ("revoked", "expired")}
    control.admin.post(f"/admin/keys/{gone['revoked']['id']}/revoke")
    rows = _database(control)
    expire = keys.update().where(keys.c.id == gone["expired"]["id"]).values(expires=1.0)
    rows.write_now(lambda connection: connection.execute(expire))
    rows.close()
    made |= {state: key["key"] for state, key in gone.items()}
    made |= {"unknown": keytext.generate()[1], "nonsense": "crl_nonsense", "none": ""}
    return made | {"internal": (control.state / "internal.token").read_text().strip()}


def _database(control: Running) -> Database:
    return Database(resolve(control.settings.store.database, control.state))


def state(control: Running) -> list[Any]:
    """Whatever a call may change, but when keys were used."""
    database = _database(control)
    read = [
        database.read_now(
            lambda connection, one=table: connection.execute(select(*(c for c in one.c if c.name != "last_used"))).all()
        )
        for table in (keys, tenants, nodes, disabled_models)
    ]
    database.close()
    return read


def port(control: Running) -> int:
    return int(control.url.rpartition(":")[2])


def filled(path: str) -> str:
    return re.sub(r"\{[a-z]+(:path)?\}", "nothing", path)


def headers(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"} if text else {}


def every(routes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Method and path of each route, those of included routers too."""
    for route in routes:
        if hasattr(route, "methods"):
            yield from ((method, route.path) for method in route.methods)
        else:
            yield from every(route.original_router.routes)


def test_the_table_has_every_route_and_no_other() -> None:
    nothing = {(method, "/{rest:path}") for method in ("GET", "POST", "PUT", "PATCH", "DELETE")}
    assert set(every(_api(None).routes)) == WHO.keys() | OPEN | nothing


@pytest.mark.parametrize(("method", "path"), WHO, ids=lambda part: part)
def test_a_route_is_for_its_role_and_those_above(
    control: Running, roles: dict[str, str], method: str, path: str
) -> None:
    at, who, target = port(control), WHO[(method, path)], filled(path)
    body: Any = {} if method in ("POST", "PUT") else None
    before = state(control)
    for role in (*NOBODY, "operator", "admin", "internal"):
        for header in ("Authorization", "x-api-key"):
            sent = {header: roles[role]} if header == "x-api-key" else headers(roles[role])
            status = ask(at, method, target, sent if roles[role] else {}, body)
            allowed = role == who or (role == "admin" and who == OPERATOR)
            if allowed:
                # The body says nothing, and nothing of that name is there: what is refused is that.
                assert status in (200, 202, 400, 404, 409), role
            elif who != INTERNAL and role in ("inference", "operator", "elsewhere"):
                assert status == 403, role
            else:
                assert status == 401, role
    assert state(control) == before


@pytest.mark.parametrize("role", [*NOBODY, "operator", "admin", "internal"])
def test_no_other_way_to_write_it_is_taken(control: Running, roles: dict[str, str], role: str) -> None:
    at, sent, before = port(control), headers(roles[role]), state(control)
    passed = []
    for method, path in [*WHO, *OPEN]:
        for target in tricks(filled(path)):
            status = ask(at, method, target, sent, {} if method in ("POST", "PUT") else None)
            # What stands behind a # is no part of a path: the parser takes it off, and the decision is the path's own.
            own = ask(at, method, filled(path), sent, {}) if target.endswith("#a") else 0
            if status not in (0, 400, 401, 403, 404, own):
                passed.append((method, target, status))
    assert passed == []
    assert state(control) == before


def test_the_form_for_proxies_is_decided_alike(control: Running, roles: dict[str, str]) -> None:
    at = port(control)
    for role in (*NOBODY, "operator", "admin"):
        for method, path in WHO:
            body: Any = {} if method in ("POST", "PUT") else None
            plain, other = (
                ask(at, method, target, headers(roles[role]), body) for target in (filled(path), absolute(filled(path)))
            )
            assert plain == other, (role, method, path)


@pytest.mark.parametrize("role", [*NOBODY, "operator", "admin"])
def test_another_method_is_nothing(control: Running, roles: dict[str, str], role: str) -> None:
    at, sent, before = port(control), headers(roles[role]), state(control)
    known = {(method, filled(path)) for method, path in (*WHO, *OPEN)}
    for path in {path for _, path in known}:
        for method in METHODS:
            if (method, path) not in known:
                assert ask(at, method, path, sent, None) in (0, 400, 401, 403, 404, 405), (method, path)
    assert state(control) == before


@pytest.mark.parametrize(
    "host", ["x/health?a=", "x/docs", "/health", "x#", "a b", "[::1", "x:99999999", "x,y", "x\r\nHost: y", "é"]
)
def test_a_host_that_is_none_is_refused_on_every_route(control: Running, roles: dict[str, str], host: str) -> None:
    for method, path in [*WHO, *OPEN]:
        for role in ("none", "admin"):
            sent = {"Host": host, **headers(roles[role])}
            assert ask(port(control), method, filled(path), sent, None) == 400, (role, path)


def test_any_host_that_may_be_one_is_taken(control: Running) -> None:
    for host in ("corral", "127.0.0.1:8090", "[::1]:8090", "control_1:80", "corral.example.com"):
        assert ask(port(control), "GET", "/health", {"Host": host}) == 200, host


near = st.builds(
    lambda text, at, new: text[:at] + new + text[at + 1 :],
    st.sampled_from([keytext.generate()[1] for _ in range(3)]),
    st.integers(0, 60),
    st.text(max_size=3),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=80) | near | st.sampled_from(["' OR 1=1 --", "crl_'||(select 1)||'_x", "%00", "crl_*_*"]))
def test_a_store_is_asked_for_well_formed_ids_alone(
    control: Running, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    asked: list[str] = []
    real = auth._look_up
    monkeypatch.setattr(auth, "_look_up", lambda connection, key_id: asked.append(key_id) or real(connection, key_id))
    value = text.encode("utf-8", "replace").decode("latin-1").translate({0: "?", 10: "?", 13: "?"})
    for name, sent in (("Authorization", f"Bearer {value}"), ("x-api-key", value)):
        status = ask(port(control), "GET", "/admin/keys", {name: sent})
        assert status in (400, 401)
    assert all(re.fullmatch("[a-z2-7]{10}", key_id) for key_id in asked)
    assert not asked or keytext.parse(text.strip()) is not None
