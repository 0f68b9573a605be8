"""Where an installation lies: its state folder, its settings, and its database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyrage
from sqlalchemy.engine import make_url

from corral.backup.archive import BackupError, Secrets
from corral.config.settings import Settings, load
from corral.stack.state import StateFolder, read_json
from corral.store.database import Database, resolve

PASSPHRASE_MIN = 8


@dataclass(frozen=True)
class Place:
    """An installation. ``file`` is the corral.yaml that its operator wrote, where that is known."""

    root: Path
    settings: Settings
    file: Path | None

    @property
    def secrets(self) -> dict[str, Path]:
        """The secrets that cannot be made again, by their names in a backup."""
        auth = self.settings.auth
        found = {"pepper": self.root / auth.pepper_file, "internal.token": self.root / auth.internal_token_file}
        # An installation of an earlier version has none until its control was started once.
        signing = self.root / self.settings.audit.signing_key_file
        return found | ({"audit.key": signing} if signing.exists() else {})


def find(config: str | None, state: str | None, env: Mapping[str, str]) -> Place:
    """The installation of ``--config``, of a state folder that `corral up` made, or of CORRAL_CONFIG.

    Raises:
        ConfigError: settings that cannot be used.
    """
    folder = StateFolder.locate(state, env)
    if config is None and folder.settings.exists():
        given = (read_json(folder.given) or {}).get("file")
        return Place(folder.root, load(folder.settings, {}), Path(given) if given else None)
    named = config or env.get("CORRAL_CONFIG")
    settings = load(named, env)
    said = state or env.get("CORRAL_STATE")
    root = folder.root if said or named is None else settings.control.state.absolute()
    return Place(root, settings, Path(named) if named else None)


def open_database(url: str, root: Path, password_file: Path | None) -> Database:
    """The database of a backup or restore, which PostgreSQL then tells from a control's.

    Raises:
        DatabaseError: no address of a database, or a password that cannot be read.
    """
    parsed = make_url(resolve(url, root))
    if parsed.get_backend_name() != "sqlite":
        parsed = parsed.update_query_dict({"application_name": "corral-backup"})
    return Database(parsed.render_as_string(hide_password=False), root / password_file if password_file else None)


def sqlite_file(url: str, root: Path) -> Path | None:
    """The file of an SQLite database, None of another."""
    parsed = make_url(resolve(url, root))
    return Path(str(parsed.database)) if parsed.get_backend_name() == "sqlite" else None


def read_secrets(passphrase_file: str | None, recipients: tuple[str, ...], identities: tuple[str, ...]) -> Secrets:
    """Passphrase, recipients and identities of the command line.

    Raises:
        BackupError: one that cannot be used, with the reason.
    """
    passphrase = None
    if passphrase_file is not None:
        passphrase = _text(passphrase_file).strip("\r\n")
        if len(passphrase) < PASSPHRASE_MIN or "\n" in passphrase:
            raise BackupError(f"{passphrase_file}: expected one line of at least {PASSPHRASE_MIN} characters")
    try:
        parsed = tuple(pyrage.x25519.Recipient.from_str(one) for one in recipients)
    except pyrage.RecipientError:
        raise BackupError("--recipient: expected an age recipient such as age1…") from None
    found = []
    for file in identities:
        lines = [line.strip() for line in _text(file).splitlines()]
        try:
            found += [pyrage.x25519.Identity.from_str(line) for line in lines if line and not line.startswith("#")]
        except pyrage.IdentityError:
            raise BackupError(f"{file}: expected age identities (AGE-SECRET-KEY-1…), as age-keygen writes") from None
    return Secrets(passphrase, parsed, tuple(found))


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BackupError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
