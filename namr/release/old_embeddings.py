"""Collecting the embeddings that no release was made of: models that nobody serves, sets of earlier nights.

    <root>/users/<digest of a releases' URI>.json      a root of releases whose nights embed into this root

Several roots of releases may share one of embeddings, so each night says first that it uses it, and a
collection asks all of them. What stays:

- of a model that a release in any of them was made with: the sets of these releases and the newest of each
  dataset, and the files that these sets list
- a model with a set of a dataset that none of the releases is of: somebody has plans of their own with it
- a model whose folder has anything younger than `min_age_hours`, by the store's clock: it is at work

Sets are deleted before their files, and old sets that list a file which is gone: what was deleted is embedded
again when it is asked for, so nothing here is more than time lost. Not covered: nights of two roots that turn
to the same old model in the moment when it goes; the later one fails, and the next goes on.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from namr.embed.embeddings import SetManifest
from namr.errors import ManifestError
from namr.release import listing, releases
from namr.release.garbage import CollectionConfig, Freed
from namr.store import manifests, storage
from namr.store.lease import Lease
from namr.store.storage import Entry

_USERS = "users"
_MODEL = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class _User:
    FORMAT: ClassVar[str] = "namr-embeddings-user"
    FORMAT_VERSION: ClassVar[int] = 1
    releases_uri: str


class _Used(NamedTuple):
    """What a release was made of."""

    model_digest: str
    dataset_digest: str


def use(embeddings_uri: str, releases_uri: str) -> None:
    """Say that releases of this root are made of these embeddings; said again it changes nothing."""
    root = storage.absolute(releases_uri)
    uri = storage.join(embeddings_uri, _USERS, f"{storage.sha256(root.encode())[:32]}.json")
    manifests.write_manifest(uri, _User(releases_uri=root))


def users_of(embeddings_uri: str) -> list[str]:
    """Roots of releases that said so."""
    root = storage.absolute(embeddings_uri)
    names = storage.list_names(storage.join(root, _USERS))
    return sorted(_roots(root, (f"{_USERS}/{name}" for name in names)))


def collect(
    embeddings_uri: str,
    releases_uri: str,
    config: CollectionConfig,
    *,
    held: Lease,
    is_dry_run: bool = False,
) -> Freed:
    """Delete the embeddings that nobody needs. ManifestError where it can't be known who does.

    releases_uri: one root that needs them, said before or not; the others said so. held: its lease.
    """
    root = storage.absolute(embeddings_uri)
    now, entries = storage.now(root), storage.list_entries(root)
    users = [entry.name for entry in entries if entry.name.startswith(f"{_USERS}/")]
    used = _used({storage.absolute(releases_uri): "it", **_roots(root, users)})
    of_model = defaultdict(list)
    for entry in entries:
        digest, _, _ = entry.name.partition("/")
        if _MODEL.fullmatch(digest):
            of_model[digest].append(entry)
    sets = {
        entry.name: manifests.read_manifest(storage.join(root, entry.name), SetManifest)
        for entry in entries
        if entry.name.split("/")[1:2] == ["sets"] and entry.name.partition("/")[0] in of_model
    }
    known_ids = {each.dataset_id for each in sets.values() if each.dataset_digest in {of[1] for of in used}}
    young = 3600 * config.min_age_hours
    garbage: list[Entry] = []
    for digest, its in of_model.items():
        of_sets = {entry.name: sets[entry.name] for entry in its if entry.name in sets}
        is_at_work = any(now - entry.modified < young for entry in its)
        if not is_at_work and {each.dataset_id for each in of_sets.values()} <= known_ids:
            kept = _kept(digest, its, of_sets, used)
            garbage += [entry for entry in its if entry.name not in kept]
    if not is_dry_run:
        for entry in sorted(garbage, key=lambda each: each.name not in sets):
            held.check()
            storage.delete(storage.join(root, entry.name))
        storage.clear_leftovers(root, before=now - young)
    return Freed("embeddings", len(garbage), sum(entry.size_bytes for entry in garbage))


def _kept(
    digest: str, entries: Iterable[Entry], sets: dict[str, SetManifest], used: frozenset[_Used]
) -> set[str]:
    """Names of the sets of one model that stay, and of the files that they list."""
    if digest not in {each.model_digest for each in used}:
        return set()
    newest: dict[str, int] = defaultdict(int)
    for each in sets.values():
        newest[each.dataset_id] = max(newest[each.dataset_id], each.dataset_version)
    there = {entry.name for entry in entries}
    kept = set()
    for name, each in sets.items():
        files = {file.stored.name for file in each.files}
        is_used = _Used(digest, each.dataset_digest) in used
        if (is_used or each.dataset_version == newest[each.dataset_id]) and files <= there:
            kept |= {name, *files}
    return kept


def _roots(root: str, users: Iterable[str]) -> dict[str, str]:
    """Roots of releases, and where each said that it is one."""
    uris = [storage.join(root, name) for name in users]
    return {manifests.read_manifest(uri, _User).releases_uri: uri for uri in uris}


def _used(roots: dict[str, str]) -> frozenset[_Used]:
    """By the releases of all roots that use these embeddings."""
    used = set()
    for releases_uri, said_at in roots.items():
        of_all = listing.list_releases(releases_uri)
        if releases.read_pointer(releases_uri) is None or of_all.damaged:
            raise ManifestError(
                f"no embeddings are collected while it is not known who needs them: {releases_uri} has no "
                f"current release, or damaged ones; restore it, or delete {said_at} if it is gone for good"
            )
        used |= {_Used(each.model_digest, each.dataset_digest) for each in of_all.manifests}
    return frozenset(used)
