"""The HTTP service: search by picture, vector and key, the pictures themselves, and the search page.

An app serves one release, and follows: a newer one is opened beside it and then takes its place, so that no
query fails or waits. What fails while following (a damaged release, a model that can't be fetched) is logged
and counted, and the old release goes on.

Every error is JSON: {"error": {"type": ..., "message": ...}}. Not covered: who may ask (put a proxy that
knows in front), TLS, filters.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import Body, FastAPI, File, Form, HTTPException, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException

from namr.data import datasets, images
from namr.data.reading import SampleReader
from namr.errors import ConfigError, ImageRefused, NamrError, ShapeError
from namr.model.distances import Side
from namr.search.items import Item, Place
from namr.search.searcher import Answer, Searcher
from namr.serve import telemetry
from namr.serve.telemetry import Metrics

Successor = Callable[[Searcher], Searcher | None]
"""Given the searcher in use: the one to take its place, None while it is up to date."""

_log = logging.getLogger("namr.serve")
_PAGES = Path(__file__).parent / "pages"
_MAX_EXACT_ITEMS = 200_000
_MAX_QUERIES = 256
_LINGER_S = 2.0
_MEGABYTE = 1 << 20
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
_MEDIA_TYPES = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG", "image/png"), (b"GIF8", "image/gif"))


@dataclass(frozen=True)
class Answers:
    """One answer for each query, in their order."""

    answers: list[Answer]


@dataclass(frozen=True)
class ItemList:
    """Some items of the gallery."""

    items: list[Item]


@dataclass(frozen=True)
class ReleaseInfo:
    """What is being served."""

    release_id: str
    created: str
    model_name: str
    model_version: str
    model_digest: str
    dataset_uri: str
    dataset_version: int
    index_key: str
    metric: str
    structure_side: Side
    embedding_dim: int
    num_items: int
    nprobe: int
    depth: int
    recall_at_10: float
    takes_images: bool


def create_app(
    searcher: Searcher,
    *,
    successor: Successor | None = None,
    poll_interval_s: float = 20.0,
    max_upload_bytes: int = 20 * _MEGABYTE,
) -> FastAPI:
    """The service as an ASGI app; `successor` is asked every `poll_interval_s` for a newer release."""
    live = _Live(searcher)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(live.follow(successor, poll_interval_s)) if successor else None
        try:
            yield
        finally:
            if watching:
                watching.cancel()

    app = FastAPI(
        title="namr search",
        summary="Which images look like this one?",
        description="Distances are distances (not squared), smaller is nearer. An answer is `proved` when no "
        "other item of the release can belong to it.",
        lifespan=lifespan,
        responses={422: {"description": "The query can't be answered as it is; `error.message` says why."}},
    )
    app.add_middleware(_Guard, metrics=live.metrics, max_body_bytes=max_upload_bytes)
    _answer_errors(app)
    _add_search(app, live)
    _add_items(app, live)
    _add_state(app, live)
    app.mount("/static", StaticFiles(directory=_PAGES), name="static")
    return app


class _Live:
    """What is served now; a request takes it once and keeps it to its end."""

    def __init__(self, searcher: Searcher) -> None:
        self.metrics = Metrics()
        self._slots = threading.BoundedSemaphore(os.cpu_count() or 1)
        self._take(searcher)

    @property
    def searcher(self) -> Searcher:
        return self.pictures.searcher

    def _take(self, searcher: Searcher) -> None:
        self.pictures = _Pictures(searcher)
        manifest = searcher.manifest
        self.metrics.serving(
            release_id=manifest.release_id,
            model=f"{manifest.model_name} {manifest.model_version}",
            num_items=len(searcher.items),
        )

    async def follow(self, successor: Successor, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                found = await asyncio.to_thread(successor, self.searcher)
            except Exception as error:  # the edge of the watching task: what is served goes on
                self.metrics.failures.inc()
                _log.exception("the current release can't be opened (%s); serving the old one", error)
                continue
            if found is not None:
                self._take(found)
                _log.warning("now serving release %s", found.manifest.release_id)

    def search(self, searcher: Searcher, **query: Any) -> list[Answer]:
        """No more searches at once than there are cores: more would only wait for each other."""
        if query.get("exact") and len(searcher.items) > _MAX_EXACT_ITEMS:
            raise ConfigError(
                f"exact reads every vector, and this gallery has {len(searcher.items)} items; expected "
                f"at most {_MAX_EXACT_ITEMS}: use depth"
            )
        with self._slots:
            answers = searcher.search(**query)
        self.metrics.searched(
            side=answers[0].side,
            certainties=[answer.certainty for answer in answers],
            stages_ms=asdict(answers[0].timings),
        )
        return answers


class _Pictures:
    """The encoded pictures of a release's items; their dataset is opened when the first one is asked for."""

    def __init__(self, searcher: Searcher) -> None:
        self.searcher = searcher
        self._reader: SampleReader | None = None
        self._lock = threading.Lock()

    def read(self, item_id: int, place: Place) -> bytes:
        with self._lock:
            if self._reader is None:
                manifest = self.searcher.manifest
                dataset = datasets.open_version(manifest.dataset_uri, manifest.dataset_version)
                self._reader = SampleReader(dataset, cache=None)
        ids, offsets, sizes = np.array([[item_id], [place.offset], [place.size]])
        return self._reader.read(ids, offsets, sizes)[0]


