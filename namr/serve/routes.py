"""The routes of the service, and what their bodies hold.

The options of a search are those of `SearchOptions`, with this service's limits; a body with a field that no
option or query has is refused.
"""

import asyncio
import dataclasses
import difflib
import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints
from weakref import WeakKeyDictionary

import numpy as np
from fastapi import Depends, FastAPI, File, Form, HTTPException, Query, Request, Response, UploadFile
from fastapi.responses import FileResponse

from namr.data import images
from namr.errors import ConfigError, ShapeError
from namr.search import fields, filters
from namr.search.answers import Answer, FieldList, Item, ReleaseInfo, SearchOptions
from namr.search.items import Items
from namr.search.rerank import Stop
from namr.serve import telemetry
from namr.serve.limits import MAX_DEPTH, MAX_K, MAX_QUERIES
from namr.serve.live import Admit, Live

Rows = np.ndarray[Any, np.dtype[np.float32]]

PAGES = Path(__file__).parent / "pages"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
_NUMBERS = ("k", "depth", "nprobe")
_OPTIONS = {option.name: option for option in dataclasses.fields(SearchOptions)}


@dataclass(frozen=True, kw_only=True)
class Options(SearchOptions):
    """The options of a search within the limits of a service."""

    k: int = field(default=SearchOptions.k, metadata={**_OPTIONS["k"].metadata, "ge": 1, "le": MAX_K})
    depth: Annotated[int, Query(ge=1, le=MAX_DEPTH)] | Literal["adaptive"] | None = field(
        default=None, metadata=_OPTIONS["depth"].metadata
    )


@dataclass(frozen=True, kw_only=True)
class VectorQuery(Options):
    """Some vectors, and how to search."""

    embeddings: list[list[float]] = field(
        metadata={
            "description": "Embeddings, as the model returns them.",
            "min_length": 1,
            "max_length": MAX_QUERIES,
        }
    )
    structures: list[list[float]] | None = field(
        default=None,
        metadata={"description": 'One structure embedding each; sides "query" and "both" need them.'},
    )


@dataclass(frozen=True, kw_only=True)
class KeyQuery(Options):
    """An item of the gallery, and how to search."""

    key: str = field(metadata={"description": "The user's own identity of an item of the gallery."})


@dataclass(frozen=True)
class Answers:
    """One answer for each query, in their order."""

    answers: list[Answer]


@dataclass(frozen=True)
class ItemList:
    """Some items of the gallery."""

    items: list[Item]


def add_search(app: FastAPI, live: Live) -> None:
    """Search by picture, by vectors and by key."""

    @app.post("/search/image", tags=["search"], dependencies=[_knows(Options, "image")])
    async def search_by_image(
        image: Annotated[UploadFile, File(description="An encoded picture: JPEG, PNG, WebP and others.")],
        options: Annotated[Options, Depends(_of_form)],
    ) -> Answer:
        """The items that look most like an uploaded picture."""
        searcher, data = live.searcher, await image.read()
        answers = await live.search(
            searcher,
            options,
            1,
            lambda stop, admit: searcher.search(images=[data], options=options, stop=stop, admit=admit),
        )
        return answers[0]

    @app.post("/search/vector", tags=["search"], dependencies=[_knows(VectorQuery)])
    async def search_by_vector(query: VectorQuery) -> Answers:
        """The items nearest to each of some vectors."""
        searcher = live.searcher

        def work(stop: Stop, admit: Admit) -> list[Answer]:
            x = _rows("embeddings", query.embeddings)
            s = None if query.structures is None else _rows("structures", query.structures)
            return searcher.search(embeddings=x, structures=s, options=query, stop=stop, admit=admit)

        answers = await live.search(searcher, query, len(query.embeddings), work)
        return Answers(answers)

    @app.post(
        "/search/key",
        tags=["search"],
        dependencies=[_knows(KeyQuery)],
        responses={404: {"description": "No item has this key."}},
    )
    async def search_by_key(query: KeyQuery) -> Answer:
        """The items that look most like one of the gallery, which is left out of the answer itself."""
        searcher, key = live.searcher, query.key
        if searcher.items.by_key(key) is None:
            raise HTTPException(404, f"no item of release {searcher.manifest.release_id} has the key {key!r}")
        answers = await live.search(
            searcher,
            query,
            1,
            lambda stop, admit: searcher.search(keys=[key], options=query, stop=stop, admit=admit),
        )
        return answers[0]


