"""Those who are at work on one dataset and its releases, each in a thread of its own.

    images      brings new images, and changes some: their bytes, their label or both
    takers      takes some down
    nights      indexes what is new; every other night makes one segment again when the release is worn
    keeper      looks after the releases: collects, compacts, rolls back for a moment, prepares a release of
                other settings or another model and switches to it

Whoever has a choice does what has the stage in which fewest were killed so far.
"""

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from namr.errors import StorageError
from namr.release import prepared
from tests import small_pictures
from tests.soak import truth
from tests.soak.acts import Broken, Runner
from tests.soak.truth import Account, Form, Places

_FIRST_IMAGES = 40
_FEWEST_LIVE = 20
_WORN_BY = 5
"""a release of which one image in so many is gone is made one segment again"""
_KEEP = 3
_CLASSES = ("ant", "bee", "cat")
_LOOSE = ("recall-at-1-drop", "map-at-r-drop", "rank-drop", "flat-axes", "lost-share")
"""what the gate of a night holds against a release of two or three noisy images"""
_PAUSE_S = 15.0
"""between packings, of which a night has to embed what they bring, and between take-downs"""
_OTHER_MODEL_SHARE = 0.25
_MOST_ASKED = 60
A = TypeVar("A")


class People:
    """Of one round; `begin` is done before anybody is at work, `end` when all have stopped."""

    def __init__(
        self, places: Places, folder: Path, models: tuple[Path, Path], *, runner: Runner, seed: str
    ) -> None:
        """models: what nights index with, and what releases are prepared of."""
        self.places, self.account, self.runner = places, Account(), runner
        self._models, self._seed = models, seed
        self._folder = folder / "source"
        self._folder.mkdir(parents=True)
        self._numbers: dict[str, int] = {}
        self._indexed = 0

    def begin(self) -> None:
        """A first release."""
        self._bring(_FIRST_IMAGES)
        self._pack()
        self._night()

    def at_work(self) -> list[Callable[[], None]]:
        """What each of them does until the runner is stopped."""
        return [self.images, self.takers, self.nights, self.keeper]

    def end(self) -> None:
        """What is left is taken up by those who come next, undisturbed; Broken where they don't get on."""
        self._unpin()
        self._pack()
        self._night()
        live = self._live()
        self._take_down(live[: len(live) // _WORN_BY + 1])
        said = self._night()
        if "; freed " not in said or " in place of " not in said:
            raise Broken(f"the last night, which nobody disturbed, did not collect and compact: {said}")
        self._collect()
        if lacking := self.account.offered.keys() - self.account.packed.keys():
            raise Broken(f"{len(lacking)} images were never packed")
        if found := truth.left_over(self.places):
            raise Broken("; ".join(found))

    def images(self) -> None:
        """Somebody who brings images and changes some."""
        draw, is_over = random.Random(f"{self._seed} images"), False
        while not is_over:
            live = self._live()
            self._bring(draw.randint(1, 20))
            self._change(draw.sample(live, draw.randint(0, 4)), draw)
            self._pack()
            is_over = self.runner.stopped.wait(draw.uniform(0, 2 * _PAUSE_S))

    def takers(self) -> None:
        """Somebody who takes images down."""
        draw = random.Random(f"{self._seed} takers")
        while not self.runner.stopped.wait(draw.uniform(1, 2 * _PAUSE_S)):
            live = self._live()
            if len(live) > _FEWEST_LIVE:
                self._take_down(draw.sample(live, draw.choice((1, 1, 2))))

    def nights(self) -> None:
        """Nights, one after the other; seldom one that has nothing to do."""
        draw = random.Random(f"{self._seed} nights")
        while not self.runner.stopped.wait(draw.uniform(0, 2)):
            if self._asked(truth.version_of) > self._indexed or draw.random() < 0.1:
                self._night(compacts=draw.random() < 0.5)

    def keeper(self) -> None:
        """Somebody who looks after the releases."""
        draw = random.Random(f"{self._seed} keeper")
        acts = {
            "collect": self._collect,
            "compaction": self._compact,
            "rollback": lambda: self._roll_back(draw),
            "prepare": lambda: self._prepare(draw),
            "switch": lambda: self._switch(draw),
        }
        while not self.runner.stopped.wait(draw.uniform(0, 10)):
            name = self.runner.least_killed(acts) if draw.random() < 0.6 else draw.choice(list(acts))
            acts[name]()

    def _live(self) -> list[str]:
        with self.account.lock:
            return sorted(self.account.packed.keys() - self.account.going)

    def _bring(self, num: int) -> None:
        first = len(self._numbers)
        for number in range(first, first + num):
            key = f"{number:04}"
            self._numbers[key] = number
            self._offer(key, label=_CLASSES[number % len(_CLASSES)], size=12)

    def _change(self, keys: list[str], draw: random.Random) -> None:
        for key in keys:
            forms = self.account.offered[key]
            label = draw.choice([each for each in _CLASSES if each != forms[-1].label])
            what = draw.choice(("bytes", "label", "both"))
            self._offer(
                key,
                label=label if what != "bytes" else forms[-1].label,
                size=12 + len(forms) if what != "label" else None,
            )

    def _offer(self, key: str, *, label: str, size: int | None) -> None:
        """size: of another picture; None leaves the one that is there."""
        path = self._folder / f"{key}.png"
        if size:
            _replace(path, small_pictures.picture(self._numbers[key], size=size))
        form = Form(label, path.stat().st_size)
        with self.account.lock:
            forms = self.account.offered.setdefault(key, [])
            if form not in forms:  # a change back could not be told from one that was lost
                forms.append(form)

    def _pack(self) -> None:
        table = self._folder.parent / "source.csv"
        with self.account.lock:
            found = {key: len(forms) - 1 for key, forms in self.account.offered.items()}
            labels = {key: forms[-1].label for key, forms in self.account.offered.items()}
        rows = ["path,label,key", *(f"source/{key}.png,{label},{key}" for key, label in labels.items())]
        _replace(table, "\n".join(rows).encode())
        flags = (f"--source={table}", f"--dataset-uri={self.places.dataset_uri}")
        if self._confirm("pack", "jobs/pack.py", *flags):
            with self.account.lock:
                self.account.packed |= found

    def _take_down(self, keys: list[str]) -> None:
        with self.account.lock:
            self.account.going |= set(keys)
        if self._confirm("takedown", "namr", "takedown", *self._of_releases(), "--keys", *keys):
            with self.account.lock:
                self.account.gone |= set(keys)

    def _night(self, *, compacts: bool = True) -> str:
        """What it said, if it ended well."""
        version = self._asked(truth.version_of)
        words = ("jobs/reindex.py", "--compact" if compacts else "--no-compact", *self._of_a_night())
        said = self._confirm("night", *words, f"--model={self._models[0]}", f"--collection.keep={_KEEP}")
        made = re.search(r"(?:published|current is) release (\S+):", said)
        if made:
            self._indexed = version
            if wrong := self._asked(lambda places: truth.published_since(places, made[1], version)):
                raise Broken(wrong)
        return said

    def _of_a_night(self) -> list[str]:
        return [
            *self._of_releases(),
            f"--dataset-uri={self.places.dataset_uri}",
            f"--embeddings-uri={self.places.embeddings_uri}",
            *("--config=jobs/configs/reindex.toml", "--build.num-parts=2", "--build.index-key=Flat"),
            *("--collection.min-age-hours=0", "--extraction.num-workers=1", "--aging.max-recall-drop=1"),
            *(f"--aging.max-{name}=1000" for name in ("growth", "imbalance-growth", "error-growth")),
            *("--gate.min-recall-at-10=0", "--gate.max-latency-ratio=1000", "--gate.max-shift=1000"),
            *(f"--gate.max-{name}=1" for name in _LOOSE),
        ]

    def _collect(self) -> None:
        self._confirm(
            *("collect", "namr", "releases", "collect", *self._of_releases()),
            *(f"--keep={_KEEP}", "--min-age-hours=0", f"--embeddings-uri={self.places.embeddings_uri}"),
        )

    def _compact(self) -> None:
        flags = (f"--embeddings-uri={self.places.embeddings_uri}", "--max-wait-hours=0.01")
        self._confirm("compaction", "jobs/compact.py", *self._of_releases(), *flags)

    def _prepare(self, draw: random.Random) -> None:
        """Of other settings, or of another model, for which all is embedded anew."""
        is_of_other = draw.random() < _OTHER_MODEL_SHARE
        words = ("jobs/reindex.py", "--prepare", *self._of_a_night(), f"--model={self._models[is_of_other]}")
        self._confirm("prepare", *words, *([] if is_of_other else ["--build.seed=1"]))

    def _switch(self, draw: random.Random) -> None:
        """To what was prepared last; it may be collected meanwhile."""
        known = self._asked(lambda places: prepared.newest_first(places.releases_uri))
        if not known:
            self._prepare(draw)
            return
        words = ("namr", "releases", "publish", *self._of_releases())
        chosen = (f"--release={known[0].manifest.release_id}", "--force=the crasher means it")
        self.runner.confirm("switch", (*words, *chosen), may_be_refused=True)

    def _roll_back(self, draw: random.Random) -> None:
        """To a release by name, so that the same command again means the same; then the pin is lifted."""
        to = draw.choice(self._asked(lambda places: truth.kept(places.releases_uri)))
        words = ("namr", "rollback", *self._of_releases(), f"--to={to}")
        self.runner.confirm("rollback", words, may_be_refused=True)  # it may be collected meanwhile
        self._unpin()

    def _unpin(self) -> None:
        self._confirm("unpin", "namr", "releases", "unpin", *self._of_releases())

    def _of_releases(self) -> tuple[str, str]:
        return "--releases-uri", self.places.releases_uri

    def _asked(self, question: Callable[[Places], A]) -> A:
        """What the store says, which may be away for a while."""
        for _ in range(_MOST_ASKED):
            try:
                return question(self.places)
            except StorageError:
                time.sleep(1)
        return question(self.places)

    def _confirm(self, name: str, *words: str) -> str:
        """What a command said that ended well; empty where it was given up, or all ends."""
        ended = self.runner.confirm(name, words)
        return ended.output if ended.code == 0 else ""


def _replace(path: Path, data: bytes) -> None:
    """So that whoever reads it has all of one or the other."""
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.replace(path)
