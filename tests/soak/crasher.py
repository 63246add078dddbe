"""Exactly once under fire: people, nights and a reader at work at once, while what they run on is killed.

    python -m tests.soak.crasher --seed 0 --each 100 --tally kills.jsonl

Images are packed, changed and taken down, indexed night by night and compacted, releases are collected,
rolled back to, prepared and switched to, and a service answers slowly, all through a proxy that lets one
request in ten fail (`people`). Every 5 s, with a chance of 0.3, kill -9 hits a command, one of Ray's workers,
the raylet of the node that works, the S3 server or the service, or a worker gets no more memory or disk. Most
commands have an appointment besides: to die, to get no more memory or disk, or to see the S3 server die, at
some point of the stage that has seen the fewest. Every command is repeated until it is confirmed, and after
kills `truth` looks whether everything holds. The draws come from the seed; what is under way when a kill
lands is the machine's doing.

A round has one or more new datasets with releases and people of their own, and at its end these are left
undisturbed: they get on, and nothing is left over. With --tally the counts of all runs with the same file add
up, and what has seen the fewest is known from before.

At the first thing that doesn't hold it ends, says the seed and what was done last, and keeps the folder.
Not covered: a network that splits, and disks that lose what they had confirmed.
"""

import argparse
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.soak import stack, witness
from tests.soak.stack import BUCKET, Stack
from tests.soak.tally import Tally
from tests.soak.world import World

_CHANCE = 0.3
_FAILING_SHARE = 0.1
_APPOINTED_SHARE = 0.8
_VICTIMS = {
    **{"driver": 4, "worker": 3, "raylet": 1, "store": 2, "reader": 1},
    **{"worker's memory": 1, "worker's disk": 1},
}
"""what the clock kills, or takes away, and how often"""


@dataclass(frozen=True, kw_only=True)
class CrasherConfig:
    """How much fire."""

    seed: int = 0
    each: int = 100
    """kills in every stage of every command, after which it ends"""
    minutes: float = 600
    """under fire, after which it ends all the same"""
    round_minutes: float = 15
    """of these, after which new datasets are begun: old ones are slow to read"""
    every_s: float = 5.0
    """how often the clock draws whether to kill"""
    victims: tuple[str, ...] = tuple(_VICTIMS)
    """what the clock kills; without "raylet" Ray is one node, without "reader" nobody reads"""
    worlds: int = 1
    """datasets, each with people of its own, that share what they run on"""
    tally: Path | None = None
    """where counts are kept, so that they add up"""


