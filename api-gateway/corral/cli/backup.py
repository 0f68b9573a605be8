"""`corral backup`: everything that cannot be made again, in one encrypted file, and back."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from corral.cli import common

if TYPE_CHECKING:
    from corral.backup.archive import Secrets
    from corral.backup.place import Place


@click.group("backup")
def command() -> None:
    """Make, check and restore backups."""


def _failing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from corral.backup.archive import BackupError
        from corral.store.database import DatabaseError
        from corral.store.replace import ReplaceError

        try:
            return function(*args, **kwargs)
        except (BackupError, DatabaseError, ReplaceError) as error:
            common.fail(str(error), kwargs.get("as_json", False))
        except OSError as error:
            common.fail(f"{error.filename or 'backup'}: {error.strerror or error}", kwargs.get("as_json", False))

    return wrapped


_passphrase = click.option(
    "--passphrase-file",
    metavar="FILE",
    envvar="CORRAL_BACKUP_PASSPHRASE_FILE",
    help="Has the passphrase.  [env: CORRAL_BACKUP_PASSPHRASE_FILE]",
)
_config = click.option("--config", metavar="FILE", help="Configuration, where `corral up` did not make the state.")
_identity = click.option("--identity", multiple=True, metavar="FILE", help="Identities of age (repeatable).")


@command.command("create")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE|DIR", help="[default: backups/ in the state]")
@click.option("--with-models", is_flag=True, help="The files of the models too, as they lie on this machine.")
@click.option("--models", type=click.Path(path_type=Path), metavar="DIR", help="Their folder.  [default: the state's]")
@click.option("--keep", type=click.IntRange(1), metavar="N", help="Afterwards delete all but the newest N beside it.")
@click.option("--recipient", multiple=True, metavar="age1…", help="Who may open it, by age's public key (repeatable).")
@_passphrase
@_config
@common.options
@_failing
def create(
    output: Path | None,
    with_models: bool,
    models: Path | None,
    keep: int | None,
    recipient: tuple[str, ...],
    passphrase_file: str | None,
    config: str | None,
    as_json: bool,
    state: str | None,
) -> None:
    """Make a backup, of a stack that runs or stands still."""
    from corral.backup import create as making

    secrets = _secrets(passphrase_file, recipient, ())
    if secrets.passphrase is None and not secrets.recipients:
        raise click.UsageError("a backup is always encrypted: give --passphrase-file FILE or --recipient age1…")
    place = _place(config, state)
    made = making.create(place, output, secrets, with_models, models, keep, _say)
    _enter(place, "create", made, ("file", "size", "schema", "removed"))
    rows = sum(made["tables"].values())
    common.emit(made, as_json, lambda: f"{made['file']}: {_size(made['size'])}, {rows} rows, schema {made['schema']}")


@command.command("verify")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@_identity
@_passphrase
@_config
@common.options
@_failing
def verify(
    file: Path | None,
    identity: tuple[str, ...],
    passphrase_file: str | None,
    config: str | None,
    as_json: bool,
    state: str | None,
) -> None:
    """Decrypt and check all of a backup (the last one made, by default); nothing is written."""
    from corral.backup import create as making
    from corral.backup import restore as restoring

    file = file or making.last(_place(config, state).root)

    found = restoring.verify(file, _secrets(passphrase_file, (), identity), _say)
    common.emit(found, as_json, lambda: f"{file}: whole\n" + common.pairs(_shown(found)))


@command.command("restore")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--database", metavar="URL", help="Where to.  [default: what the backup's settings say; SQLite: here]")
@click.option("--replace", is_flag=True, help="An installation that is there is put aside, its database replaced.")
@click.option("--models", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the models' files.")
@_identity
@_passphrase
@_config
@common.options
@_failing
def restore(
    file: Path,
    database: str | None,
    replace: bool,
    models: Path | None,
    identity: tuple[str, ...],
    passphrase_file: str | None,
    config: str | None,
    as_json: bool,
    state: str | None,
) -> None:
    """Restore a backup into an empty installation that is stopped; it is checked first, whole."""
    from corral.backup import restore as restoring
    from corral.config.values import database_url

    try:
        database = database_url(database) if database is not None else None
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--database") from None
    wishes = restoring.Wishes(database, replace, models, entered=True)
    done = restoring.restore(file, _secrets(passphrase_file, (), identity), _place(config, state), wishes, _say)
    common.emit(done, as_json, lambda: _restored(done))


@command.command("drill")
@click.argument("file", required=False, type=click.Path(path_type=Path), metavar="[FILE|DIR]")
@click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A key that has to be taken.  [default: the admin's, if the backup knows it]",
)
@click.option("--sqlite", is_flag=True, help="Into SQLite, where the installation has PostgreSQL.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="For the temporary installation.  [default: run/ in the state]",
)
@_identity
@_passphrase
@_config
@common.options
@_failing
def drill(
    file: Path | None,
    key_file: Path | None,
    sqlite: bool,
    folder: Path | None,
    identity: tuple[str, ...],
    passphrase_file: str | None,
    config: str | None,
    as_json: bool,
    state: str | None,
) -> None:
    """Prove a backup (the last one, by default): restore it beside what runs, check it, and remove it again."""
    from corral.backup import drill as drilling

    # Asked to stop, it removes what it has made first.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    place = _place(config, state)
    file = drilling.newest(file, place.root)
    done = drilling.drill(file, _secrets(passphrase_file, (), identity), place, key_file, sqlite, folder, _say)
    _enter(place, "drill", done, ("file", "created", "seconds", "key"))
    common.emit(done, as_json, lambda: _drilled(done))


@command.command("extract")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("member")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="[default: standard output]")
@_identity
@_passphrase
@common.options
@_failing
def extract(
    file: Path,
    member: str,
    output: Path | None,
    identity: tuple[str, ...],
    passphrase_file: str | None,
    as_json: bool,
    state: str | None,
) -> None:
    """Take one member out of a backup, such as secrets/pepper; it is checked first, whole."""
    from corral.backup import restore as restoring

    data = restoring.extract(file, _secrets(passphrase_file, (), identity), member)
    if output is not None:
        with os.fdopen(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as written:
            written.write(data)
    told = {"file": str(file), "member": member, "size": len(data), "output": str(output) if output else None}
    if output is not None or as_json:
        text = None if output is not None else data.decode("utf-8", "replace")
        common.emit({**told, "text": text}, as_json, lambda: f"{output}: {len(data)} bytes")
    else:
        sys.stdout.buffer.write(data)


@command.command("list")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@common.options
@_failing
def show(folder: Path | None, as_json: bool, state: str | None) -> None:
    """List the backups of a folder, oldest first (of the state's by default)."""
    from corral.backup import create as making

    if folder is not None and not folder.is_dir():
        raise click.BadParameter(f"{folder} is no folder", param_hint="FOLDER")
    found = making.listing(folder or making.backups(_place(None, state).root))
    rows = [{**item, "created": _time(item["created"]), "size": _size(item["size"])} for item in found]
    common.emit({"backups": found}, as_json, lambda: common.table(rows, ("file", "size", "created"), "no backups"))


def _place(config: str | None, state: str | None) -> Place:
    from corral.backup import place

    return place.find(config, state, os.environ)


def _enter(place: Place, action: str, done: dict[str, Any], names: tuple[str, ...]) -> None:
    """Have it in the audit trail. A backup that is made counts for more than its record: without one it says so."""
    from corral.backup import trail

    if why := trail.enter(place, action, {name: done[name] for name in names}):
        _say(f"not in the audit trail: {why}")


def _secrets(passphrase_file: str | None, recipients: tuple[str, ...], identities: tuple[str, ...]) -> Secrets:
    from corral.backup import place

    return place.read_secrets(passphrase_file, recipients, identities)


def _say(text: str) -> None:
    click.echo(f"  {text}", err=True)


def _shown(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "created": f"{_time(found['created'])} by Corral {found['version']}",
        "schema": found["schema"],
        "rows": ", ".join(f"{name} {count}" for name, count in found["tables"].items()),
        "spool": f"{found['spool_segments']} segment{'' if found['spool_segments'] == 1 else 's'}",
        "blobs": f"{found['blobs']}, {_size(found['blob_bytes'])}",
    }


def _restored(done: dict[str, Any]) -> str:
    lines = [f"restored into {done['state']}", f"database  {done['database']}"]
    if done["config"]:
        lines.append(f"config    {done['config']}: the corral.yaml of then; use it, or your own")
    if done["aside"]:
        lines.append(f"before    {done['aside']}: what was there; delete it when all is well")
    return "\n".join(lines)


def _drilled(done: dict[str, Any]) -> str:
    shown = {**_shown(done), "restored": f"into {done['database']}, in {done['seconds']:.1f} s"}
    shown["key"] = f"{done['key']} is taken" if done["key"] else f"not checked: {done['key_unchecked']}"
    return f"{done['file']}: restores\n" + common.pairs(shown)


def _time(epoch: float) -> str:
    return datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