def add_items(app: FastAPI, live: Live) -> None:
    """The items of the gallery and their pictures."""
    described: WeakKeyDictionary[Items, FieldList] = WeakKeyDictionary()

    @app.get("/fields", tags=["items"])
    def filter_fields() -> FieldList:
        """The label and the fields of the items, which a filter can name, with values that they take."""
        items = live.searcher.items
        if items not in described:
            described[items] = fields.described(items)
        return described[items]

    @app.get("/items", tags=["items"])
    async def some_items(
        num: Annotated[int, Query(ge=1, le=200, description="How many.")] = 24,
        seed: Annotated[int, Query(ge=0, description="Another seed draws other items.")] = 0,
        filter: Annotated[
            str | None, Query(description="Which items, as a search takes it, as JSON text. Default: all.")
        ] = None,
    ) -> ItemList:
        """Items drawn at random."""
        items, wanted = live.searcher.items, _filter_of(filter)
        if wanted is None:
            return ItemList(await asyncio.to_thread(items.draw, num, seed=seed))

        def draw(_: Stop) -> list[Item]:
            allowed = items.matching(filters.parse(wanted, items.kinds))
            return items.draw(num, seed=seed, allowed=allowed)

        return ItemList(await live.in_line(draw))  # to read all items takes as long as many a search

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
        searcher, pictures = live.served
        place = searcher.items.place(item_id)
        if place is None or place.size == 0:
            raise HTTPException(404, f"no item has the id {item_id}, or its picture was erased")
        tag = f'"{searcher.manifest.dataset_digest[:16]}-{item_id}-{size_px or "full"}"'
        # Asked for again after a minute, in which a picture that was taken down is gone from all caches.
        headers = {"ETag": tag, "Cache-Control": "private, max-age=60", "X-Content-Type-Options": "nosniff"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        data = pictures.read(item_id, *place)
        if size_px is not None:
            return Response(images.thumbnail(data, size_px=size_px), media_type="image/jpeg", headers=headers)
        known = images.format_of(data)
        media_type = known.media_type if known else "application/octet-stream"
        return Response(data, media_type=media_type, headers=headers)


def add_state(app: FastAPI, live: Live) -> None:
    """The page, and how the service is."""

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGES / "index.html", headers=_PAGE_HEADERS)

    @app.get("/health", tags=["state"])
    async def health() -> dict[str, str]:
        """The process is up, and has a release open."""
        return {"status": "up"}

    @app.get(
        "/ready",
        tags=["state"],
        responses={503: {"description": "Others should be asked; `error.message` says why."}},
    )
    async def ready() -> dict[str, str]:
        """Searches are taken, and what is served is what is current."""
        if live.trouble is not None:
            raise HTTPException(503, live.trouble)
        return {"status": "ready", "release_id": live.searcher.manifest.release_id}

    @app.get("/release", tags=["state"])
    async def release() -> ReleaseInfo:
        """What is being served."""
        return live.searcher.info()

    @app.get("/metrics", tags=["state"], response_class=Response)
    def metrics() -> Response:
        """Prometheus metrics."""
        return Response(live.metrics.text(), media_type=telemetry.CONTENT_TYPE)


def _of_form(**given: Any) -> Options:
    """The options among the fields of a form; its signature, below, is what FastAPI reads."""
    return Options(**{**given, "filter": _filter_of(given["filter"])})


def _filter_of(text: str | None) -> Any:
    """What JSON text asks for; None for all items."""
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"filter is no JSON ({error}); expected {{...}} as text") from error


def _form_signature() -> inspect.Signature:
    hints = {**get_type_hints(Options), "filter": str | None}  # a form has no objects
    parameters = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=Annotated[hints[option.name], Form(**option.metadata)],
        )
        for option in dataclasses.fields(Options)
    ]
    return inspect.Signature(parameters)


_of_form.__signature__ = _form_signature()  # type: ignore[attr-defined]


def _knows(query: type[SearchOptions], *more: str) -> Any:
    """A dependency that refuses a body with a field that `query` has not, and names the nearest it has.

    True and false are refused for options that are numbers, since Python counts with them.
    """
    known = [option.name for option in dataclasses.fields(query)] + list(more)

    async def check(request: Request) -> None:
        is_form = request.headers.get("content-type", "").startswith("multipart/")
        body = await (request.form() if is_form else request.json())
        for name in body if is_form or isinstance(body, dict) else ():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"perhaps you meant {near[0]}" if near else f"expected {', '.join(sorted(known))}"
                raise ConfigError(f"a search has no field {name!r}: {hint}")
            if name in _NUMBERS and isinstance(body[name], bool):
                raise ConfigError(f"{name} is {json.dumps(body[name])}; expected a number")

    return Depends(check)


def _rows(name: str, rows: list[list[float]]) -> Rows:
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ShapeError(f"{name} have rows of {lengths[0]} to {lengths[-1]} numbers; expected one length")
    with np.errstate(over="ignore"):
        return np.array(rows, np.float32)
