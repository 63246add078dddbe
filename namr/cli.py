"""The `namr` command: thin words over the library.

namr demo                       the whole chain on one machine, then a search page
namr submit train --config ...  a job of jobs/ on a running Ray cluster
namr releases list|show|diff    what was published, and what the gate refused; how two releases differ
namr releases export            a release as one plain FAISS file
namr releases publish           switch to a release that was prepared
namr releases collect           delete what no release needs any more
namr releases pin|unpin         keep the current release current; let the night publish again
namr plan --num-vectors 1e9 ... what an index will take: type, memory, disk, time, cost of a query
namr takedown                   take images out of all answers, now and for every release
namr erase                      erase images for good, with a receipt of what has them still and when it goes
namr promote                    make a model version the champion
namr rollback                   make an earlier release current again, and pin it
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from namr import config
from namr.demo import demo
from namr.demo.demo import DemoConfig
from namr.errors import ConfigError
from namr.nightly import description
from namr.plan import calibration, constants, estimate, wording
from namr.plan.estimate import PlanConfig
from namr.registry import registry
from namr.release import (
    erasing,
    export,
    garbage,
    listing,
    old_embeddings,
    prepared,
    publication,
    releases,
    takedowns,
    users,
)
from namr.release.erasing import EraseConfig
from namr.release.garbage import CollectionConfig
from namr.release.prepared import SwitchConfig
from namr.store.manifests import Pin


@dataclass(frozen=True, kw_only=True)
class ListCommand:
    """List the releases, oldest first: which is current, whether it is pinned, and which are damaged."""

    releases_uri: str
    """the folder or s3:// prefix of the releases"""


@dataclass(frozen=True, kw_only=True)
class ShowCommand:
    """Show what a release is, how it was built, what was measured, and where its page and its tables lie."""

    releases_uri: str
    """the folder or s3:// prefix of the releases"""
    release: str | None = None
    """the release; the current one unless said"""


@dataclass(frozen=True, kw_only=True)
class DiffCommand:
    """Show how a release differs from another: the one before it unless said."""

    releases_uri: str
    """the folder or s3:// prefix of the releases"""
    release: str | None = None
    """the release; the current one unless said"""
    of: str | None = None
    """the release that it is compared with; the one that was current before it unless said"""


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a release as one file that plain FAISS reads."""

    releases_uri: str
    """the folder or s3:// prefix of the releases"""
    out: Path
    """the file to write"""
    release: str | None = None
    """the release; the current one unless said"""


@dataclass(frozen=True, kw_only=True)
class PinCommand:
    """Keep the current release current: nothing is published until `namr releases unpin`."""

    releases_uri: str
    """the folder or s3:// prefix of the releases"""
    reason: str
    """why, for those who find the pin"""


@dataclass(frozen=True, kw_only=True)
class UnpinCommand:
    """Let the next night publish again."""

    releases_uri: str
    """the folder or s3:// prefix of the releases"""


@dataclass(frozen=True, kw_only=True)
class CollectCommand:
    """Delete what no release needs any more: old releases, their objects, work of builds, what kills left.

    The night does the same as its last step. Beside a night it is refused.
    """

    releases_uri: str
    """the folder or s3:// prefix of the releases"""
    keep: int = CollectionConfig.keep
    """releases that were current last, the current one among them; they can be rolled back to"""
    min_age_hours: float = CollectionConfig.min_age_hours
    """nothing younger is deleted; more than the longest night and the longest pause of a service take"""
    embeddings_uri: str | None = None
    """root of the embeddings that the releases are made of, to collect those of unused models too"""
    dry_run: bool = False
    """tell what would be deleted, and delete nothing"""


@dataclass(frozen=True, kw_only=True)
class TakedownCommand:
    """Take images out of the dataset and of every release, rolled-back ones too, by their keys.

    Services stop answering with them within their poll interval.
    """

    releases_uri: str
    """the folder or s3:// prefix of the releases; the dataset is that of the current one"""
    keys: tuple[str, ...]
    """the images' keys"""


