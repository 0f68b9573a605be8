"""Prometheus's targets by job, as its http_sd wants them: an added node or gateway is scraped without an edit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from corral.config.values import WILDCARDS, host_port, joined
from corral.control.gateways import Gateway
from corral.control.prober import Member


def group(target: str, **labels: str) -> dict[str, Any]:
    """One target with its labels."""
    return {"targets": [target], "labels": labels}


def nodes(members: Iterable[Member], here: str) -> list[dict[str, Any]]:
    """A page of control's per node; ``here`` is control's metrics address as the asker knows it."""
    return [
        group(here, __metrics_path__=f"/metrics/nodes/{member.name}", node=member.name, instance=_host(member.url))
        for member in members
    ]


def gateways(known: Iterable[Gateway]) -> list[dict[str, Any]]:
    """Every gateway that said where its metrics are."""
    return [group(gateway.metrics, gateway=gateway.name) for gateway in known if gateway.metrics]


def address(told: str, peer: str) -> str:
    """Where a gateway's metrics are: as it told, with the peer's address for a wildcard; "" for no such thing.

    It is used for a target and nothing else.
    """
    try:
        host, port = host_port(told[:300])
    except ValueError:
        return ""
    host = peer if host in WILDCARDS else host
    return joined(host, port) if host and port else ""


def _host(url: str) -> str:
    parts = urlsplit(url)
    return joined(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
