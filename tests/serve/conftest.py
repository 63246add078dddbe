"""A service over a release that a real model made."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from namr.search.searcher import Searcher
from namr.serve.app import create_app
from namr.serve.limits import Limits
from namr.store.cache import Cache
from tests import small_release
from tests.running import running

MAX_BYTES = 1 << 20


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a release that a real model made, and the folder of the model."""
    root = tmp_path_factory.mktemp("served")
    return root, small_release.publish_with_model(root)


@pytest.fixture(scope="module")
def searcher(published: tuple[Path, Path]) -> Searcher:
    root, folder = published
    return Searcher.open(
        str(root / "releases"), cache=Cache(root / "cache", 10**9), model_folder=folder, num_threads=1
    )


@pytest.fixture(scope="module")
def http(searcher: Searcher) -> Iterator[httpx.Client]:
    app = create_app(searcher, limits=Limits(max_upload_bytes=MAX_BYTES))
    with running(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client
