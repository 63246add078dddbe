"""A registered model for somebody who knows MLflow and not namr."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from namr.data import images
from namr.errors import ImageRefused, ShapeError
from namr.model import model
from namr.registry import pyfunc, tracking
from namr.registry.registry import Registry
from tests.small_model import picture


@pytest.fixture(scope="module")
def registered(local: Registry, saved: Path) -> Registry:
    """A registry that has the model as models:/pyfunc/1."""
    local.register(saved, name="pyfunc", run_id=local.create_run("pyfunc", run_name="r"))
    return local


def pyfunc_predict(runs: Registry, uri: str, data: list[bytes]):  # type: ignore[no-untyped-def]
    """What MLflow's own loader makes of it."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # MLflow's first import of pyfunc warns about itself
        import mlflow.pyfunc
        import pandas

        patch.setenv("MLFLOW_TRACKING_URI", runs.tracking_uri)
        return mlflow.pyfunc.load_model(uri).predict(pandas.DataFrame({"image": data}))


def test_it_makes_the_vectors_that_the_model_makes(registered: Registry, saved: Path) -> None:
    loaded = model.load(saved)
    shown = [picture(color) for color in ("red", "navy")]
    pixels = np.stack([images.prepare(data, loaded.preprocessing) for data in shown])
    expected = model.embed(loaded, pixels, batch_size=32, device="cpu")
    answer = pyfunc_predict(registered, "models:/pyfunc@candidate", shown)
    assert list(answer.columns) == ["embedding", "structure"]
    for column, vectors in zip(("embedding", "structure"), expected, strict=True):
        np.testing.assert_array_equal(np.array(answer[column].tolist(), np.float32), vectors)


def test_it_names_the_row_that_is_no_image(registered: Registry) -> None:
    with pytest.raises(ImageRefused, match="row 1: not an image"):
        pyfunc_predict(registered, "models:/pyfunc/1", [picture("red"), b"no image"])


def test_it_asks_for_its_column(saved: Path) -> None:
    with pytest.raises(ShapeError, match="input is a list; expected a DataFrame with a column image"):
        pyfunc.Embedder(saved).predict([picture("red")])


def test_a_package_holds_the_two_files_as_they_are_and_nothing_pickled(saved: Path, tmp_path: Path) -> None:
    with tracking.quiet():
        pyfunc.write(saved, tmp_path / "package")
    packed = tmp_path / "package" / pyfunc.DATA_PATH
    for name in (model.WEIGHTS_FILE, model.DESCRIPTION_FILE):
        assert (packed / name).read_bytes() == (saved / name).read_bytes()
    assert not list((tmp_path / "package").rglob("*.pkl"))
