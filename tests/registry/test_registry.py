"""Runs and model versions, on SQLite here and against a real server with S3 artifacts."""

import http.server
import os
import socket
import threading
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from namr.data import images
from namr.errors import ConfigError, ModelMismatch, ObjectMissing, StorageError
from namr.model import model
from namr.registry import registry
from namr.registry.registry import Registry
from tests.small_model import picture, save_model


def check_runs(found: Registry, tmp_path: Path) -> None:
    """One job's run: parameters, metrics by step from two processes, artifacts, its end."""
    params = {f"stage.number-{i}": i for i in range(150)} | {"long": "x" * 7000}
    run_id = found.create_run("cars", run_name="first", params=params, tags={"dataset_digest": "abc"})
    found.log_metrics(run_id, {"loss": 2.0, "recall_at_1": 0.5}, step=1)
    replaced_worker = registry.connect(found.tracking_uri)
    replaced_worker.log_metrics(run_id, {"loss": 1.0}, step=2, time_ms=1_000)
    for _ in range(2):  # the second time it is no second entry
        replaced_worker.log_metrics(run_id, {"loss": 0.5}, step=2, time_ms=1_001)
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "report.html").write_text("<p>report</p>")
    found.log_text(run_id, "a = 1\n", "job.toml")
    found.log_folder(run_id, tmp_path / "pages", "report")
    found.end_run(run_id)
    run = found._client.get_run(run_id)
    assert found.history(run_id, "loss") == [(1, 2.0), (2, 0.5)]
    assert sorted(each.value for each in found._client.get_metric_history(run_id, "loss")) == [0.5, 1.0, 2.0]
    assert run.info.run_name == "first" and run.info.status == "FINISHED"
    assert len(run.data.params) == 151 and run.data.params["stage.number-149"] == "149"
    assert run.data.tags["dataset_digest"] == "abc"
    assert {item.path for item in found._client.list_artifacts(run_id)} == {"job.toml", "report"}
    second = found.create_run("cars", run_name="second", parent_run_id=run_id)
    assert found._client.get_run(second).data.tags["mlflow.parentRunId"] == run_id
    assert second != run_id and found._client.get_run(second).info.experiment_id == run.info.experiment_id


def check_versions(found: Registry, name: str, tmp_path: Path) -> None:
    """Register twice, promote, fetch by alias and number, load by namr and by MLflow: the same vectors."""
    run_id = found.create_run("models", run_name="train")
    folders = [save_model(tmp_path / f"model-{seed}", seed=seed) for seed in (1, 2)]
    first, second = (
        found.register(folder, name=name, run_id=run_id, tags={"dataset_digest": "abc"}) for folder in folders
    )
    assert (first.version, second.version) == ("1", "2")
    assert first.digest == model.describe(folders[0]).digest != second.digest
    assert found.version(name, alias="candidate").version == "2"
    assert found.promote(name).aliases == ("candidate", "champion")
    assert found.promote(name, version="1").aliases == ("champion",)
    assert [each.version for each in found.versions(name)] == ["2", "1"]
    path, fetched = found.fetch(name, alias="champion", folder=tmp_path / "fetched")
    assert fetched == found.version(name, version="1") and fetched.run_id == run_id
    loaded = model.load(path)
    assert model.describe(path).extra == {"job": "seed = 1\n"}
    pixels = np.stack([images.prepare(picture(c), loaded.preprocessing) for c in ("red", "navy")])
    expected = model.embed(loaded, pixels, batch_size=32, device="cpu")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # MLflow's first import of pyfunc warns about itself
        import mlflow.pyfunc
        import pandas

        patch.setenv("MLFLOW_TRACKING_URI", found.tracking_uri)
        pictures = pandas.DataFrame({"image": [picture("red"), picture("navy")]})
        answer = mlflow.pyfunc.load_model(f"models:/{name}@champion").predict(pictures)
    np.testing.assert_array_equal(np.array(answer["embedding"].tolist(), np.float32), expected[0])
    np.testing.assert_array_equal(np.array(answer["structure"].tolist(), np.float32), expected[1])


def test_a_run_on_sqlite(local: Registry, tmp_path: Path) -> None:
    check_runs(local, tmp_path)


def test_versions_on_sqlite(local: Registry, tmp_path: Path) -> None:
    check_versions(local, "tiny", tmp_path)


