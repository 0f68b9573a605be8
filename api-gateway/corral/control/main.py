"""`corral serve control`."""

from __future__ import annotations

import logging

import uvicorn

from corral.config.settings import Settings
from corral.config.values import host_port
from corral.control.app import Application
from corral.control.bootstrap import BootstrapError, bootstrap
from corral.control.monitor import listen
from corral.store.database import DatabaseError
from corral.store.keys import PepperError

__all__ = ["bootstrap", "run", "server"]


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
    try:
        bootstrap(settings.control.state.absolute(), settings, new_pepper)
    except (BootstrapError, DatabaseError, PepperError) as error:
        raise SystemExit(f"corral: {error}") from None
    try:
        control = server(settings)
    except OSError as error:
        raise SystemExit(f"corral: {error}") from None
    control.run()
    if not control.started:
        raise SystemExit(1)
