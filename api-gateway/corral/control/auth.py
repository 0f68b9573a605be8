"""Who calls control, and what they may do: what is not allowed here is refused."""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from string import ascii_letters, digits
from typing import Annotated, Any, cast
from urllib.parse import parse_qsl, unquote

from fastapi import Depends, Request
from sqlalchemy import Connection, select
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from corral.control.context import Control
from corral.control.errors import Problem, answer, unrecorded
from corral.control.scope import Scope as KeyScope
from corral.store import keys as keytext
from corral.store.tables import key_verifiers, keys

OPEN = frozenset({"/health", "/docs", "/openapi.json"})
# What may be served is the administrator's to say; bringing nodes to it is the operator's. Keys, tenants and records
# are an operator's as far as they are of its own tenant, which the routes see to (`Principal.bound`).
OPERATOR = re.compile(
    r"/admin/(nodes(/.*)?|models(/(?!catalogue$).*)?|operations(/.*)?|requests(/.*)?|status|keys(/.*)?|audit/compare)"
)
OPERATOR_READS = re.compile(r"/admin/(audit|usage|tenants(/.*)?)")
# What the machines do now, which pages and commands ask for over and over; all other reads are recorded.
UNRECORDED_READS = re.compile(r"/admin/(status|((nodes|models|operations|requests)(/.*)?))")
BODY_MAX = 1 << 20
ROUTE_MAX = 200

_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:\d{1,5})?")
_ESCAPE = re.compile(rb"%(.{0,2})", re.DOTALL)
# What nobody has to write as an escape, and what would be another path if it were read once more.
_NEVER_ESCAPED = frozenset(f"{ascii_letters}{digits}-._~/\\\x7f".encode()) | set(range(32))
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Principal:
    """Who calls: a key's id and role, from where, the id of the request, and the key's tenant and scope."""

    key_id: str
    role: str
    address: str
    request_id: str
    tenant: str = ""
    scope: KeyScope | None = None

    @property
    def bound(self) -> str | None:
        """The one tenant whose keys and records it may see and change; None: every tenant's, for administrators."""
        return None if self.role == "admin" else self.tenant


Note = Callable[[Principal, str, str, int, str], Awaitable[bool]]
"""Hears of a refused change, or of a read: who, method, route, status, query. Whether that is recorded."""


def allowed(role: str, method: str, path: str) -> bool:
    """Whether a role may call a path under /admin."""
    if role == "admin":
        return True
    if role == "operator":
        return bool(OPERATOR.fullmatch(path) or (method == "GET" and OPERATOR_READS.fullmatch(path)))
    return False


def plain(raw: bytes) -> bool:
    """Whether a path is written in the one way in which it is compared: no empty segment, dots or needless escapes."""
    if any(part in (b"", b".", b"..") for part in raw[1:].split(b"/")) or not raw.isascii() or b"\\" in raw:
        return False
    for (escape,) in map(re.Match.groups, _ESCAPE.finditer(raw)):
        if not re.fullmatch(rb"[0-9A-Fa-f]{2}", escape) or int(escape, 16) in _NEVER_ESCAPED:
            return False
    return True


