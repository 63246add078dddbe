"""What came of a night, told: one line for a log, and the same with its numbers as JSON for a webhook.

The URL of a webhook often is its password. It is taken from the environment or the config, and nothing that
is said here has more of it than its host.

Not covered: a night whose process is killed says nothing, so alarms should miss the notice, too.
"""

import dataclasses
import logging
import os
import sys
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import httpx

from namr.errors import Conflict
from namr.nightly.gate import NotGoodEnough
from namr.nightly.reindexing import ReindexReport
from namr.secrets import without_secrets

URL_VARIABLE = "NAMR_NOTIFY_URL"
_TIMEOUT_S = 5.0
_PAUSES_S = (1.0, 3.0)

Event = Literal["published", "prepared", "unchanged", "refused", "failed"]


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What is posted, as JSON."""

    event: Event
    """published; prepared: another model's, to be switched to; unchanged: nothing is new, or the current
    release is pinned; refused: by the gate, or since another night or a collection was at work; failed:
    anything else"""
    text: str
    """the line; chats that take webhooks show what has this name"""
    release_id: str | None = None
    """the one that is current now"""
    num_indexed: int | None = None
    num_embedded_now: int | None = None
    recall_at_10: float | None = None
    images_per_s: float | None = None
    """of the extraction; None where it had nothing to do"""


def of_report(done: ReindexReport) -> Notice:
    """Of a night that came to its end."""
    manifest, assessed = done.release.manifest, done.report.assessment
    counts = manifest.counts
    if done.held:
        text = (
            f"held: release {manifest.release_id} is pinned since {done.held.since} ({done.held.reason}); "
            "nothing was done. `namr releases unpin` lifts it"
        )
        return Notice(event="unchanged", text=text, release_id=manifest.release_id)
    num_new = done.extracted.num_new if done.extracted else 0
    took = done.extracted.throughput if done.extracted and num_new else None
    speed = f" at {took.images_per_s:.1f} a second" if took else ""
    text = (
        f"{_what(done)} release {manifest.release_id}: "
        f"{counts.num_indexed} of {counts.num_samples} images ({num_new} embedded now{speed}, "
        f"{counts.num_refused} refused, {counts.num_tombstoned} taken out), "
        f"{manifest.index_key}, recall@10 {assessed.recall_at_10:.3f} with {assessed.probed}; model "
        f"{manifest.model_name} {manifest.model_version}, dataset version {manifest.dataset_version}; "
        f"built: {done.report.built}"
        + (f"; {done.report.aged}" if done.report.aged else "")
        + (f"; {took.stages}" if took else "")
        + f"; {done.collected}; {done.compacted}"
    )
    return Notice(
        event=("prepared" if manifest.is_prepared else "published") if done.is_new else "unchanged",
        text=text,
        release_id=manifest.release_id,
        num_indexed=counts.num_indexed,
        num_embedded_now=num_new,
        recall_at_10=assessed.recall_at_10,
        images_per_s=took.images_per_s if took else None,
    )


def _what(done: ReindexReport) -> str:
    is_prepared = done.release.manifest.is_prepared
    if done.is_new:
        return "prepared" if is_prepared else "published"
    return f"nothing is new; {'prepared' if is_prepared else 'current'} is"


def of_error(error: BaseException) -> Notice:
    """Of a night that was stopped by this."""
    is_refused = isinstance(error, NotGoodEnough | Conflict)
    text = " ".join(without_secrets(f"{type(error).__name__}: {error}").split())
    return Notice(event="refused" if is_refused else "failed", text=text)


@contextmanager
def failures_told(url: str | None) -> Iterator[None]:
    """Whatever is raised inside is told to the webhook, and raised on."""
    try:
        yield
    except BaseException as error:
        tell(url, of_error(error))
        raise


def tell(url: str | None, notice: Notice, *, pauses_s: Sequence[float] = _PAUSES_S) -> None:
    """Post a notice to a webhook; where it isn't taken, say why on standard error: it spoils no night.

    url: None is what NAMR_NOTIFY_URL says; where that is not set, nobody is told. pauses_s: before the second
    try, the third and so on.
    """
    target = url or os.environ.get(URL_VARIABLE)
    if not target:
        return
    reason, is_worth_another = _post(target, notice)
    for pause_s in pauses_s:
        if not is_worth_another:
            break
        time.sleep(pause_s)
        reason, is_worth_another = _post(target, notice)
    if reason:
        print(f"the webhook at {_host_of(target)} was not told: {reason}", file=sys.stderr)


def _post(url: str, notice: Notice) -> tuple[str, bool]:
    """Why it was not taken, empty if it was; and whether another try may help."""
    log = logging.getLogger("httpx")  # it would tell the whole URL
    was_disabled, log.disabled = log.disabled, True
    try:
        answer = httpx.post(url, json=dataclasses.asdict(notice), timeout=_TIMEOUT_S)
    except httpx.TransportError as error:
        return type(error).__name__, True
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # its message may have the URL in it
        return f"{type(error).__name__}, is the URL right?", False
    finally:
        log.disabled = was_disabled
    if answer.is_success:
        return "", False
    return f"it answered {answer.status_code}", answer.status_code == 429 or answer.status_code >= 500


def _host_of(url: str) -> str:
    try:
        return urllib.parse.urlsplit(url).hostname or "no host"
    except ValueError:
        return "no host"
