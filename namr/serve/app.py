"""The HTTP service: search by picture, vector and key, the pictures themselves, and the search page.

Every error is JSON: {"error": {"type": ..., "message": ...}}. Not covered: who may ask (put a proxy that
knows in front), TLS.
"""

import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from namr.errors import Busy, ConfigError, ImageRefused, NamrError, ShapeError, TimedOut
from namr.search.searcher import Searcher
from namr.serve import routes
from namr.serve.follower import Follower
from namr.serve.guard import Guard, error_body
from namr.serve.limits import Limits
from namr.serve.live import Live
from namr.serve.telemetry import Metrics

_log = logging.getLogger("namr.serve")
_LIMITS = Limits()
_KINDS = {400: "BadRequest", 404: "NotFound", 405: "MethodNotAllowed", 413: "TooLarge", 503: "NotReady"}


def create_app(
    searcher: Searcher,
    *,
    follower: Follower | None = None,
    poll_interval_s: float = 20.0,
    limits: Limits = _LIMITS,
) -> FastAPI:
    """The service as an ASGI app; `follower` is asked every `poll_interval_s` for what is newer."""
    live = Live(searcher, limits=limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with live.following(follower, poll_interval_s):
            yield

    app = FastAPI(
        title="namr search",
        summary="Which images look like this one?",
        description="Distances are distances (not squared), smaller is nearer. An answer is `proved` when no "
        "other item of the release can belong to it, and `calibrated` when held-out queries say so, with the "
        "rate of error that /release tells.",
        lifespan=lifespan,
        responses={
            422: {"description": "The query can't be answered as it is; `error.message` says why."},
            429: {"description": "There is too much to do; ask again after `Retry-After` seconds."},
            504: {"description": "The search took too long and was stopped."},
        },
    )
    app.add_middleware(Guard, metrics=live.metrics, limits=limits, busy=live.busy)
    _answer_errors(app, live.metrics)
    routes.add_search(app, live)
    routes.add_items(app, live)
    routes.add_state(app, live)
    app.mount("/static", StaticFiles(directory=routes.PAGES), name="static")
    return app


def _answer_errors(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(NamrError)
    async def refused(_: Request, error: NamrError) -> JSONResponse:
        """What the caller can mend is 422, what time mends 429 or 504, what the operator has to mend 503."""
        kind = type(error).__name__
        if isinstance(error, ImageRefused | ShapeError | ConfigError):
            return _error(422, kind, str(error))
        if isinstance(error, Busy | TimedOut):
            metrics.refused.labels(kind).inc()
            reply = _error(429 if isinstance(error, Busy) else 504, kind, str(error))
            if isinstance(error, Busy):
                reply.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
            return reply
        _log.error("%s: %s", kind, error)
        return _error(503, kind, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        said = [
            f"{'.'.join(str(part) for part in one['loc'][1:]) or 'the body'}: {one['msg']}"
            for one in error.errors()[:3]
        ]
        return _error(422, "InvalidRequest", "; ".join(said))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, _KINDS.get(error.status_code, "HttpError"), str(error.detail))

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        """The process edge: uvicorn logs the traceback, the caller learns no more than the kind."""
        return _error(500, "InternalError", f"a fault of the service ({type(error).__name__}); see its log")


def _error(status: int, kind: str, message: str) -> JSONResponse:
    return JSONResponse(error_body(kind, message), status_code=status)
