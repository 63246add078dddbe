"""One dataset and its releases, with people and a reader at work on them, and what is looked at of it.

Not covered: what is killed (`crasher`).
"""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from namr.store.cache import Cache
from tests import small_model
from tests.soak import truth
from tests.soak.acts import Broken, Runner, Told
from tests.soak.people import People
from tests.soak.reader import Reader
from tests.soak.tally import Tally
from tests.soak.truth import Places


class World:
    """Made, begun, at work, stopped and ended, in this order."""

    def __init__(
        self, name: str, uri: str, folder: Path, tally: Tally, *,
        environment: Callable[[], Mapping[str, str]], kill_store: Callable[[], None],
    ) -> None:  # fmt: skip
        """name: what all that is drawn depends on. environment: of the next process."""
        self.told = Told(folder / "history.log", tally)
        self.runner = Runner(environment, self.told, seed=name, kill_store=kill_store)
        models = [small_model.save_model(folder / f"model-{seed}", seed=seed) for seed in (0, 1)]
        self._places = Places(*(f"{uri}/{each}" for each in ("dataset", "embeddings", "releases")))
        self._people = People(self._places, folder, (models[0], models[1]), runner=self.runner, seed=name)
        self.reader = Reader(
            self._places.releases_uri,
            models[0],
            folder / "reader",
            environment=environment,
            account=self._people.account,
            told=self.told,
            seed=name,
        )
        self._cache = Cache(folder / "checker", max_bytes=1 << 30)
        self._tally, self._threads = tally, list[threading.Thread]()
        self._failures: list[BaseException] = []

    def begin(self) -> None:
        """There is a release; nothing else is done yet."""
        self._people.begin()

    def work(self, *, appointed_share: float, with_reader: bool) -> None:
        """Everybody begins, each in a thread of its own, until `stop`."""
        self.runner.share = appointed_share
        work = [*self._people.at_work(), *([self.reader.run] if with_reader else [])]
        self._threads = [
            threading.Thread(target=self._caught, args=(each,), name=each.__name__) for each in work
        ]
        for thread in self._threads:
            thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether somebody found something that does not hold."""
        return bool(self._failures)

    def stop(self) -> None:
        """All come to their end, which takes as long as what each of them is at."""
        self.runner.stopped.set()
        self.reader.stopped.set()
        for thread in self._threads:
            thread.join()

    def end(self) -> None:
        """Who comes next, undisturbed, gets on, and nothing is left over; Broken where something failed."""
        if self._failures:
            raise self._failures[0]
        self.runner.share = 0
        self.runner.stopped.clear()
        self._people.end()
        self.look()
        account = self._people.account
        self._tally.ended(
            packed=len(account.packed),
            changed=account.num_changed,
            gone=len(account.gone),
            answers=self.reader.num_answers,
        )

    def look(self) -> None:
        """Broken where something does not hold."""
        if found := truth.broken(self._people.account, self._places, self._cache):
            raise Broken("; ".join(found))

    def _caught(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._failures.append(error)
