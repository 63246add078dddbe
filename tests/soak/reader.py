"""A slow reader: a service that holds a release, is asked now and then, and is started again and again.

Not covered: how fast it is.
"""

import random
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from namr.errors import NamrError, ObjectMissing
from namr.search.answers import SearchOptions
from namr.serve.client import Client
from tests.soak.acts import Broken, Told, start
from tests.soak.truth import Account

_POLL_S = 2.0
_LONGEST_S = 45.0
"""until a service has to have heard of a take-down, with a store that is away for a while"""
_PAUSE_S = 1.0
_LIFE_S = (30.0, 120.0)


class _Asked(NamedTuple):
    """What a question was answered with, and what was gone for long when it was asked."""

    keys: list[str]
    long_gone: set[str]


class Reader:
    """One service at a time; `run` in a thread of its own."""

    def __init__(
        self, releases_uri: str, model_folder: Path, cache_folder: Path, *,
        environment: Callable[[], Mapping[str, str]], account: Account, told: Told, seed: str,
    ) -> None:  # fmt: skip
        self._flags = [
            *(f"--releases-uri={releases_uri}", f"--model-folder={model_folder}", "--port=0"),
            *(f"--cache-folder={cache_folder}", f"--poll-interval-s={_POLL_S}"),
        ]
        self._environment, self._account, self._told = environment, account, told
        self._draw, self.stopped = random.Random(f"{seed} reader"), threading.Event()
        self._gone_since: dict[str, float] = {}
        self.process: BaseProcess | None = None
        self.num_answers = 0

    def run(self) -> None:
        """Until `stopped`."""
        while not self.stopped.is_set():
            self._serve()

    def _serve(self) -> None:
        process, output = start(["jobs/serve.py", *self._flags], self._environment())
        line = ""
        try:
            line = next((line for line in output if "serving release" in line), "")
            if line:
                self.process = process
                drain = threading.Thread(target=output.read)
                drain.start()
                with closing(Client(line.rpartition(" on ")[2].strip(), num_connect_retries=0)) as client:
                    self._ask(client, process)
        finally:
            self.process = None
            process.terminate()
            process.join(20)
            if process.is_alive():
                process.kill()
                raise Broken("the service did not end within 20 s of SIGTERM")
            if line:
                drain.join()
            output.close()
        self._told.ends["serve", "served" if line else "did not start"] += 1
        self.stopped.wait(2)

    def _ask(self, client: Client, process: BaseProcess) -> None:
        until = time.monotonic() + self._draw.uniform(*_LIFE_S)
        while time.monotonic() < until and process.is_alive() and not self.stopped.wait(_PAUSE_S):
            asked = self._asked(client)
            if asked is None:
                continue
            self.num_answers += 1
            if len(set(asked.keys)) < len(asked.keys):
                raise Broken(f"the service answered with one image twice: {asked.keys}")
            if found := asked.long_gone & set(asked.keys):
                raise Broken(
                    f"the service answered with {sorted(found)}, taken down more than {_LONGEST_S} s ago"
                )

    def _asked(self, client: Client) -> _Asked | None:
        now, account = time.monotonic(), self._account.snapshot()
        for key in account.gone:
            self._gone_since.setdefault(key, now)
        long_gone = {key for key, since in self._gone_since.items() if now - since > _LONGEST_S}
        try:
            answer = client.search_key(self._draw.choice(sorted(account.packed)), SearchOptions(k=50))
        except ObjectMissing:  # not in the release that it has open, or taken down
            return None
        except NamrError as error:  # it was killed, or is busy
            self._told.ends["serve", type(error).__name__] += 1
            return None
        return _Asked([hit.key for hit in answer.hits], long_gone)