class Gate:
    """Stands before the application, so that no route can be reached without a decision, nor a body be read."""

    def __init__(self, app: ASGIApp, control: Control, note: Note, used: Callable[[str], None]) -> None:
        """`used` hears the id of each key that was found to be good."""
        self._app, self._control, self._note, self._used = app, control, note, used
        self._trusted = [ipaddress.ip_network(one) for one in control.settings.gateway.trusted_proxies]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            if _is_admin(scope["path"]):
                send = self._noting(scope, send)
            try:
                receive = await self._admit(scope, receive)
            except Problem as problem:
                await answer(problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _noting(self, scope: Scope, send: Send) -> Send:
        """`send`, but a change that is refused and a read of records are noted before their caller hears anything.

        A read that cannot be noted shows nothing.
        """
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD", "OPTIONS"):
            wanted = method != "OPTIONS" and not UNRECORDED_READS.fullmatch(path)
            # A read that fails in control, as while the database is away, has shown nothing.
            noted, query = range(200, 500 if wanted else 200), unquote(scope.get("query_string", b"").decode("latin-1"))
        else:
            noted, query = range(400, 600), ""  # a change that is done is recorded by who does it

        withheld = False

        async def noting(message: Message) -> None:
            nonlocal withheld
            if message["type"] == "http.response.start" and message["status"] in noted:
                who = scope.get("state", {}).get("principal") or self._principal(scope, Headers(scope["headers"]))
                entered = await self._note(who, method, _noted(path), message["status"], _noted(query))
                if not entered and message["status"] < 400:
                    withheld = True
                    await answer(unrecorded())(scope, _nothing, send)
            if not withheld:
                await send(message)

        return noting

    async def _admit(self, scope: Scope, receive: Receive) -> Receive:
        """What the application reads the body from. Raises Problem for who may not call."""
        path, method = scope["path"], scope["method"]
        headers = Headers(scope["headers"])
        if not headers.host_fits():
            raise Problem(400, "bad_request", "the Host header is no host name or address")
        if not plain(scope.get("raw_path") or path.encode()):
            raise Problem(404, "not_found", f"no route {method} {path[:ROUTE_MAX]}")
        if path in OPEN:
            return receive
        if path.startswith("/internal/"):
            if not hmac.compare_digest(headers.credential().encode(), self._control.token.encode()):
                raise Problem(401, "unauthorized", "the internal token is wrong")
            return receive
        if not _is_admin(path):
            raise Problem(404, "not_found", f"no route {method} {path}")
        await self._caller(scope, headers)
        _refuse_nul(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))
        if int(headers.one("content-length") or 0) > BODY_MAX:
            raise _too_large()
        whole = await _whole(receive)
        if method not in ("GET", "HEAD", "OPTIONS"):
            await self._caller(scope, headers)  # its key may have been revoked while it kept the body back
        return whole

    async def _caller(self, scope: Scope, headers: Headers) -> None:
        """Note who calls. Raises Problem for who may not."""
        path, method = scope["path"], scope["method"]
        who = self._principal(scope, headers)
        key_id, may = await self._authenticate(headers.credential(), who.address)
        who = replace(who, key_id=key_id, role=may.role, tenant=may.tenant, scope=may)
        scope.setdefault("state", {})["principal"] = who
        if not allowed(may.role, method, path):
            raise Problem(403, "forbidden", f"a key of role {may.role} may not {method} {path}")

    async def _authenticate(self, text: str, address: str) -> tuple[str, KeyScope]:
        key_id = keytext.parse(text)
        if key_id is None:
            raise Problem(401, "unauthorized", "the API key is malformed: check that it was copied whole")
        proof = keytext.verifier(self._control.pepper, text)
        try:
            found = await self._control.database.read(_look_up, key_id)
        except SQLAlchemyError:
            # What the gateways go by meanwhile. A key that is not in it may be newer than the last reading.
            found = self._control.hub.look_up(key_id)
            if found is None:
                raise Problem(503, "database_unavailable", "keys cannot be looked up now") from None
        now, known = time.time(), False
        for verifier, ends in found[1] if found else []:
            known |= hmac.compare_digest(verifier, proof) and (ends is None or ends > now)
        if found is None or not known:
            raise Problem(401, "unauthorized", "the API key is unknown")
        row = found[0]
        if row["revoked"] is not None:
            raise Problem(401, "unauthorized", "the API key was revoked")
        if row["expires"] is not None and now >= row["expires"]:
            raise Problem(401, "unauthorized", "the API key has expired")
        may = KeyScope.of(row)
        if not may.from_here(address):
            raise Problem(403, "forbidden", f"the API key may not be used from {address or 'an unknown address'}")
        self._used(key_id)
        return key_id, may

    def _principal(self, scope: Scope, headers: Headers) -> Principal:
        address = scope["client"][0] if scope.get("client") else ""
        request_id = ""
        if self._trusts(address):
            forwarded = headers.one("x-forwarded-for").rpartition(",")[2].strip()
            address = forwarded[:64] or address
            request_id = headers.one("x-request-id")
        return Principal("", "", address, request_id if _REQUEST_ID.fullmatch(request_id) else "")

    def _trusts(self, peer: str) -> bool:
        try:
            address = ipaddress.ip_address(peer)
        except ValueError:
            return False
        return any(address in network for network in self._trusted)


