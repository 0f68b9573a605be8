"""The description of the admin API has each status that a route may answer: what its source raises, what any may."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from support.raised import statuses
from support.routes import WHO

from corral.control import refusals
from corral.control.app import _api

APP = _api(None)
PATHS = APP.openapi()["paths"]
ANY = {"400", "401", "403", "500", "503"}
NEVER = {
    ("POST", "/admin/keys"): {"409"},
    ("POST", "/admin/tenants"): {"404"},
}
"""What a route shares with others and does not answer itself: it finds what it has just made."""


def admin(routes: Iterable[Any]) -> Iterator[APIRoute]:
    for route in routes:
        if isinstance(route, APIRoute):
            yield from [route] if route.path.startswith("/admin/") else []
        elif hasattr(route, "original_router"):
            yield from admin(route.original_router.routes)


ROUTES = {(method, route.path): route for route in admin(APP.routes) for method in route.methods}


def test_each_route_is_there() -> None:
    assert ROUTES.keys() == {(method, path) for method, path in WHO if path.startswith("/admin/")}
    assert {(method.upper(), path) for method, path in refusals.OF_ROUTE} <= ROUTES.keys()


@pytest.mark.parametrize(("method", "path"), sorted(ROUTES))
def test_a_route_has_each_status_that_it_may_answer(method: str, path: str) -> None:
    route = ROUTES[method, path]
    raised = statuses(route.endpoint) - NEVER.get((method, path), set())
    large = set() if method == "GET" else {"413"}
    told = PATHS[path][method.lower()]["responses"]
    assert set(told) == {str(route.status_code or 200)} | ANY | large | raised
    assert all(one["description"] for one in told.values())


def test_the_source_is_read_through_what_it_calls() -> None:
    """By name, by a module, by a part of control, within a class, and what is handed on."""
    some = {"PATCH /admin/keys/{key}": {"404", "409"}, "POST /admin/nodes": {"409", "502"}}
    some |= {"POST /admin/models/apply": {"409"}, "GET /admin/operations/{operation}": {"404"}}
    for name, wanted in some.items():
        method, path = name.split()
        assert statuses(ROUTES[method, path].endpoint) - ANY == wanted, name


def test_the_page_for_people_has_them_too() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/api.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"^Control's own errors are .*?\n\n", page, re.MULTILINE | re.DOTALL)
    told = {status for method, path in ROUTES for status in PATHS[path][method.lower()]["responses"]}
    assert set(re.findall(r"\b[45]\d\d\b", said)) == {status for status in told if status >= "400"}