def _add_search(app: FastAPI, live: _Live) -> None:
    k_help = "How many neighbours."
    side_help = (
        '"none" orders by plain distance; "query", "both" and "scale" re-rank the first `depth` by the '
        "structure of the query, of both, or by the scale of the items. Default: what the release recommends."
    )
    depth_help = "How many candidates are re-ranked; at least k. Default: the release's."
    nprobe_help = "Lists of the index that are searched. Default: the release's."
    exact_help = f"Compare with every item, in one stage; for galleries of up to {_MAX_EXACT_ITEMS} items."

    @app.post("/search/image", tags=["search"])
    def search_by_image(
        image: Annotated[UploadFile, File(description="An encoded picture: JPEG, PNG, WebP and others.")],
        k: Annotated[int, Form(ge=1, le=1000, description=k_help)] = 10,
        side: Annotated[Side | None, Form(description=side_help)] = None,
        depth: Annotated[int | None, Form(ge=1, le=10_000, description=depth_help)] = None,
        nprobe: Annotated[int | None, Form(ge=1, description=nprobe_help)] = None,
        exact: Annotated[bool, Form(description=exact_help)] = False,
    ) -> Answer:
        """The items that look most like an uploaded picture."""
        data = image.file.read()
        return live.search(
            live.searcher, images=[data], k=k, side=side, depth=depth, nprobe=nprobe, exact=exact
        )[0]

    @app.post("/search/vector", tags=["search"])
    def search_by_vector(
        embeddings: Annotated[
            list[list[float]],
            Body(min_length=1, max_length=_MAX_QUERIES, description="Embeddings, as the model returns them."),
        ],
        structures: Annotated[
            list[list[float]] | None,
            Body(description='One structure embedding each; sides "query" and "both" need them.'),
        ] = None,
        k: Annotated[int, Body(ge=1, le=1000, description=k_help)] = 10,
        side: Annotated[Side | None, Body(description=side_help)] = None,
        depth: Annotated[int | None, Body(ge=1, le=10_000, description=depth_help)] = None,
        nprobe: Annotated[int | None, Body(ge=1, description=nprobe_help)] = None,
        exact: Annotated[bool, Body(description=exact_help)] = False,
    ) -> Answers:
        """The items nearest to each of some vectors."""
        return Answers(
            live.search(
                live.searcher,
                embeddings=_array("embeddings", embeddings),
                structures=None if structures is None else _array("structures", structures),
                k=k,
                side=side,
                depth=depth,
                nprobe=nprobe,
                exact=exact,
            )
        )

    @app.post("/search/key", tags=["search"], responses={404: {"description": "No item has this key."}})
    def search_by_key(
        key: Annotated[str, Body(description="The user's own identity of an item of the gallery.")],
        k: Annotated[int, Body(ge=1, le=1000, description=k_help)] = 10,
        side: Annotated[Side | None, Body(description=side_help)] = None,
        depth: Annotated[int | None, Body(ge=1, le=10_000, description=depth_help)] = None,
        nprobe: Annotated[int | None, Body(ge=1, description=nprobe_help)] = None,
        exact: Annotated[bool, Body(description=exact_help)] = False,
    ) -> Answer:
        """The items that look most like one of the gallery, which is left out of the answer itself."""
        searcher = live.searcher
        if searcher.items.by_key(key) is None:
            raise HTTPException(404, f"no item of release {searcher.manifest.release_id} has the key {key!r}")
        return live.search(searcher, keys=[key], k=k, side=side, depth=depth, nprobe=nprobe, exact=exact)[0]


