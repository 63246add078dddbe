"""Exactly once under fire: people, a night and a reader at work at once, while what they run on is killed.

    python -m tests.soak.crasher --seed 0 --kills 100

Images are packed, taken down, indexed night by night (a night adds, makes one segment again when the release
is worn, and collects), releases are collected, rolled back to and unpinned, and a service answers slowly, all
through a proxy that lets one request in ten fail. Every 5 s, with a chance of 0.3, kill -9 hits a command,
one of Ray's workers, the raylet of the node that works, the S3 server or the service; half of all commands
have an appointment besides, to die, or to get no more memory or disk, at some call of the stage that has seen
the fewest. Every command is repeated until it is confirmed, and after each kill `truth` looks whether
everything holds. The draws come from the seed; what is under way when a kill lands is the machine's doing.

At the first thing that doesn't hold it ends, says the seed and what was done last, and keeps the folder.
Not covered: a network that splits, and disks that lose what they had confirmed.
"""

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from namr.store.cache import Cache
from tests import small_model, small_pictures
from tests.soak import stack, truth, witness
from tests.soak.acts import Broken, Runner, Told
from tests.soak.reader import Reader
from tests.soak.stack import BUCKET, Stack
from tests.soak.truth import Account, Places

_CHANCE = 0.3
_FAILING_SHARE = 0.1
_APPOINTED_SHARE = 0.5
_FIRST_IMAGES = 40
_KEEP = 3
_CLASSES = ("ant", "bee", "cat")
_VICTIMS = {"driver": 4, "worker": 3, "raylet": 1, "store": 2, "reader": 1}
"""what the clock kills, and how often"""


@dataclass(frozen=True, kw_only=True)
class CrasherConfig:
    """How much fire."""

    seed: int = 0
    kills: int = 100
    """kill -9, of whatever, after which it ends"""
    minutes: float = 600
    """after which it ends all the same"""
    every_s: float = 5.0
    """how often the clock draws whether to kill"""
    victims: tuple[str, ...] = tuple(_VICTIMS)
    """what the clock kills; without "raylet" Ray is one node, without "reader" nobody reads"""


