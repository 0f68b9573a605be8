"""What a node answers, read as what it may be: of bounded size and nesting, and nothing in it that is not JSON.

A node is another program on another machine: whatever it answers may fail what was asked of it, and nothing else.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import httpx
import msgspec

LIMIT = 4 << 20
"""Longest answer in bytes: a list of thousands of models is not a tenth of it."""
MODELS_MAX = 4096
DEPTH = 6

_Leaf = str | int | float | bool | None
_Value: Any = _Leaf
for _ in range(DEPTH):
    _Value = _Leaf | list[_Value] | dict[str, _Value]

# Without a space, and without what stands between a model and a group of nodes (`fleet.pools`): it would count there.
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256, pattern=r"\A[^\x00-\x20\x7f-\x9f|]+\Z")]
_Version = Annotated[str, msgspec.Meta(pattern=r"\A[\x21-\x7e]{1,64}\Z")]
_Amount = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Model(msgspec.Struct):
    """What control itself reads of an entry; the rest is passed on as it is."""

    name: _Name
    digest: str | None = None
    size: _Amount | None = None
    size_vram: _Amount | None = None
    context_length: _Amount | None = None
    expires_at: str | None = None


class _Listed(msgspec.Struct):
    models: Annotated[list[_Model], msgspec.Meta(max_length=MODELS_MAX)] | None = None


class _Versioned(msgspec.Struct):
    version: _Version


class _Event(msgspec.Struct):
    total: _Amount | None = None
    completed: _Amount | None = None


_anything = msgspec.json.Decoder(dict[str, _Value])
_listed = msgspec.json.Decoder(_Listed)
_versioned = msgspec.json.Decoder(_Versioned)
_event = msgspec.json.Decoder(_Event)


async def fetch(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    json: object = None,
    timeout: float | None = None,  # noqa: ASYNC109
) -> tuple[int, bytes]:
    """Status and body of an answer, which is whole within `timeout` seconds: a node may send a byte now and then.

    Raises:
        ValueError: it is longer than LIMIT, or compressed though nobody asked for that.
        httpx.HTTPError: there was none.
    """
    headers = {"Accept-Encoding": "identity"}
    try:
        async with (
            asyncio.timeout(timeout),
            client.stream(method, url, json=json, timeout=timeout, headers=headers) as answer,
        ):
            return answer.status_code, await whole(answer)
    except TimeoutError:
        raise httpx.ReadTimeout("the answer is not whole in time") from None


async def whole(answer: httpx.Response) -> bytes:
    """The body of an answer that is open, to who asked for no encoding of it.

    Raises:
        ValueError: it is longer than LIMIT, or compressed.
        httpx.HTTPError: it did not come to its end.
    """
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise ValueError("the answer is compressed")
    body = bytearray()
    async for chunk in answer.aiter_raw():
        body += chunk
        if len(body) > LIMIT:
            raise ValueError(f"the answer is longer than {LIMIT >> 20} MiB")
    return bytes(body)


async def resident(client: httpx.AsyncClient, url: str, model: str, timeout: float) -> list[dict[str, Any]]:  # noqa: ASYNC109
    """The entries of a node's `/api/ps` of this name: an older version may still be there beside the new one.

    Raises:
        ValueError, httpx.HTTPError: it does not say.
    """
    status, body = await fetch(client, "GET", url + "/api/ps", timeout=timeout)
    if status != 200:
        raise ValueError(f"status {status}")
    return [entry for entry in models(body) if entry["name"] == model]


def value(body: bytes) -> dict[str, Any]:
    """A JSON object, nested at most DEPTH deep. ValueError says what else it is."""
    found: dict[str, Any] = _decode(_anything, body)
    return found


def models(body: bytes) -> list[dict[str, Any]]:
    """The entries of `/api/tags` or `/api/ps`, each with a name. ValueError says what is wrong with them."""
    _decode(_listed, body)
    return list(value(body).get("models") or [])


def version(body: bytes) -> str:
    """Of `/api/version`. ValueError where there is none."""
    return str(_decode(_versioned, body).version)


def event(body: bytes) -> dict[str, Any]:
    """A line of a pull's progress, with amounts that are some. ValueError says what is wrong with it."""
    _decode(_event, body)
    return value(body)


def shown(body: bytes, length: int = 200) -> str:
    """The beginning of a body, for people."""
    return body[:length].decode("utf-8", "replace")


def _decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("no UTF-8") from None
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
