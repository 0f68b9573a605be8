"""`corral serve control`."""

from __future__ import annotations

import logging
from pathlib import Path

import uvicorn

from corral.config.settings import Settings
from corral.config.values import host_port
from corral.control import bootstrap as start
from corral.control.app import Application

__all__ = ["bootstrap", "run", "server"]


def bootstrap(state: Path, settings: Settings) -> None:
    """Make the secrets that are not there yet (mode 600) and bring the database to this version's schema.

    Raises:
        BootstrapError, PepperError, DatabaseError: what is there cannot be used; says what to do.
    """
    start.bootstrap(state, settings)


def server(settings: Settings) -> uvicorn.Server:
    """Control's HTTP server, not running yet."""
    host, port = host_port(settings.control.listen)
    return uvicorn.Server(
        uvicorn.Config(
            Application(settings),
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


def run(settings: Settings) -> None:
    """Run control until it is told to stop; makes what `bootstrap` makes first."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for name in ("httpx", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    bootstrap(settings.control.state.absolute(), settings)
    control = server(settings)
    control.run()
    if not control.started:
        raise SystemExit(1)
