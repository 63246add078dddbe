"""What a search may be asked is described, and what it may not is refused; test_app.py asks all the rest."""

import dataclasses

import httpx
import pytest

from namr.search.answers import SearchOptions
from tests import small_release
from tests.serve.test_app import error_of, upload


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/search/key", {"key": "digit/1", "deph": 5}, "no field 'deph': perhaps you meant depth"),
        (
            "/search/key",
            {"key": "digit/1", "structures": []},
            "no field 'structures': expected depth, exact, filter, k",
        ),
        ("/search/vector", {"embedings": [[1.0]]}, "no field 'embedings': perhaps you meant embeddings"),
        (
            "/search/vector",
            {"embeddings": [[1.0]], "Side": "none"},
            "no field 'Side': perhaps you meant side",
        ),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest(
    http: httpx.Client, path: str, body: dict[str, object], message: str
) -> None:
    status, kind, said = error_of(http.post(path, json=body))
    assert (status, kind) == (422, "ConfigError")
    assert message in said


def test_an_unknown_field_of_a_form_is_refused_with_the_nearest(http: httpx.Client) -> None:
    status, kind, said = error_of(upload(http, small_release.digit(0), n_probe="5"))
    assert (status, kind) == (422, "ConfigError")
    assert "no field 'n_probe': perhaps you meant nprobe" in said
    assert error_of(upload(http, small_release.digit(0), nprobe="0"))[1] == "ConfigError"
    assert "k: " in error_of(upload(http, small_release.digit(0), k="1001"))[2]


def test_every_option_of_a_search_is_described_for_every_way_of_searching(http: httpx.Client) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    (form,) = [name for name in schemas if name.startswith("Body_search_by_image")]
    for name in ("KeyQuery", "VectorQuery", form):
        described = schemas[name]["properties"]
        for option in dataclasses.fields(SearchOptions):
            assert described[option.name]["description"] == option.metadata["description"]
        assert described["k"]["maximum"] == 1000
        assert "additionalProperties" not in schemas[name]
