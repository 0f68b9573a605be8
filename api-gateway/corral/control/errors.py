"""Errors of control's HTTP API: always ``{"error": {"code", "message"}}``, never a 422."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from corral.store.database import reason
from corral.wire.errors import jittered

log = logging.getLogger(__name__)

AGAIN = 1.0
"""Seconds after which a call may succeed: the next one that comes asks the database anew."""
_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class Problem(Exception):
    """An answer other than success. ``extra`` stands beside ``error`` in the body."""

    def __init__(self, status: int, code: str, message: str, **extra: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.extra = status, code, message, extra


def body(code: str, message: str, **extra: Any) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"code": code, "message": message}, **extra}


def answer(problem: Problem) -> JSONResponse:
    """A problem as a response; a 401 says how to authenticate, a 503 when to come back."""
    headers = {"WWW-Authenticate": "Bearer"} if problem.status == 401 else None
    if problem.status == 503:
        headers = {"Retry-After": str(jittered(AGAIN))}
    return JSONResponse(
        body(problem.code, problem.message, **problem.extra), status_code=problem.status, headers=headers
    )


def unrecorded() -> Problem:
    """What is answered to a call that cannot be entered in the audit trail."""
    why = "the database takes no records now (its disk may be full), and nothing is done or shown that is not recorded"
    return Problem(503, "database_unavailable", why)


_AWAY = Problem(503, "database_unavailable", "the database does not answer now")


def install(app: FastAPI) -> None:
    """Make every error of `app` look alike."""

    @app.exception_handler(Problem)
    async def stated(request: Request, error: Problem) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(Problem(400, "bad_request", "; ".join(explain(one) for one in error.errors()[:5])))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        code = _CODES.get(error.status_code, "error")
        return answer(Problem(error.status_code, code, str(error.detail)))

    @app.exception_handler(SQLAlchemyError)
    async def database(request: Request, error: SQLAlchemyError) -> JSONResponse:
        log.error("the database failed: %s", reason(error))
        return answer(unrecorded() if request.method not in ("GET", "HEAD") else _AWAY)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> JSONResponse:
        return answer(Problem(400, "bad_request", "the body did not come to its end"))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return answer(Problem(500, "internal_error", "control failed at this; its log says more"))


def explain(error: Mapping[str, Any]) -> str:
    """One validation error: the field, and what is wrong with it."""
    if error.get("type") == "json_invalid":
        return f"the body is no JSON: {error.get('ctx', {}).get('error', 'malformed')}"
    place: Sequence[Any] = [part for part in error["loc"] if part not in ("body", "query", "path", "header")]
    message = str(error["msg"]).removeprefix("Value error, ")
    if error.get("type") == "extra_forbidden":
        message = "unknown field"
    return f"{'.'.join(str(part) for part in place) or 'body'}: {message}"