class Headers:
    """A request's headers by lower-case name."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self._raw = list(raw)

    def one(self, name: str) -> str:
        """The last value of a header, "" without one."""
        wanted = name.encode()
        return next((value.decode("latin-1") for key, value in reversed(self._raw) if key == wanted), "")

    def host_fits(self) -> bool:
        """Whether Host names a host, once; a health check of HTTP/1.0 has none. Nothing here goes by it."""
        hosts = [value.decode("latin-1") for key, value in self._raw if key == b"host"]
        return not hosts or (len(hosts) == 1 and _HOST.fullmatch(hosts[0]) is not None)

    def credential(self) -> str:
        """The one credential: `Authorization: Bearer`, or `x-api-key`, by the gateway's rules.

        Raises:
            Problem: 401 where there is none; 400 where a header comes twice, or the two differ.
        """
        for name in (b"authorization", b"x-api-key"):
            if sum(key == name for key, _ in self._raw) > 1:
                raise Problem(400, "bad_request", f"the header {name.decode()} may be sent once only")
        bearer, other = self.one("authorization"), self.one("x-api-key").strip()
        scheme, _, rest = bearer.partition(" ")
        found = rest.strip() if scheme.lower() == "bearer" else ""
        if bearer and other and found != other:
            raise Problem(400, "bad_request", "two different credentials: send Authorization or x-api-key, not both")
        if not (found or (other and not bearer)):
            raise Problem(401, "unauthorized", "no credential: send `Authorization: Bearer crl_…`")
        return found or other


def _noted(text: str) -> str:
    """A path or query as it is recorded: its beginning, without a key that somebody wrote there by mistake."""
    return keytext.masked(text.replace("\0", ""))[:ROUTE_MAX]


def _is_admin(path: str) -> bool:
    return path == "/admin" or path.startswith("/admin/")


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _too_large() -> Problem:
    return Problem(413, "request_too_large", f"more than {BODY_MAX} bytes")


async def _whole(receive: Receive) -> Receive:
    """Read the body, which may come in chunks and state no length; gives it to the application as one.

    Raises:
        Problem: 413 once there is more than BODY_MAX of it; 400 where a text in it has a NUL.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            break  # the caller has left
        body += message.get("body", b"")
        if len(body) > BODY_MAX:
            raise _too_large()
        if not message.get("more_body", False):
            _refuse_nul(_texts(bytes(body)))
            message = {"type": "http.request", "body": bytes(body), "more_body": False}
            break
    read = [message]

    async def again() -> Message:
        return read.pop() if read else await receive()

    return again


# A path with one is no route (`plain`). PostgreSQL takes none in a text, and SQLite would keep what nobody sees.
def _refuse_nul(texts: Iterable[tuple[str, str]]) -> None:
    for name, text in texts:
        if "\0" in name or "\0" in text:
            shown = name.replace("\0", "\\0")[:ROUTE_MAX]
            raise Problem(400, "bad_request", f"{shown or 'body'}: has a NUL character (U+0000)")


def _texts(body: bytes) -> Iterator[tuple[str, str]]:
    """All texts of a JSON body that may have a NUL, each with its place; none of what is no JSON."""
    if b"\\u0000" not in body:
        return  # as bytes, JSON has none
    try:
        rest = [("", json.loads(body))]
    except (ValueError, RecursionError):
        return
    while rest:
        place, value = rest.pop()
        before = f"{place}." if place else ""
        if isinstance(value, str):
            yield place, value
        elif isinstance(value, dict):
            rest += [(f"{before}{name}", one) for name, one in value.items()]
            yield from ((f"{before}{name}", "") for name in value)
        elif isinstance(value, list):
            rest += [(f"{before}{at}", one) for at, one in enumerate(value)]


def _look_up(connection: Connection, key_id: str) -> tuple[Any, list[tuple[str, float | None]]] | None:
    row = connection.execute(select(keys).where(keys.c.id == key_id)).mappings().first()
    if row is None:
        return None
    proof = key_verifiers.c
    found = connection.execute(select(proof.verifier, proof.expires).where(proof.key_id == key_id))
    return row, [(one.verifier, one.expires) for one in found]


def _principal(request: Request) -> Principal:
    return cast(Principal, request.state.principal)


Caller = Annotated[Principal, Depends(_principal)]
