"""`corral serve control`."""

from __future__ import annotations

import logging
import time

import uvicorn

from corral.config.settings import Settings
from corral.config.values import host_port
from corral.control.app import Application
from corral.control.bootstrap import BootstrapError, bootstrap
from corral.control.monitor import listen
from corral.store.database import DatabaseAway, DatabaseError
from corral.store.keys import PepperError
from corral.store.replace import ReplaceError, finish, hold

__all__ = ["bootstrap", "run", "server"]

PAUSE = 1.0

log = logging.getLogger(__name__)


def server(settings: Settings) -> uvicorn.Server:
    """Control's HTTP server, not running yet; the internal port is taken already.

    Raises:
        OSError: the internal port cannot be used.
    """
    host, port = host_port(settings.control.listen)
    return uvicorn.Server(
        uvicorn.Config(
            Application(settings, listen(settings.control.metrics)),
            host=host,
            port=port,
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            proxy_headers=False,
            server_header=False,
            # Longer than HAProxy keeps idle connections to a server.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=5,
        )
    )


def run(settings: Settings, new_pepper: bool = False) -> None:
    """Run control until it is told to stop; `bootstrap` comes first."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for name in ("httpx", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    state = settings.control.state.absolute()
    try:
        if ended := finish(state):
            log.warning("a restore that was interrupted is %s", ended)
        hold(state, exclusive=False)  # until this process ends
        _bootstrap(settings, new_pepper)
    except (BootstrapError, DatabaseError, PepperError, ReplaceError) as error:
        raise SystemExit(f"corral: {error}") from None
    try:
        control = server(settings)
    except OSError as error:
        raise SystemExit(f"corral: {error}") from None
    control.run()
    if not control.started:
        raise SystemExit(1)


def _bootstrap(settings: Settings, new_pepper: bool) -> None:
    """Bootstrap, as soon as the database answers."""
    silent = False
    while True:
        try:
            bootstrap(settings.control.state.absolute(), settings, new_pepper)
            return
        except DatabaseAway as error:
            if not silent:
                log.warning("control waits: %s", error)
            silent = True
        time.sleep(PAUSE)
