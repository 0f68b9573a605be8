"""What a key may do, and that a key which it makes may do no more. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from ipaddress import ip_network
from typing import Any

from corral.store.keys import Network, allows

ROLES = ("inference", "operator", "admin")
"""From the least to the most: each may what those before it may."""
NO_MODEL = " "
"""A glob that no model's name matches, and nobody may give."""
LIMITS = ("rpm", "tpm", "concurrency", "daily_tokens", "monthly_tokens")


@dataclass(frozen=True)
class Scope:
    """What a key may do. ``networks`` () is anywhere, ``expires`` epoch seconds or infinity; a limit of None is the
    default of corral.yaml. ``weight`` is its share where keys wait for the same model."""

    role: str = "inference"
    tenant: str = "default"
    models: tuple[str, ...] = ("*",)
    networks: tuple[Network, ...] = ()
    expires: float = math.inf
    batch: bool = False
    limits: Mapping[str, int | None] = field(default_factory=dict)
    weight: float = 1.0

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Scope:
        """The scope of a row of `keys`."""
        return cls(
            role=row["role"],
            tenant=row["tenant"],
            models=tuple(row["models"]),
            networks=tuple(ip_network(one) for one in row["networks"] or ()),
            expires=math.inf if row["expires"] is None else row["expires"],
            batch=row["class"] == "batch",
            limits={name: row[name] for name in LIMITS},
            weight=row["weight"] or 1.0,
        )

    def from_here(self, address: str) -> bool:
        """Whether it may be used from an address; from one that is none only if it may be used from anywhere."""
        return not self.networks or allows(self.networks, address)


def excess(child: Scope, maker: Scope, defaults: Mapping[str, int | None]) -> str | None:
    """In what `child` exceeds `maker`, in words that name the field; None where it does not.

    An administrator says for every tenant what is allowed there; its own limits are of its own requests alone.
    `defaults` are the limits of a key that has none.
    """
    admin = maker.role == "admin"
    if ROLES.index(child.role) > ROLES.index(maker.role):
        return f"role: a key of role {maker.role} makes none of role {child.role}"
    if not admin and child.tenant != maker.tenant:
        return f"tenant: a key of tenant {maker.tenant!r} makes keys of that tenant alone"
    for glob in child.models:
        if not _may(maker, glob):
            return f"models: {glob!r} is beyond the models of the key that makes it ({','.join(maker.models)})"
    if maker.networks:
        if not child.networks:
            return f"networks: the key that makes it works from {_joined(maker.networks)} alone: name some of these"
        for network in child.networks:
            if not any(_within(network, own) for own in maker.networks):
                return f"networks: {network} is beyond those of the key that makes it ({_joined(maker.networks)})"
    if child.expires > maker.expires:
        return "expires: later than the key that makes it, or never"
    if maker.batch and not child.batch:
        return "class: a key of class batch makes keys of that class alone"
    if not admin and child.weight > maker.weight:
        return f"weight: more than that of the key that makes it ({maker.weight:g})"
    for name in () if admin else LIMITS:
        most = _limit(maker, name, defaults)
        if _limit(child, name, defaults) > most:
            return f"{name}: more than that of the key that makes it ({most:.0f})"
    return None


def narrowed(child: Scope, maker: Scope, defaults: Mapping[str, int | None]) -> dict[str, Any]:
    """The columns of `child` that have to change, now that `maker` may do less; none where it may do no more.

    Of its models those are left that both may use, as far as that can be told; where that is none, `NO_MODEL`.
    """
    changes: dict[str, Any] = {}
    kept = [glob for glob in child.models if _may(maker, glob)]
    if len(kept) < len(child.models):
        beyond = [glob for glob in child.models if glob not in kept]
        mine = [own for own in maker.models if any(covers(glob, own) for glob in beyond)]
        left = kept + [own for own in mine if not any(covers(glob, own) for glob in kept)]
        changes["models"] = left or [NO_MODEL]
    if maker.role == "admin":
        return changes
    if child.weight > maker.weight:
        changes["weight"] = maker.weight
    for name in LIMITS:
        most = _limit(maker, name, defaults)
        if _limit(child, name, defaults) > most:
            changes[name] = int(most)
    return changes


def _may(maker: Scope, glob: str) -> bool:
    return glob == NO_MODEL or any(covers(own, glob) for own in maker.models)


def covers(outer: str, inner: str) -> bool:
    """Whether every name that glob `inner` matches is matched by `outer`; False also where that cannot be told."""
    if outer in ("*", inner):
        return True
    if not set("*?[") & set(inner):
        return fnmatchcase(inner, outer)
    if "[" in outer or "[" in inner:
        return False
    return _absorbs(outer, inner)


def _absorbs(outer: str, inner: str) -> bool:
    """`outer` against `inner` as if that were text: a star takes anything, a question mark any one but a star."""
    reached = {0}
    for symbol in outer:
        if symbol == "*":
            reached = set(range(min(reached), len(inner) + 1))
        else:
            fits = {at for at in reached if at < len(inner) and inner[at] != "*"}
            reached = {at + 1 for at in fits if symbol in ("?", inner[at])}
        if not reached:
            return False
    return len(inner) in reached


def _within(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]


def _limit(scope: Scope, name: str, defaults: Mapping[str, int | None]) -> float:
    own = scope.limits.get(name)
    own = defaults.get(name) if own is None else own
    return math.inf if own is None else own


def _joined(networks: Sequence[Network]) -> str:
    return ",".join(str(one) for one in networks)


def kept(wanted: bool, setting: str) -> list[str]:
    """What the maker of a key should know of its prompts and answers: it takes `audit.content: full` and the key's own
    wish to keep them, and a key is not changed in that."""
    if wanted and setting != "full":
        return [
            f"content: its prompts and answers are not kept: audit.content is {setting}. That takes full, and "
            "audit.content_recipient, in corral.yaml (docs/audit.md)"
        ]
    if setting == "full" and not wanted:
        return ["content: its prompts and answers are not kept, though audit.content is full: that takes --content"]
    return []
