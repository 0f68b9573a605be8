"""Clients of what Corral itself asks over HTTP: control, nodes, Alertmanager, a webhook. Not the token path."""

from __future__ import annotations

import httpx


class _Transport(httpx.AsyncHTTPTransport):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return await super().handle_async_request(request)
        except AttributeError as error:
            # anyio 4 looks at the socket of a connection that was made, which has none if it was closed in that moment.
            if "getpeername" not in str(error):
                raise
            raise httpx.ConnectError("the connection ended as it was made", request=request) from error


def http_client(timeout: float | None = 5.0, *, verify: bool = True) -> httpx.AsyncClient:
    """A client that follows no redirect and heeds no proxy of the environment.

    Args:
        timeout: Seconds to connect, and between two reads; None is for ever.
        verify: HTTPS is asked, and its certificates are checked. Reading those of all authorities takes a tenth of a
            second in which nothing else runs: False where only HTTP is.

    Each of its calls raises httpx.HTTPError alone where no answer comes.
    """
    transport = _Transport(verify=verify, trust_env=False)
    return httpx.AsyncClient(transport=transport, timeout=timeout, trust_env=False)
