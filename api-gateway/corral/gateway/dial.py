"""Makes connections towards the nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

CONNECT_TIMEOUT = 2.0


async def dial(
    loop: asyncio.AbstractEventLoop,
    made: Callable[[], Any],
    address: tuple[str, int],
    done: Callable[[Any], None],
) -> None:
    """Connect to an address; `done` gets the protocol that `made` gives, or the OSError why there is none."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            _, connection = await loop.create_connection(made, address[0], address[1])
    except TimeoutError:
        done(ConnectionError(f"no connection within {CONNECT_TIMEOUT:g} s"))
    except OSError as error:
        done(error)
    else:
        done(connection)
