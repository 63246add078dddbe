"""The Python client of the search service; of namr it needs the words of an answer and the errors.

    with Client("http://search:8000") as client:
        for hit in client.search_image(Path("shoe.jpg").read_bytes(), SearchOptions(k=5)).hits:
            print(hit.key, hit.distance)

What the service refuses is raised as the error that it names (ImageRefused, ShapeError, ConfigError, ...);
Busy says after how many seconds to ask again. A connection that can't be made is tried again; a request that
was sent is not.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from namr import errors
from namr.errors import Busy, ConfigError, ImageRefused, NamrError, ObjectMissing, ShapeError, StorageError
from namr.search.answers import (
    Answer,
    FieldInfo,
    FieldList,
    FieldValue,
    Hit,
    Item,
    ReleaseInfo,
    SearchOptions,
    Timings,
)

T = TypeVar("T")

_DEFAULTS = SearchOptions()


class Client:
    """Queries one service; keeps connections open, so use it for many queries, from any thread."""

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = 30.0,
        num_connect_retries: int = 3,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url is {base_url!r}; expected http://host:port or https://...")
        self.base_url = base_url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.base_url,
            timeout=timeout_s,
            transport=httpx.HTTPTransport(retries=num_connect_retries),
            headers=headers,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def search_image(self, image: bytes, options: SearchOptions = _DEFAULTS) -> Answer:
        """The items that look most like an encoded picture."""
        files, given = {"image": ("image", image)}, _given(asdict(options))
        if options.filter is not None:
            given["filter"] = json.dumps(options.filter)
        return _answer(self._post("/search/image", files=files, data=given))

    def search_key(self, key: str, options: SearchOptions = _DEFAULTS) -> Answer:
        """The items that look most like one of the gallery, itself left out; ObjectMissing if unknown."""
        return _answer(self._post("/search/key", json={"key": key, **_given(asdict(options))}))

    def search_vectors(
        self,
        embeddings: Sequence[Sequence[float]],
        structures: Sequence[Sequence[float]] | None = None,
        *,
        options: SearchOptions = _DEFAULTS,
    ) -> list[Answer]:
        """The items nearest to each embedding (rows of numpy arrays do too); up to 256 at once."""
        body = _given(asdict(options))
        body["embeddings"] = _rows("embeddings", embeddings)
        if structures is not None:
            body["structures"] = _rows("structures", structures)
        return [_answer(one) for one in self._post("/search/vector", json=body)["answers"]]

    def item(self, item_id: int) -> Item:
        """Key, label and fields of an item; ObjectMissing if there is none."""
        return _made(Item, self._get(f"/items/{item_id}").json())

    def items(self, num: int = 24, *, seed: int = 0, filter: Mapping[str, Any] | None = None) -> list[Item]:
        """Items drawn at random, of those that the filter lets through; another seed draws others."""
        given = {"num": num, "seed": seed, "filter": None if filter is None else json.dumps(filter)}
        return [_made(Item, each) for each in self._get("/items", params=_given(given)).json()["items"]]

    def fields(self) -> FieldList:
        """The label and the fields that a filter can name, with values that they take."""
        body = self._get("/fields").json()
        listed = [
            _made(FieldInfo, {**each, "values": tuple(_made(FieldValue, value) for value in each["values"])})
            for each in body["fields"]
        ]
        return _made(FieldList, {**body, "fields": tuple(listed)})

    def image(self, item_id: int, *, size_px: int | None = None) -> bytes:
        """The picture of an item as it is stored, or as a JPEG of at most size_px."""
        return self._get(f"/items/{item_id}/image", params=_given({"size_px": size_px})).content

    def release(self) -> ReleaseInfo:
        """What the service serves."""
        return _made(ReleaseInfo, self._get("/release").json())

    def is_ready(self) -> bool:
        """Whether the service takes searches and is up to date; False too where nothing answers at all."""
        try:
            self._get("/ready")
        except NamrError:
            return False
        return True

    def _get(self, path: str, **request: Any) -> httpx.Response:
        return self._ask("GET", path, **request)

    def _post(self, path: str, **request: Any) -> Any:
        return self._ask("POST", path, **request).json()

    def _ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            reply = self._http.request(method, path, **request)
        except httpx.TimeoutException as error:
            raise StorageError(
                f"{self.base_url}{path} did not answer in time ({type(error).__name__}); raise timeout_s"
            ) from error
        except httpx.TransportError as error:
            raise StorageError(
                f"{self.base_url} can't be reached ({error}); is the service running there?"
            ) from error
        if reply.is_success:
            return reply
        raise _refusal(reply)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _rows(name: str, vectors: Sequence[Sequence[float]]) -> list[list[float]]:
    rows = [[float(value) for value in row] for row in vectors]
    for number, row in enumerate(rows):
        if not all(math.isfinite(value) for value in row):  # JSON has no word for them
            raise ShapeError(f"{name}: row {number} holds NaN or infinity")
    return rows


def _answer(body: dict[str, Any]) -> Answer:
    hits = tuple(_made(Hit, hit) for hit in body["hits"])
    return _made(Answer, {**body, "hits": hits, "timings": _made(Timings, body["timings"])})


def _made(kind: type[T], body: Mapping[str, Any]) -> T:
    """What a newer service says beyond what this client knows is left out."""
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in body.items() if name in known})


def _refusal(reply: httpx.Response) -> NamrError:
    """The error that the service names; a plain NamrError for what only HTTP has a name for."""
    try:
        said = reply.json()["error"]
        kind, message = str(said["type"]), str(said["message"])
    except (ValueError, KeyError, TypeError):
        return NamrError(f"{reply.request.url} answered {reply.status_code}, and not as a namr service does")
    if reply.status_code == 404:
        return ObjectMissing(message)
    if reply.status_code == 429:
        wait = reply.headers.get("retry-after", "")
        wait_s = float(wait) if wait.isdigit() else 1.0
        return Busy(f"{message}; ask again in {wait_s:g} s", wait_s)
    if kind == "InvalidRequest":
        return ConfigError(message)
    if kind == "ImageRefused":
        return ImageRefused(message.removeprefix("image refused: "))
    named = getattr(errors, kind, None)
    if isinstance(named, type) and issubclass(named, NamrError):
        return named(message)
    return NamrError(f"{message} (status {reply.status_code})")