@dataclass(frozen=True, kw_only=True)
class PromoteCommand:
    """Give a registered model version the alias that the nightly re-index follows."""

    model_name: str = "namr"
    """the registered model"""
    version: str | None = None
    """the version; the candidate unless said"""
    tracking_uri: str | None = None
    """MLflow: a server or sqlite:///file; MLFLOW_TRACKING_URI, else the local default, unless said"""


@dataclass(frozen=True, kw_only=True)
class RollbackCommand:
    """Make an earlier release current again, and pin it until `namr releases unpin`."""

    releases_uri: str
    """the folder or s3:// prefix of the releases"""
    to: str | None = None
    """the release; the one before the current one unless said"""
    reason: str | None = None
    """why, for those who find the pin; which release was left unless said"""


class _Command(NamedTuple):
    words: tuple[str, ...]
    kind: type[Any]
    act: Callable[[Any], None]


def main() -> None:
    """Entry point of the `namr` command."""
    config.run(lambda: run(sys.argv[1:]))


def run(argv: list[str]) -> None:
    """Run one command; ConfigError for a word that is none."""
    if argv[:1] == ["submit"]:
        _submit(argv[1:])
        return
    for words, kind, act in _COMMANDS:
        if tuple(argv[: len(words)]) == words:
            act(config.load(kind, argv[len(words) :], description=kind.__doc__ or ""))
            return
    if argv[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return
    known = ", ".join(sorted({*(" ".join(command.words) for command in _COMMANDS), "submit"}))
    raise ConfigError(f"{' '.join(argv[:2])!r} is no command of namr; expected one of: {known}")


def _submit(argv: list[str]) -> None:
    """Hand this folder and a job to `ray job submit`; RAY_API_SERVER_ADDRESS says to which cluster."""
    jobs = sorted(path.stem for path in Path("jobs").glob("*.py"))
    if not jobs:
        raise ConfigError(f"there is no folder jobs in {Path.cwd()}; submit from a checkout of namr")
    if not argv or argv[0] not in jobs:
        raise ConfigError(f"namr submit {' '.join(argv[:1])}: expected one of {', '.join(jobs)}")
    ray = shutil.which("ray", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if ray is None:
        raise ConfigError("the program `ray` is not there; run `make install`")
    sys.stdout.flush()
    words = [ray, "job", "submit", "--working-dir", ".", "--", "python", f"jobs/{argv[0]}.py", *argv[1:]]
    os.execv(ray, words)


def _list(command: ListCommand) -> None:
    pointer = releases.read_pointer(command.releases_uri)
    of_all = listing.list_releases(command.releases_uri)
    for manifest in of_all.manifests:
        mark = "*" if pointer and pointer.target == manifest.release_id else " "
        print(
            f"{mark} {manifest.release_id}  {manifest.created}  model {manifest.model_name} "
            f"{manifest.model_version}  dataset version {manifest.dataset_version}  "
            f"{manifest.counts.num_indexed} images  recall@10 {manifest.recall_at_10:.3f}"
        )
    for release_id, error in of_all.damaged.items():
        print(f"! {release_id}  {error}")
    if pointer and pointer.pin:
        print(_pinned(pointer.target, pointer.pin))


def _pinned(release_id: str, pin: Pin) -> str:
    return f"{release_id} is pinned since {pin.since}: {pin.reason} (`namr releases unpin` lifts it)"


def _show(command: ShowCommand) -> None:
    release = releases.open_release(command.releases_uri, command.release)
    told = {"release": release.manifest.release_id} | description.facts(release) | description.places(release)
    width = max(map(len, told))
    for name, value in told.items():
        print(f"{name:<{width}}  {value}")


def _diff(command: DiffCommand) -> None:
    release = releases.open_release(command.releases_uri, command.release)
    before = command.of or release.manifest.previous
    if before is None:
        raise ConfigError(
            f"{release.manifest.release_id} follows no release; name the one to compare it with (--of)"
        )
    print(f"{before} -> {release.manifest.release_id}")
    found = description.differences(releases.open_release(command.releases_uri, before), release)
    for name, (then, here) in found.items():
        print(f"{name}\n  - {then}\n  + {here}")


def _export(command: ExportCommand) -> None:
    release = releases.open_release(command.releases_uri, command.release)
    info = export.export(release, command.out)
    print(f"wrote {command.out}: {release.manifest.release_id}, {info.num_vectors} vectors")


def _plan(command: PlanConfig) -> None:
    if command.calibrate:
        path = command.constants or constants.DEFAULT_PATH
        constants.check_writable(path)
        constants.write(path, calibration.calibrate(command.dim, today=_now().date()))
    known = constants.find(command.constants)
    print(wording.text(command, estimate.estimate(command, known.constants), known))


def _promote(command: PromoteCommand) -> None:
    version = registry.connect(command.tracking_uri).promote(command.model_name, version=command.version)
    print(f"{version.name} {version.version} is the champion")


def _rollback(command: RollbackCommand) -> None:
    release = publication.roll_back(command.releases_uri, command.to, reason=command.reason, now=_now())
    print(
        f"{release.manifest.release_id} is current and pinned: nothing is published until "
        "`namr releases unpin`"
    )


def _pin(command: PinCommand) -> None:
    pinned = publication.pin(command.releases_uri, reason=command.reason, now=_now())
    print(f"{pinned.target} stays current: nothing is published until `namr releases unpin`")


def _publish(command: SwitchConfig) -> None:
    manifest = prepared.switch(command, at=_now()).manifest
    print(
        f"{manifest.release_id} is current: {command.release}, of model {manifest.model_name} "
        f"{manifest.model_version}; make that the champion (`namr promote`), or the next night goes back"
    )


def _unpin(command: UnpinCommand) -> None:
    before = publication.unpin(command.releases_uri)
    was = f"was pinned since {before.pin.since}: {before.pin.reason}" if before.pin else "was not pinned"
    print(f"{before.target} {was}; the next night may publish")


def _collect(command: CollectCommand) -> None:
    config_of = CollectionConfig(keep=command.keep, min_age_hours=command.min_age_hours)
    if releases.read_pointer(command.releases_uri) is None:
        raise ConfigError(f"{command.releases_uri} has no current release, so there is nothing to collect")
    with users.write_alone(command.releases_uri, what="a collection") as held:
        done = garbage.collect(command.releases_uri, config_of, held=held, is_dry_run=command.dry_run)
        if command.embeddings_uri:
            more = old_embeddings.collect(
                command.embeddings_uri,
                command.releases_uri,
                config_of,
                held=held,
                is_dry_run=command.dry_run,
            )
            done = done.with_more(more)
    print(f"keeps {', '.join(done.kept)}")
    print(done.in_words)


def _takedown(command: TakedownCommand) -> None:
    dataset_uri = releases.open_release(command.releases_uri).manifest.dataset_uri
    ids = takedowns.take_out(command.releases_uri, dataset_uri, command.keys, now=_now())
    print(f"{len(ids)} images of {dataset_uri} are taken out, of every release too")


def _erase(command: EraseConfig) -> None:
    for erased in erasing.erase(command):
        print(erased.in_words)


def _now() -> datetime:
    return datetime.now(UTC)


_COMMANDS = (
    _Command(("demo",), DemoConfig, demo.run),
    _Command(("releases", "list"), ListCommand, _list),
    _Command(("releases", "show"), ShowCommand, _show),
    _Command(("releases", "diff"), DiffCommand, _diff),
    _Command(("releases", "export"), ExportCommand, _export),
    _Command(("releases", "publish"), SwitchConfig, _publish),
    _Command(("releases", "collect"), CollectCommand, _collect),
    _Command(("releases", "pin"), PinCommand, _pin),
    _Command(("releases", "unpin"), UnpinCommand, _unpin),
    _Command(("plan",), PlanConfig, _plan),
    _Command(("takedown",), TakedownCommand, _takedown),
    _Command(("erase",), EraseConfig, _erase),
    _Command(("promote",), PromoteCommand, _promote),
    _Command(("rollback",), RollbackCommand, _rollback),
)