class Crasher:
    """One run: people in threads, the clock that kills in this one."""

    def __init__(self, config: CrasherConfig, folder: Path, running: Stack) -> None:
        self._config, self._stack, self._folder = config, running, folder
        uris = (f"s3://{BUCKET}/{name}" for name in ("dataset", "embeddings", "releases"))
        self.places, self.account = Places(*uris), Account()
        self.told = Told(folder / "history.log")
        self._cache = Cache(folder / "checker", max_bytes=1 << 30)
        self._model = small_model.save_model(folder / "model", seed=0)
        self._source = folder / "source"
        self._draw = random.Random(f"{config.seed} clock")
        self._runner = self._new_runner(0)
        self._reader = Reader(
            self.places.releases_uri,
            self._model,
            folder / "reader",
            environment=self._environment,
            account=self.account,
            told=self.told,
            seed=config.seed,
        )
        self._failures: list[BaseException] = []
        self.num_looks = 0
        self.most_segments = 0

    def run(self) -> None:
        """Until so many were killed; Broken as soon as something does not hold."""
        self._pack(_FIRST_IMAGES)
        self._night()
        self._stack.proxy.fail(_FAILING_SHARE)
        self._runner = self._new_runner(_APPOINTED_SHARE)
        people = [self._images, self._nights, self._keeper]
        if "reader" in self._config.victims:
            people.append(self._reader.run)
        threads = [threading.Thread(target=self._caught, args=(work,), name=work.__name__) for work in people]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 60 * self._config.minutes
        seen = 0
        try:
            while self.told.num_kills.total() < self._config.kills and time.monotonic() < until:
                if self._runner.stopped.wait(self._config.every_s):
                    break
                if self._draw.random() < _CHANCE:
                    self._kill()
                if self.told.num_kills.total() > seen:
                    seen = self.told.num_kills.total()
                    self._look()
        finally:
            self._runner.stopped.set()
            self._reader.stopped.set()
            for thread in threads:
                thread.join()
        if self._failures:
            raise self._failures[0]
        self._end()

    def _end(self) -> None:
        """What is left is taken up by those who come next, undisturbed, and nothing is left over."""
        self._stack.proxy.fail(0)
        self._runner = self._new_runner(0)
        self._unpin()
        self._pack(1)
        said = self._night()
        if "; freed " not in said:
            raise Broken(f"the last night, which nobody disturbed, did not collect: {said}")
        self._look()
        if lacking := self.account.offered - self.account.packed:
            raise Broken(f"{len(lacking)} images were never packed")
        if found := truth.left_over(self.places):
            raise Broken("; ".join(found))

    def _new_runner(self, share: float) -> Runner:
        return Runner(self._environment, self.told, seed=self._config.seed, share=share)

    def _environment(self) -> dict[str, str]:
        return {**self._stack.environment, "RAY_ADDRESS": self._stack.ray.address}

    def _caught(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._failures.append(error)
            self._runner.stopped.set()
            self._reader.stopped.set()

    def _kill(self) -> None:
        """One thing, drawn from what there is."""
        victims = self._config.victims
        what = self._draw.choices(victims, [_VICTIMS[each] for each in victims])[0]
        under_way = [(each.name, each.stage) for each in self._runner.under_way]
        if what == "driver":
            if not (drivers := list(self._runner.under_way)):
                return
            driver = self._draw.choice(drivers)
            under_way = [(driver.name, driver.stage)]
            driver.process.kill()
        elif what == "worker":
            if not (workers := self._stack.workers()):
                return
            pid, title = self._draw.choice(workers)
            self.told.says(f"worker {title}")
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                return
        elif what == "raylet":
            self._stack.kill_raylet()
        elif what == "store":
            self._stack.kill_store()
            time.sleep(self._draw.uniform(0, 3))
            self._stack.start_store()
        elif self._reader.process:
            self._reader.process.kill()
            under_way = [("serve", "serving")]
        else:
            return
        self.told.killed(what, under_way)

    def _look(self) -> None:
        self.num_looks += 1
        self.most_segments = max(self.most_segments, truth.num_segments(self.places))
        if found := truth.broken(self.account, self.places, self._cache):
            raise Broken("; ".join(found))

    def _images(self) -> None:
        """Somebody who brings images and takes some down."""
        draw = random.Random(f"{self._config.seed} images")
        while not self._runner.stopped.wait(draw.uniform(0, 5)):
            live = sorted(self.account.packed - self.account.going)
            if draw.random() < 0.3 and len(live) > _FIRST_IMAGES // 2:
                self._take_down(draw.sample(live, draw.randint(1, 2)))
            else:
                self._pack(draw.randint(1, 5))

    def _nights(self) -> None:
        """Nights, one after the other."""
        draw = random.Random(f"{self._config.seed} nights")
        while not self._runner.stopped.wait(draw.uniform(1, 10)):
            self._night()

    def _keeper(self) -> None:
        """Somebody who looks after the releases: collects, rolls back for a moment."""
        draw = random.Random(f"{self._config.seed} keeper")
        while not self._runner.stopped.wait(draw.uniform(5, 30)):
            if draw.random() < 0.5:
                self._collect()
            else:
                self._roll_back(draw)

    @property
    def num_answers(self) -> int:
        return self._reader.num_answers

    def _pack(self, num: int) -> None:
        with self.account.lock:
            first = len(self.account.offered)
            keys = {n: f"{_CLASSES[n % len(_CLASSES)]}/{n:04}" for n in range(first, first + num)}
            for number, key in keys.items():
                path = self._source / f"{key}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(small_pictures.picture(number))
            self.account.offered |= set(keys.values())
            found = set(self.account.offered)
        if self._confirm(
            *("pack", "jobs/pack.py", f"--source={self._source}"), f"--dataset-uri={self.places.dataset_uri}"
        ):
            with self.account.lock:
                self.account.packed |= found

    def _take_down(self, keys: list[str]) -> None:
        with self.account.lock:
            self.account.going |= set(keys)
        if self._confirm("takedown", "namr", "takedown", *self._of_releases(), "--keys", *keys):
            with self.account.lock:
                self.account.gone |= set(keys)

    def _night(self) -> str:
        """What it said, if it ended well."""
        version = truth.version_of(self.places)
        said = self._confirm(
            *("night", "jobs/reindex.py", "--config=jobs/configs/reindex.toml", *self._of_releases()),
            *(f"--dataset-uri={self.places.dataset_uri}", f"--embeddings-uri={self.places.embeddings_uri}"),
            *(f"--model={self._model}", "--build.num-parts=2", "--build.index-key=Flat"),
            *("--gate.min-recall-at-10=0", "--gate.max-recall-at-1-drop=1", "--gate.max-rank-drop=1"),
            *(f"--collection.keep={_KEEP}", "--collection.min-age-hours=0", "--extraction.num-workers=1"),
        )
        made = re.search(r"(?:published|current is) release (\S+):", said)
        if made and (wrong := truth.published_since(self.places, made[1], version)):
            raise Broken(wrong)
        return said

    def _collect(self) -> None:
        self._confirm(
            *("collect", "namr", "releases", "collect", *self._of_releases()),
            *(f"--keep={_KEEP}", "--min-age-hours=0", f"--embeddings-uri={self.places.embeddings_uri}"),
        )

    def _roll_back(self, draw: random.Random) -> None:
        """To a release by name, so that the same command again means the same; then the pin is lifted."""
        to = draw.choice(truth.kept(self.places.releases_uri))
        words = ("namr", "rollback", *self._of_releases(), f"--to={to}")
        self._runner.confirm("rollback", words, may_be_refused=True)  # it may be collected meanwhile
        self._unpin()

    def _unpin(self) -> None:
        self._confirm("unpin", "namr", "releases", "unpin", *self._of_releases())

    def _of_releases(self) -> tuple[str, str]:
        return "--releases-uri", self.places.releases_uri

    def _confirm(self, name: str, *words: str) -> str:
        """What a command said that ended well; empty where it was given up, or all ends."""
        ended = self._runner.confirm(name, words)
        return ended.output if ended.code == 0 else ""


def table(told: Told) -> str:
    """What was killed in which stage, as Markdown."""
    columns = ("driver", "worker", "raylet", "store", "reader", "memory", "disk")
    lines = [f"| command | stage | {' | '.join(columns)} |", "| --- | --- |" + " --- |" * len(columns)]
    for name, stage in sorted({of[:2] for of in told.kills}, key=_order):
        numbers = (told.kills[name, stage, what] for what in columns)
        lines.append(f"| {name} | {stage} | {' | '.join(str(each or '') for each in numbers)} |")
    return "\n".join(lines)


def _order(of: tuple[str, str]) -> tuple[str, int]:
    stages = [witness.START, *(stage for each in witness.STAGES.values() for stage in each)]
    return of[0], stages.index(of[1]) if of[1] in stages else len(stages)


def summary(crasher: Crasher, config: CrasherConfig, minutes: float) -> str:
    """All of it, in words and a table."""
    told = crasher.told
    ends = [f"{name} {kind} {num}" for (name, kind), num in sorted(told.ends.items())]
    of_each = ", ".join(f"{what} {num}" for what, num in told.num_kills.most_common())
    of_images = f"{len(crasher.account.packed)} images packed and {len(crasher.account.gone)} taken down"
    return (
        f"{told.num_kills.total()} kills ({of_each}) in {minutes:.0f} minutes with seed {config.seed}, "
        f"{crasher.num_looks} looks; {of_images}, up to {crasher.most_segments} segments; "
        f"the reader was answered {crasher.num_answers} times\n"
        f"ended: {', '.join(ends)}\n{table(told)}"
    )


def main(argv: list[str]) -> int:
    """0 where everything held."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=CrasherConfig.seed)
    parser.add_argument("--kills", type=int, default=CrasherConfig.kills)
    parser.add_argument("--minutes", type=float, default=CrasherConfig.minutes)
    parser.add_argument("--every-s", type=float, default=CrasherConfig.every_s)
    parser.add_argument("--victims", nargs="+", choices=_VICTIMS, default=CrasherConfig.victims)
    config = CrasherConfig(**vars(parser.parse_args(argv)))
    folder = Path(tempfile.mkdtemp(prefix="namr-crasher-"))
    print(crash(config, folder))
    shutil.rmtree(folder)
    return 0


def crash(config: CrasherConfig, folder: Path) -> str:
    """One run below `folder`, told at its end; Broken, with what was done last, where something fails."""
    began = time.monotonic()
    with stack.running(folder, seed=config.seed, with_raylets="raylet" in config.victims) as running:
        os.environ.update(running.store.environment)
        crasher = Crasher(config, folder, running)
        try:
            crasher.run()
        except BaseException as error:
            lines = crasher.told.history_path.read_text().splitlines()[-60:]
            error.add_note(
                f"seed {config.seed}; everything is in {folder}; the last of it:\n" + "\n".join(lines)
            )
            raise
        return summary(crasher, config, (time.monotonic() - began) / 60)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
