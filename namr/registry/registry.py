"""Runs and model versions, kept by MLflow on SQLite (local folder) or behind a server.

One run stands for a whole job: the driver makes it and hands its id to whoever logs, so that a worker that
is replaced goes on in the same run. A model version is the folder that `model.save` wrote, as an MLflow
model: `mlflow.pyfunc.load_model` turns image bytes into both embeddings, and `fetch` brings the folder back
for `model.load`. No tracking URI is set globally.

Not covered: deleting runs and versions (MLflow's own commands do), MLflow's file store; two jobs that
register for one run at once (the training job's lease sees to it).
"""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from namr import secrets
from namr.errors import ConfigError, ModelMismatch, ObjectMissing, StorageError
from namr.model import model
from namr.registry import fetched, pyfunc, tracking
from namr.store import scratch

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE = "candidate"
CHAMPION = "champion"
DIGEST_TAG = "model_digest"

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

_PARAM_LENGTH = 6000
_PARENT_TAG = "mlflow.parentRunId"


@dataclass(frozen=True)
class ModelVersion:
    """A registered model; `digest` names its embedding space."""

    name: str
    version: str
    run_id: str
    digest: str
    aliases: tuple[str, ...] = ()


def connect(uri: str | None) -> "Registry":
    """A registry that has answered; StorageError within seconds if it doesn't. Makes a SQLite file anew."""
    resolved = tracking.resolve(uri)
    tracking.check_reachable(resolved)
    opened = unasked(resolved)
    with _explained(resolved, "answer"), tracking.quiet():
        opened._client.search_experiments(max_results=1)
    return opened


