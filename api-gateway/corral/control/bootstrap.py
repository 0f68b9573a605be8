"""What control needs before it can serve: secrets of mode 600, and a database of this version's schema."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy import ColumnElement, Connection, func, select, update

from corral.config.settings import Settings
from corral.control.scope import LIMITS, Scope, narrowed
from corral.store import actions, tenants
from corral.store import keys as keytext
from corral.store.database import configured, insert
from corral.store.tables import key_verifiers, keys

ADMIN_KEY = "admin.key"
CONTROL = "corral serve control"
"""The command that starts this, by default."""

_LOST = (
    "{path}: the pepper is gone, and without it none of the {count} keys in the database can be checked: restore the "
    "file from a backup; or start once with --new-pepper, which makes a new one and revokes all keys"
)

log = logging.getLogger(__name__)


class BootstrapError(Exception):
    """A secret that is there but cannot be used; says what to do."""


def bootstrap(state: Path, settings: Settings, new_pepper: bool = False, command: str = CONTROL) -> None:
    """Bring the database up to date, and make pepper, internal token, signing and admin key where there are none.

    Can be called at any time and by two at once: what is there stays as it is. A pepper that is gone is replaced
    only if no key depends on it, or with `new_pepper`, which then revokes them all. Where `limits.default` was raised,
    a key without a limit of its own gets its maker's, if that is less. The trail has which keys were revoked, made or
    narrowed, and by which `command`.

    Raises:
        BootstrapError, PepperError, DatabaseError: what is there cannot be used; says what to do.
    """
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    pepper_file = state / settings.auth.pepper_file
    make_private(state / settings.auth.internal_token_file, secrets.token_urlsafe(32))
    make_private(state / settings.audit.signing_key_file, secrets.token_hex(32))
    database = configured(settings.store, state)
    try:
        database.migrate()
        # In this order: another that makes both has made the pepper before the first key.
        count = database.read_now(_count_alive)
        if count and not pepper_file.exists():
            if not new_pepper:
                raise BootstrapError(_LOST.format(path=pepper_file, count=count))
            database.write_now(_revoke_all, f"{command} --new-pepper")
            (state / ADMIN_KEY).unlink(missing_ok=True)
            log.warning("%s was lost: %d keys are revoked, as nothing can check them any more", pepper_file, count)
        make_private(pepper_file, secrets.token_hex(keytext.PEPPER_BYTES))
        make_private(state / ADMIN_KEY, keytext.generate()[1])
        pepper = keytext.read_pepper(pepper_file)
        text = (state / ADMIN_KEY).read_text(encoding="ascii").strip()
        key_id = keytext.parse(text)
        if key_id is None:
            raise BootstrapError(f"{state / ADMIN_KEY} has no Corral key: remove it, and a new one is made")
        if older := database.write_now(_enter, key_id, keytext.verifier(pepper, text), command):
            said = "%s has a new admin key, %s. Those of before still work; revoke what nobody has: %s"
            log.warning(said, state / ADMIN_KEY, key_id, ", ".join(older))
        if less := database.write_now(_narrow, settings.limits.default.model_dump(), command):
            log.warning("limits.default is more than their makers have, so they got limits: %s", ", ".join(less))
    finally:
        database.close()


def make_private(path: Path, text: str) -> None:
    """Write a file of mode 600 unless there is one. Never seen half written, never replaced."""
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        # Unlike a rename, a link does not replace what another made meanwhile.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(draft)


def _alive() -> ColumnElement[bool]:
    return keys.c.revoked.is_(None) & (keys.c.expires.is_(None) | (keys.c.expires > time.time()))


def _count_alive(connection: Connection) -> int:
    return connection.execute(select(func.count()).select_from(keys).where(_alive())).scalar_one()


def _revoke_all(connection: Connection, command: str) -> None:
    now = time.time()
    revoked = connection.execute(update(keys).where(_alive()).values(revoked=now).returning(keys.c.id)).scalars()
    if ids := sorted(revoked):
        actions.ran(connection, command, {"revoked": ids})


def _narrow(connection: Connection, defaults: Mapping[str, int | None], command: str) -> list[str]:
    """Have no key without a limit of its own more than the key that made it, should the defaults have been raised; ids
    of those that got one.

    A limit that somebody gave is not taken away by a default. What a maker made that is revoked or has expired stays.
    """
    now = time.time()
    known = {row.id: row._asdict() for row in connection.execute(select(keys).order_by(keys.c.id))}
    before: dict[str, dict[str, int | None]] = {}
    again = True
    while again:  # until those below have lost it too: a limit only falls, and to that of another key
        again = False
        for key_id, row in known.items():
            maker = known.get(row["maker"])
            if maker is None or maker["revoked"] is not None or (maker["expires"] or now) < now:
                continue
            changes = narrowed(Scope.of(row), Scope.of(maker), defaults)
            if changes := {name: most for name, most in changes.items() if name in LIMITS and row[name] is None}:
                before[key_id] = dict.fromkeys(changes) | before.get(key_id, {})
                row.update(changes)
                again = True
    for key_id, had in before.items():
        row = known[key_id]
        has = {name: row[name] for name in had}
        connection.execute(update(keys).where(keys.c.id == key_id).values(has))
        if row["revoked"] is None:
            after = {"key": key_id, **has, "by": actions.by()}
            actions.enter(connection, actions.COMMAND, command, {"key": key_id, **had}, after, tenant=row["tenant"])
    return [key_id for key_id in before if known[key_id]["revoked"] is None]


def _enter(connection: Connection, key_id: str, verifier: str, command: str) -> list[str]:
    """Enter the admin key of the file. One that is known stays as it is, revoked or rotated.

    Where it is new: other admin keys that work.
    """
    tenants.enter(connection, tenants.DEFAULT)
    if connection.execute(select(keys.c.id).where(keys.c.id == key_id)).first() is not None:
        return []
    older = select(keys.c.id).where(_alive(), keys.c.role == "admin").order_by(keys.c.created)
    known = list(connection.execute(older).scalars())
    now = time.time()
    row = {"id": key_id, "name": "admin", "tenant": tenants.DEFAULT, "role": "admin", "models": ["*"]}
    made = connection.execute(
        insert(connection, keys).values({**row, "class": "interactive", "created": now}).on_conflict_do_nothing()
    )
    proof = {"verifier": verifier, "key_id": key_id, "created": now}
    connection.execute(insert(connection, key_verifiers).values(proof).on_conflict_do_nothing())
    if not made.rowcount:  # another control has entered it meanwhile
        return []
    actions.ran(connection, command, row)
    return known
