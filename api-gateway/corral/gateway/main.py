"""`corral serve gateway`."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource

import uvloop

from corral.config.settings import Settings
from corral.gateway.life import serve
from corral.gateway.server import Gateway


def run(settings: Settings) -> None:
    """Run one gateway process until it is told to stop."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # What lives as long as the process need not be looked at by each collection.
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)
    # Two descriptors a stream: what the system allows, not what a shell starts with.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    host, _, port = settings.gateway.listen.rpartition(":")
    uvloop.run(_serve(settings, host.strip("[]"), int(port)))


async def _serve(settings: Settings, host: str, port: int) -> None:
    await serve(Gateway(settings, asyncio.get_running_loop()), host, port, settings.gateway.longest_drain)