def _add_items(app: FastAPI, live: _Live) -> None:
    @app.get("/items", tags=["items"])
    def some_items(
        num: Annotated[int, Query(ge=1, le=200, description="How many.")] = 24,
        seed: Annotated[int, Query(ge=0, description="Another seed draws other items.")] = 0,
    ) -> ItemList:
        """Items drawn at random."""
        return ItemList(live.searcher.items.draw(num, seed=seed))

    @app.get("/items/{item_id}", tags=["items"], responses={404: {"description": "No such item."}})
    def one_item(item_id: int) -> Item:
        """Key, label and fields of an item."""
        item = live.searcher.items.by_id(item_id)
        if item is None:
            raise HTTPException(404, f"no item has the id {item_id}")
        return item

    @app.get(
        "/items/{item_id}/image",
        tags=["items"],
        response_class=Response,
        responses={200: {"content": {"image/*": {}}}, 404: {"description": "No such item."}},
    )
    def item_image(
        request: Request,
        item_id: int,
        size_px: Annotated[
            int | None,
            Query(ge=16, le=2048, description="Longest side of a JPEG thumbnail; default: as stored."),
        ] = None,
    ) -> Response:
        """The picture of an item."""
        pictures = live.pictures
        searcher = pictures.searcher
        place = searcher.items.place(item_id)
        if place is None or place.size == 0:
            raise HTTPException(404, f"no item has the id {item_id}, or its picture was erased")
        tag = f'"{searcher.manifest.dataset_digest[:16]}-{item_id}-{size_px or "full"}"'
        headers = {"ETag": tag, "Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        data = pictures.read(item_id, place)
        if size_px is not None:
            return Response(images.thumbnail(data, size_px=size_px), media_type="image/jpeg", headers=headers)
        return Response(data, media_type=_media_type(data), headers=headers)


def _add_state(app: FastAPI, live: _Live) -> None:
    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(_PAGES / "index.html", headers=_PAGE_HEADERS)

    @app.get("/health", tags=["state"])
    async def health() -> dict[str, str]:
        """The process is up."""
        return {"status": "up"}

    @app.get("/ready", tags=["state"])
    async def ready() -> dict[str, str]:
        """A release is open and queries are answered."""
        return {"status": "ready", "release_id": live.searcher.manifest.release_id}

    @app.get("/release", tags=["state"])
    async def release() -> ReleaseInfo:
        """What is being served."""
        searcher = live.searcher
        manifest = searcher.manifest
        return ReleaseInfo(
            release_id=manifest.release_id,
            created=manifest.created,
            model_name=manifest.model_name,
            model_version=manifest.model_version,
            model_digest=manifest.model_digest,
            dataset_uri=manifest.dataset_uri,
            dataset_version=manifest.dataset_version,
            index_key=manifest.index_key,
            metric=manifest.metric,
            structure_side=manifest.structure_side,
            embedding_dim=manifest.embedding_dim,
            num_items=len(searcher.items),
            nprobe=manifest.nprobe,
            depth=manifest.depth,
            recall_at_10=manifest.recall_at_10,
            takes_images=searcher.model is not None,
        )

    @app.get("/metrics", tags=["state"], response_class=Response)
    def metrics() -> Response:
        """Prometheus metrics."""
        return Response(live.metrics.text(), media_type=telemetry.CONTENT_TYPE)


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(NamrError)
    async def refused(_: Request, error: NamrError) -> JSONResponse:
        """What the caller can mend is 422, what the operator has to is 503."""
        is_callers = isinstance(error, ImageRefused | ShapeError | ConfigError)
        if not is_callers:
            _log.error("%s: %s", type(error).__name__, error)
        return _error(422 if is_callers else 503, type(error).__name__, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        said = [
            f"{'.'.join(str(part) for part in one['loc'][1:]) or 'the body'}: {one['msg']}"
            for one in error.errors()[:3]
        ]
        return _error(422, "InvalidRequest", "; ".join(said))

    @app.exception_handler(StarletteHTTPException)
    async def http(_: Request, error: StarletteHTTPException) -> JSONResponse:
        names = {400: "BadRequest", 404: "NotFound", 405: "MethodNotAllowed", 413: "TooLarge"}
        return _error(error.status_code, names.get(error.status_code, "HttpError"), str(error.detail))

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        """The process edge: uvicorn logs the traceback, the caller learns no more than the kind."""
        return _error(500, "InternalError", f"a fault of the service ({type(error).__name__}); see its log")


class _Guard:
    """Refuses bodies that are too large before they are read whole, and measures every request."""

    def __init__(self, app: Callable[..., Awaitable[None]], *, metrics: Metrics, max_body_bytes: int) -> None:
        self._app, self._metrics, self._max = app, metrics, max_body_bytes

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, num_bytes = time.perf_counter(), 500, 0

        async def counted_receive() -> Any:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max:
                raise StarletteHTTPException(413)
            return message

        async def noted_send(message: Any) -> None:
            nonlocal status
            if num_bytes > self._max:
                return  # the app's word about a body that it was not given; `_refuse` says it
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            said = dict(scope["headers"]).get(b"content-length", b"0")
            num_bytes = int(said) if said.isdigit() and int(said) > self._max else 0
            if num_bytes == 0:
                await self._app(scope, counted_receive, noted_send)
            if num_bytes > self._max:
                status = 413
                await self._refuse(receive, send)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)

    async def _refuse(self, receive: Any, send: Any) -> None:
        """Answers 413 while the body is on its way, and closes.

        A server that closes at once makes the client's system throw the answer away; one that doesn't close
        reads the body to its end. So: answer, leave the client a moment to see it, close.
        """
        reply = _error(
            413,
            "TooLarge",
            f"the request is larger than {self._max / _MEGABYTE:.3g} MB; send a smaller picture",
        )
        headers = [*reply.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": reply.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                num_bytes = 0
                while num_bytes < self._max and (message := await receive()).get("more_body", False):
                    num_bytes += len(message.get("body", b""))
                if num_bytes >= self._max:
                    await asyncio.sleep(_LINGER_S)  # reading no more: the client has to wait, and look
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _error(status: int, kind: str, message: str) -> JSONResponse:
    return JSONResponse({"error": {"type": kind, "message": message}}, status_code=status)


def _array(name: str, rows: list[list[float]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ShapeError(f"{name} have rows of {lengths[0]} to {lengths[-1]} numbers; expected one length")
    with np.errstate(over="ignore"):
        return np.array(rows, np.float32)


def _media_type(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for start, kind in _MEDIA_TYPES if data.startswith(start)), "application/octet-stream")