class Crasher:
    """One round: people in threads, the clock that kills in this one."""

    def __init__(
        self, config: CrasherConfig, folder: Path, running: Stack, tally: Tally, *, number: int
    ) -> None:
        self._config, self._stack, self._tally = config, running, tally
        self._draw = random.Random(f"{config.seed} {number} clock")
        self.worlds = [
            World(
                f"{config.seed} {number} {each}",
                f"s3://{BUCKET}/{number}-{each}",
                folder / f"{number}-{each}",
                tally,
                environment=self._environment,
                kill_store=self._kill_store,
            )
            for each in range(config.worlds)
        ]

    def run(self, seconds: float) -> None:
        """So long under fire, or until enough were killed; Broken as soon as something does not hold."""
        self._in_all(World.begin)
        self._stack.proxy.fail(_FAILING_SHARE)
        for world in self.worlds:
            world.work(appointed_share=_APPOINTED_SHARE, with_reader="reader" in self._config.victims)
        try:
            self._fire(time.monotonic() + seconds)
        finally:
            self._in_all(World.stop)
            self._stack.proxy.fail(0)
        num = self._tally.num_seen
        self._in_all(World.end)
        self._tally.looked(num)

    def _fire(self, until: float) -> None:
        looked = self._tally.num_seen
        while self._tally.fewest < self._config.each and time.monotonic() < until:
            time.sleep(self._config.every_s)
            if any(world.has_failed for world in self.worlds):
                break
            if self._draw.random() < _CHANCE:
                self._kill()
            if self._tally.num_seen > looked:
                looked = self._tally.num_seen
                self._look()

    def _in_all(self, step: Callable[[World], None]) -> None:
        with ThreadPoolExecutor(len(self.worlds)) as pool:
            list(pool.map(step, self.worlds))

    def _environment(self) -> dict[str, str]:
        return {**self._stack.environment, "RAY_ADDRESS": self._stack.ray.address}

    def _kill(self) -> None:
        """One thing, drawn from what there is."""
        victims = self._config.victims
        what = self._draw.choices(victims, [_VICTIMS[each] for each in victims])[0]
        world = self._draw.choice(self.worlds)
        if what == "driver":
            if drivers := list(world.runner.under_way):
                driver = self._draw.choice(drivers)
                driver.process.kill()
                world.told.killed(what, [(driver.name, driver.stage)])
        elif what.startswith("worker"):
            if workers := self._stack.workers():
                pid, title = self._draw.choice(workers)
                world.told.says(f"{what} of {title}")
                if stack.strike(pid, what):
                    world.told.killed(what, self._under_way(with_workers=True))
        elif what == "raylet":
            under_way = self._under_way(with_workers=True)
            self._stack.kill_raylet()
            world.told.killed(what, under_way)
        elif what == "store":
            self._kill_store()
        elif world.reader.process:
            world.reader.process.kill()
            world.told.killed(what, [("serve", "serving")])

    def _kill_store(self) -> None:
        under_way = self._under_way()
        if self._stack.interrupt_store(away_s=self._draw.uniform(0, 3)):
            self.worlds[0].told.killed("store", under_way)

    def _under_way(self, *, with_workers: bool = False) -> list[tuple[str, str]]:
        """Commands and their stages; of those alone that may have workers at work, if asked so."""
        running = [each for world in self.worlds for each in world.runner.under_way]
        return [
            (each.name, each.stage)
            for each in running
            if not with_workers or each.stage in witness.WITH_WORKERS
        ]

    def _look(self) -> None:
        num = self._tally.num_seen
        with self._stack.store_stays():
            for world in self.worlds:
                world.look()
        self._tally.looked(num)


def main(argv: list[str]) -> int:
    """0 where everything held."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=CrasherConfig.seed)
    parser.add_argument("--each", type=int, default=CrasherConfig.each)
    parser.add_argument("--minutes", type=float, default=CrasherConfig.minutes)
    parser.add_argument("--round-minutes", type=float, default=CrasherConfig.round_minutes)
    parser.add_argument("--every-s", type=float, default=CrasherConfig.every_s)
    parser.add_argument("--victims", nargs="+", choices=_VICTIMS, default=CrasherConfig.victims)
    parser.add_argument("--worlds", type=int, default=CrasherConfig.worlds)
    parser.add_argument("--tally", type=Path, default=CrasherConfig.tally)
    config = CrasherConfig(**vars(parser.parse_args(argv)))
    folder = Path(tempfile.mkdtemp(prefix="namr-crasher-"))
    print(crash(config, folder))
    shutil.rmtree(folder)
    return 0


def crash(config: CrasherConfig, folder: Path) -> str:
    """Rounds below `folder`, told at their end; Broken, with what was done last, where something fails."""
    tally = Tally(config.tally, seed=config.seed)
    num_rounds = max(1, math.ceil(config.minutes / config.round_minutes))
    with stack.running(folder, seed=config.seed, with_raylets="raylet" in config.victims) as running:
        os.environ.update(running.store.environment)
        for number in range(num_rounds):
            crasher = Crasher(config, folder, running, tally, number=number)
            try:
                crasher.run(60 * config.minutes / num_rounds)
            except BaseException as error:
                error.add_note(f"seed {config.seed}; everything is in {folder}")
                for world in crasher.worlds:
                    error.add_note(f"the last of {world.told.history_path}:\n{world.told.last()}")
                raise
            if tally.fewest >= config.each:
                break
    return f"{tally.in_words()}\n{tally.table()}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