@pytest.mark.mlflow
def test_a_run_on_a_server(mlflow_server, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    check_runs(registry.connect(mlflow_server.tracking_uri), tmp_path)


@pytest.mark.mlflow
def test_versions_on_a_server(mlflow_server, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    check_versions(registry.connect(mlflow_server.tracking_uri), "tiny", tmp_path)


def test_artifacts_of_sqlite_lie_beside_it_and_nothing_is_left_in_the_current_folder(
    local: Registry, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_id = local.create_run("an experiment / with signs", run_name="r")
    local.register(saved, name="beside", run_id=run_id)
    root = Path(local.tracking_uri.removeprefix("sqlite:///")).parent
    assert len(list((root / "mlartifacts" / "an-experiment-with-signs").rglob("model.safetensors"))) == 1
    assert list(tmp_path.iterdir()) == []


def test_no_tracking_uri_is_set_globally(local: Registry) -> None:
    import mlflow

    assert mlflow.get_tracking_uri() != local.tracking_uri
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_two_registrations_count_on_and_the_first_fetch_is_kept(
    local: Registry, saved: Path, tmp_path: Path
) -> None:
    run_id = local.create_run("kept", run_name="r")
    local.register(saved, name="kept", run_id=run_id, alias=None)
    path, _ = local.fetch("kept", version="1", folder=tmp_path)
    written = (path / model.WEIGHTS_FILE).stat().st_mtime_ns
    again, found = local.fetch("kept", version="1", folder=tmp_path)
    assert again == path and (path / model.WEIGHTS_FILE).stat().st_mtime_ns == written
    assert found.aliases == ()
    assert path.name == f"kept-1-{found.digest[:12]}"
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, f".{path.name}.lock"}


def test_a_fetched_model_that_was_exchanged_is_refused(local: Registry, saved: Path, tmp_path: Path) -> None:
    run_id = local.create_run("exchanged", run_name="r")
    local.register(saved, name="exchanged", run_id=run_id)
    path, _ = local.fetch("exchanged", version="1", folder=tmp_path)
    save_model(path, seed=99)
    with pytest.raises(ModelMismatch, match="was registered with"):
        local.fetch("exchanged", version="1", folder=tmp_path)


def test_a_model_that_the_run_registered_before_is_no_second_version(local: Registry, saved: Path) -> None:
    """What a job does again that was killed before it could keep the answer."""
    run_id, other = (local.create_run("again", run_name=name) for name in ("r", "other"))
    first = local.register(saved, name="again", run_id=run_id)
    local._client.delete_registered_model_alias("again", "candidate")  # killed before it was set
    assert local.register(saved, name="again", run_id=run_id) == first
    assert first.aliases == ("candidate",)
    second = local.register(saved, name="again", run_id=other)
    assert (second.version, second.run_id) == ("2", other)
    assert local.register(saved, name="again", run_id=run_id).aliases == ()  # a newer one is the candidate
    assert [each.version for each in local.versions("again")] == ["2", "1"]


def test_a_run_that_goes_on_is_running_and_found_by_its_tag(local: Registry) -> None:
    run_id = local.create_run("going on", run_name="r", tags={"namr.run": "abc"})
    assert local.running("going on", tag="namr.run", value="abc") == [run_id]
    local.end_run(run_id, "FAILED")
    assert local.running("going on", tag="namr.run", value="abc") == []
    local.go_on(run_id)
    assert local.running("going on", tag="namr.run", value="abc") == [run_id]
    assert local.running("going on", tag="namr.run", value="other") == []
    assert local.running("no such experiment", tag="namr.run", value="abc") == []


def test_a_registry_that_was_not_asked_needs_no_server() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        runs = registry.unasked(f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert runs.tracking_uri.startswith("http://127.0.0.1:")


def test_services_that_fetch_one_model_at_once_all_get_it_whole(
    local: Registry, saved: Path, tmp_path: Path
) -> None:
    run_id = local.create_run("at once", run_name="r")
    local.register(saved, name="at-once", run_id=run_id)
    others = [registry.connect(local.tracking_uri) for _ in range(4)]
    with ThreadPoolExecutor(len(others)) as pool:
        paths = list(pool.map(lambda each: each.fetch("at-once", version="1", folder=tmp_path)[0], others))
    (path,) = set(paths)
    assert model.digest(model.load(paths[0])) == model.describe(saved).digest
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, f".{path.name}.lock"}


def test_versions_of_one_name_and_number_in_two_mlflows_are_kept_apart(
    local: Registry, saved: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    model.save(model.build(model.describe(saved).config, seed=99), other)
    elsewhere = registry.connect(f"sqlite:///{tmp_path / 'elsewhere.db'}")
    paths = set()
    for runs, folder in ((local, saved), (elsewhere, other)):
        runs.register(folder, name="twin", run_id=runs.create_run("twin", run_name="r"))
        path, _ = runs.fetch("twin", version="1", folder=tmp_path / "fetched")
        assert model.describe(path).digest == model.describe(folder).digest
        paths.add(path)
    assert len(paths) == 2


def test_what_is_not_there_is_named_with_what_is(local: Registry, saved: Path, tmp_path: Path) -> None:
    run_id = local.create_run("there", run_name="r")
    local.register(saved, name="there", run_id=run_id)
    with pytest.raises(ObjectMissing, match="nowhere"):
        local.versions("nowhere")
    with pytest.raises(ObjectMissing, match=r"no model version there@champion .*there is: 1 \(candidate\)"):
        local.fetch("there", alias="champion", folder=tmp_path)
    with pytest.raises(ObjectMissing, match="no model version there 7 "):
        local.set_alias("there", "champion", "7")
    with pytest.raises(ObjectMissing, match="no-such-run"):
        local.log_metrics("no-such-run", {"loss": 1.0}, step=0)
    with pytest.raises(ConfigError, match="expected one of the two"):
        local.version("there")


def test_a_server_that_is_not_there_is_told_at_once_and_without_the_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At once: before MLflow's client, which would try for half a minute, is asked for anything."""
    monkeypatch.setattr(registry, "unasked", lambda uri: pytest.fail(f"MLflow's client was made for {uri}"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # bound, and nobody listens
        with pytest.raises(StorageError, match=r"no MLflow server answers at http://\*\*\*@127") as caught:
            registry.connect(f"http://user:hunter2@127.0.0.1:{port}")
    assert "hunter2" not in str(caught.value)


def test_a_server_that_refuses_is_told_without_the_password_in_message_or_traceback() -> None:
    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    password = "hunter2"
    with http.server.HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(
            StorageError, match=r"MLflow at http://\*\*\*@127.* could not answer.* 401"
        ) as caught:
            registry.connect(f"http://user:{password}@127.0.0.1:{server.server_port}")
        server.shutdown()
    told = "".join(traceback.format_exception(caught.value))
    assert "user:hunter2" not in told
