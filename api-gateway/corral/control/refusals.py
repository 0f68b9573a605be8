"""What the routes of the admin API may answer besides what is asked for, as its description says."""

from __future__ import annotations

OF_ANY = {
    "400": "Bad input; the message names the field.",
    "401": "No key, or one that does not work.",
    "403": "The key may not do this, or not from there.",
    "500": "A fault of control's own; its log says more.",
    "503": "The database, or who else is needed, takes or says nothing now; `Retry-After` says when.",
}
TOO_LARGE = "The body is larger than 1 MiB."
"""413, of what may have a body."""

_KEY = "There is no such key."
_TENANT = "There is no such tenant."
_NODE = "There is no such node."
_NAMED = "Several keys have this name: use an id"
_BUSY = "An operation works on one of the nodes"
_REQUEST = "No such request waits or runs."
_RECORD = "There is no such record for this caller, or nothing of it is kept."
_HAPROXY = "HAProxy did not take the change, and nothing was changed."
_AGAIN = "The node is not drained: it was given work again."

OF_ROUTE: dict[tuple[str, str], dict[str, str]] = {
    ("post", "/admin/keys"): {"404": "There is no such tenant, and `new_tenant` does not ask for it."},
    ("get", "/admin/keys/{key}"): {"404": _KEY, "409": f"{_NAMED}."},
    ("patch", "/admin/keys/{key}"): {"404": _KEY, "409": f"{_NAMED}. Or the key was revoked."},
    ("delete", "/admin/keys/{key}"): {"404": _KEY, "409": f"{_NAMED}. Or it is the last admin key."},
    ("post", "/admin/keys/{key}/revoke"): {"404": _KEY, "409": f"{_NAMED}. Or it is the last admin key."},
    ("post", "/admin/keys/{key}/rotate"): {
        "404": _KEY,
        "409": f"{_NAMED}. Or the key was revoked, or an older text of it still works.",
    },
    ("post", "/admin/tenants"): {"409": "There is one of that name."},
    ("get", "/admin/tenants/{tenant}"): {"404": _TENANT},
    ("patch", "/admin/tenants/{tenant}"): {"404": _TENANT},
    ("delete", "/admin/tenants/{tenant}"): {
        "404": _TENANT,
        "409": "A key of it still works, or it is the default.",
    },
    ("post", "/admin/nodes"): {"409": "A node has that name or address, or the address is Corral's.", "502": _HAPROXY},
    ("delete", "/admin/nodes/{name}"): {"404": _NODE, "409": "It was given work again meanwhile.", "502": _HAPROXY},
    ("post", "/admin/nodes/{name}/drain"): {"404": _NODE, "409": _AGAIN},
    ("get", "/admin/nodes/{name}/drain"): {"404": _NODE, "409": _AGAIN},
    ("post", "/admin/nodes/{name}/resume"): {"404": _NODE},
    ("get", "/admin/models/why"): {"404": "No node holds the model, and the catalogue does not name it."},
    ("post", "/admin/models/apply"): {"409": f"{_BUSY}, the catalogue is empty, or the plan is another one by now."},
    ("post", "/admin/models/pull"): {
        "404": _NODE,
        "409": f"{_BUSY}, there is no node, or corral.yaml states the digest that is to be recorded.",
    },
    ("post", "/admin/models/load"): {"404": _NODE, "409": f"{_BUSY}, or there is no node."},
    ("post", "/admin/models/preload"): {"404": _NODE, "409": f"{_BUSY}, or there is no node."},
    ("post", "/admin/models/unload"): {
        "404": "There is no such node, or none of them has the model.",
        "409": f"{_BUSY}, there is no node, or the model is pinned.",
    },
    ("post", "/admin/models/remove"): {
        "404": "There is no such node, or none of them holds the model.",
        "409": f"{_BUSY}, there is no node, or the catalogue names the model.",
    },
    ("get", "/admin/operations/{operation}"): {"404": "There is no such operation."},
    ("post", "/admin/operations/{operation}/cancel"): {"404": "There is no such operation."},
    ("get", "/admin/requests"): {"404": _KEY},
    ("get", "/admin/requests/{request}"): {"404": _REQUEST, "409": "Several requests have this id of their callers'."},
    ("post", "/admin/requests/{request}/cancel"): {
        "404": _REQUEST,
        "409": "It had ended by itself, or several requests have this id of their callers'.",
    },
    ("get", "/admin/audit"): {"404": _KEY},
    ("post", "/admin/audit/compare"): {"404": _RECORD},
    ("get", "/admin/audit/content"): {"404": _RECORD},
    ("get", "/admin/usage"): {"404": "There is no such key or tenant."},
}
"""By method and path, besides what any may."""


def of(method: str, path: str) -> dict[str, str]:
    """The statuses of a route, each with what it means."""
    large = {} if method == "get" else {"413": TOO_LARGE}
    return dict(sorted({**OF_ANY, **large, **OF_ROUTE.get((method, path), {})}.items()))
