"""Naming a model: in the registry by alias and version, or by the folder of a saved one."""

from pathlib import Path

import pytest

from namr.errors import ConfigError, ObjectMissing
from namr.model import model
from namr.registry import references
from namr.registry.registry import Registry
from namr.store import storage


@pytest.fixture(scope="module")
def tracking_uri(local: Registry, saved: Path) -> str:
    """Of an MLflow that has the model as models:/photos/1, its candidate."""
    local.register(saved, name="photos", run_id=local.create_run("photos", run_name="r"))
    return local.tracking_uri


@pytest.mark.parametrize("reference", ["models:/photos@candidate", "models:/photos/1"])
def test_a_registered_model_comes_below_the_folder(
    reference: str, tracking_uri: str, saved: Path, tmp_path: Path
) -> None:
    fetched = references.fetch(reference, folder=tmp_path, tracking_uri=tracking_uri)
    assert (fetched.path.parent, fetched.name, fetched.version) == (tmp_path, "photos", "1")
    assert model.describe(fetched.path) == model.describe(saved)


def test_a_local_folder_is_used_where_it_lies(saved: Path, tmp_path: Path) -> None:
    fetched = references.fetch(f"{saved}/", folder=tmp_path)
    assert (fetched.path, fetched.name, fetched.version) == (saved, "tiny", "none")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.s3
def test_a_folder_of_a_bucket_comes_below_the_folder(s3: str, saved: Path, tmp_path: Path) -> None:
    for path in saved.iterdir():
        storage.upload(path, f"{s3}/models/tiny/{path.name}")
    fetched = references.fetch(f"{s3}/models/tiny", folder=tmp_path)
    assert fetched.path.parent == tmp_path and fetched.name == "tiny"
    assert model.digest(model.load(fetched.path)) == model.describe(saved).digest


@pytest.mark.parametrize("reference", ["models:/photos", "models:/photos@a@b", "models:/p/latest", "models:"])
def test_what_is_no_reference_is_told_what_is(reference: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"model '{reference}': expected models:/<name>@<alias>"):
        references.fetch(reference, folder=tmp_path)


def test_what_is_not_there_is_named(tracking_uri: str, tmp_path: Path) -> None:
    with pytest.raises(ObjectMissing, match=r"no model version photos 7 .* there is: 1 \(candidate\)"):
        references.fetch("models:/photos/7", folder=tmp_path, tracking_uri=tracking_uri)
    with pytest.raises(ObjectMissing, match=r"no saved model in .*nowhere: model.json is not there"):
        references.fetch(str(tmp_path / "nowhere"), folder=tmp_path)