def unasked(uri: str | None) -> "Registry":
    """A registry that nothing was asked of yet: its server may be away until it is needed."""
    tracking.set_environment()  # before MLflow is imported: telemetry begins there
    resolved = tracking.resolve(uri)
    with _explained(resolved, "be opened"), tracking.quiet():
        from mlflow import MlflowClient

        if resolved.startswith("sqlite:///"):
            Path(resolved.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        return Registry(resolved, MlflowClient(tracking_uri=resolved, registry_uri=resolved))


class Registry:
    """One MLflow, made by `connect`; hand `tracking_uri` on to other processes, not the object."""

    def __init__(self, uri: str, client: "MlflowClient") -> None:
        self.tracking_uri = uri
        self._client = client

    def create_run(
        self,
        experiment: str,
        *,
        run_name: str,
        params: Mapping[str, str | int | float | bool] | None = None,
        tags: Mapping[str, str] | None = None,
        parent_run_id: str | None = None,
    ) -> str:
        """Start a run, below another if said, and give its id; the experiment is made if it is not there."""
        with self._doing(f"create a run in experiment {experiment!r}"):
            experiment_id = self._experiment_id(experiment)
            below = {_PARENT_TAG: parent_run_id} if parent_run_id else {}
            run = self._client.create_run(experiment_id, tags={**(tags or {}), **below}, run_name=run_name)
            run_id = str(run.info.run_id)
        self.log_params(run_id, params or {})
        return run_id

    def log_params(self, run_id: str, params: Mapping[str, str | int | float | bool]) -> None:
        """Parameters, written once each; a value that MLflow can't hold whole is cut."""
        from mlflow.entities import Param

        entries = [Param(name, str(value)[:_PARAM_LENGTH]) for name, value in params.items()]
        with self._doing(f"log parameters of run {run_id}"):
            for start in range(0, len(entries), 100):
                self._client.log_batch(run_id, params=entries[start : start + 100])

    def running(self, experiment: str, *, tag: str, value: str) -> list[str]:
        """The ids of the experiment's runs with that tag (a value without quotes) that have not ended."""
        with self._doing(f"find runs in experiment {experiment!r}"):
            known = self._client.get_experiment_by_name(experiment)
            if known is None:
                return []
            query = f"tags.`{tag}` = '{value}' and attributes.status = 'RUNNING'"
            return [str(run.info.run_id) for run in self._client.search_runs([known.experiment_id], query)]

    def go_on(self, run_id: str) -> None:
        """Say that a run, however it had ended, is running."""
        with self._doing(f"go on with run {run_id}"):
            self._client.update_run(run_id, status="RUNNING")

    def log_metrics(
        self, run_id: str, metrics: Mapping[str, float], *, step: int, time_ms: int | None = None
    ) -> None:
        """Numbers of one step, in one request; the same again, of the same time, is no second entry.

        time_ms: since 1970; None is now.
        """
        from mlflow.entities import Metric

        at = time.time_ns() // 1_000_000 if time_ms is None else time_ms
        entries = [Metric(name, float(value), at, step) for name, value in metrics.items()]
        with self._doing(f"log metrics of run {run_id}"):
            self._client.log_batch(run_id, metrics=entries)

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of one metric, by step; of a step that was logged twice the later value."""
        with self._doing(f"read {metric!r} of run {run_id}"):
            entries = self._client.get_metric_history(run_id, metric)
        by_step = {entry.step: entry.value for entry in sorted(entries, key=lambda entry: entry.timestamp)}
        return sorted(by_step.items())

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """An artifact of text: TOML, JSON, HTML, SVG (which MLflow shows as a picture)."""
        with self._doing(f"log {name!r} to run {run_id}"):
            self._client.log_text(run_id, text, name)

    def log_folder(self, run_id: str, folder: Path, name: str) -> None:
        """All files of a folder as artifacts below `name`."""
        with self._doing(f"log {folder} to run {run_id}"):
            self._client.log_artifacts(run_id, str(folder), name)

    def end_run(self, run_id: str, status: RunStatus = "FINISHED") -> None:
        """Say how the run ended."""
        with self._doing(f"end run {run_id}"):
            self._client.set_terminated(run_id, status)

    def register(
        self,
        folder: Path,
        *,
        name: str,
        run_id: str,
        alias: str | None = CANDIDATE,
        tags: Mapping[str, str] | None = None,
    ) -> ModelVersion:
        """Store what `model.save` wrote with the run, as the next version of `name`; `alias` points to it.

        The version that this run made of this model before, where it did: then `alias` moves to it only if no
        other version came after it.
        """
        digest = model.describe(folder).digest
        known = self._versions_if_any(name)
        for version in known:
            if (version.run_id, version.digest) == (run_id, digest):
                if alias and version is known[0]:
                    self.set_alias(name, alias, version.version)
                return self.version(name, version=version.version)
        place = f"model-{digest[:16]}"  # a run may register several models
        with scratch.folder("register-") as temporary:
            package = Path(temporary) / "model"
            with tracking.quiet():
                pyfunc.write(folder, package)
            self.log_folder(run_id, package, place)
        with self._doing(f"register model {name!r}"):
            self._ensure_model(name)
            source = f"{self._client.get_run(run_id).info.artifact_uri}/{place}"
            made = self._client.create_model_version(
                name, source, run_id, tags={**(tags or {}), DIGEST_TAG: digest}
            )
            if alias:
                self._client.set_registered_model_alias(name, alias, str(made.version))
        return self.version(name, version=str(made.version))

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Point an alias to a version, away from where it pointed."""
        self.version(name, version=version)
        with self._doing(f"give {name} {version} the alias {alias!r}"):
            self._client.set_registered_model_alias(name, alias, version)

    def promote(self, name: str, *, version: str | None = None) -> ModelVersion:
        """Make a version (None: the candidate) the champion."""
        chosen = self.version(name, version=version, alias=None if version else CANDIDATE)
        self.set_alias(name, CHAMPION, chosen.version)
        return self.version(name, version=chosen.version)

    def version(self, name: str, *, version: str | None = None, alias: str | None = None) -> ModelVersion:
        """One version, by its number or by an alias; ObjectMissing with what there is instead."""
        if (version is None) == (alias is None):
            raise ConfigError(f"version {version!r} and alias {alias!r} of {name!r}; expected one of the two")
        known = self.versions(name)
        for each in known:
            if version == each.version or (alias is not None and alias in each.aliases):
                return each
        wanted = f"{name}@{alias}" if alias else f"{name} {version}"
        there = "; ".join(f"{each.version} ({', '.join(each.aliases) or 'no alias'})" for each in known)
        raise ObjectMissing(f"no model version {wanted} at {self._shown}; there is: {there or 'nothing'}")

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of a model, newest first; ObjectMissing if there is no such model."""
        with self._doing(f"find model {name!r}"):
            aliases = self._client.get_registered_model(name).aliases
            entries = list(_pages(self._client, f"name='{_quoted(name)}'"))
        versions = [
            ModelVersion(
                name=name,
                version=str(each.version),
                run_id=str(each.run_id),
                digest=str(each.tags.get(DIGEST_TAG, "")),
                aliases=tuple(sorted(a for a, v in aliases.items() if str(v) == str(each.version))),
            )
            for each in entries
        ]
        return sorted(versions, key=lambda each: int(each.version), reverse=True)

    def fetch(
        self, name: str, *, version: str | None = None, alias: str | None = None, folder: Path
    ) -> tuple[Path, ModelVersion]:
        """Bring a version to `folder/<name>-<version>-<digest>`, for `model.load`; what is there is kept.

        Several processes may fetch into one folder. ModelMismatch for another model than was registered.
        """
        wanted = self.version(name, version=version, alias=alias)
        # Two MLflows may each have a version 1 of this name: the digest tells them apart.
        target = folder / "-".join(filter(None, (name, wanted.version, wanted.digest[:12])))
        names = (model.WEIGHTS_FILE, model.DESCRIPTION_FILE)
        fetched.folder(target, lambda partial: self._download(wanted, partial), names=names)
        digest = model.describe(target).digest
        if wanted.digest and digest != wanted.digest:
            raise ModelMismatch(
                f"{target} holds a model with digest {digest}, and {name} {wanted.version} was registered "
                f"with {wanted.digest}; delete that folder and fetch again"
            )
        return target, wanted

    def _download(self, wanted: ModelVersion, folder: Path) -> Path:
        with self._doing(f"fetch {wanted.name} {wanted.version}"):
            from mlflow import artifacts

            uri = self._client.get_model_version_download_uri(wanted.name, wanted.version)
            return Path(
                artifacts.download_artifacts(
                    artifact_uri=f"{uri}/{pyfunc.DATA_PATH}",
                    dst_path=str(folder),
                    tracking_uri=self.tracking_uri,
                )
            )

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        known = self._client.get_experiment_by_name(name)
        if known is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=self._artifacts(name)))
            except MlflowException:  # another job may have made it in between
                known = self._client.get_experiment_by_name(name)
                if known is None:
                    raise
        return str(known.experiment_id)

    def _artifacts(self, experiment: str) -> str | None:
        """Where artifacts of an experiment go: beside a SQLite file, else where the server puts them."""
        if not self.tracking_uri.startswith("sqlite:///"):
            return None
        root = Path(self.tracking_uri.removeprefix("sqlite:///")).parent / "mlartifacts"
        return (root / re.sub(r"[^\w.-]+", "-", experiment)).as_uri()

    def _versions_if_any(self, name: str) -> list[ModelVersion]:
        try:
            return self.versions(name)
        except ObjectMissing:
            return []

    def _ensure_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    @property
    def _shown(self) -> str:
        return secrets.without_secrets(self.tracking_uri)

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        with _explained(self.tracking_uri, what):
            yield


def _pages(client: "MlflowClient", query: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_model_versions(query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _quoted(name: str) -> str:
    if "'" in name:
        raise ConfigError(f"model name {name!r} has a quote in it; expected letters, digits, - and _")
    return name


@contextmanager
def _explained(uri: str, what: str) -> Iterator[None]:
    """Turn what MLflow raises into a StorageError, or ObjectMissing, that names no secrets."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        missing = error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
        kind = ObjectMissing if missing else StorageError
        raise kind(_told(uri, what, error)) from secrets.cause_of(error)
    except OSError as error:
        raise StorageError(_told(uri, what, error)) from secrets.cause_of(error)


def _told(uri: str, what: str, error: Exception) -> str:
    reason = (secrets.without_secrets(str(error)).splitlines() or [type(error).__name__])[0]
    return f"MLflow at {secrets.without_secrets(uri)} could not {what}: {reason}"
