"""Prometheus metrics of a service, in a registry of their own: two services in one process don't mix."""

from collections.abc import Mapping
from typing import Any

import prometheus_client

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST


class Metrics:
    """What a service counts; `text` is what Prometheus reads."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = prometheus_client.Counter(
            "namr_requests", "Requests answered", ["route", "status"], **own
        )
        self.seconds = prometheus_client.Histogram(
            "namr_request_seconds", "Seconds from request to answer", ["route"], **own
        )
        self.stages = prometheus_client.Histogram(
            "namr_stage_seconds",
            "Seconds of each stage of a search",
            ["stage"],
            buckets=[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5],
            **own,
        )
        self.answers = prometheus_client.Counter(
            "namr_answers", "Queries answered", ["side", "certainty"], **own
        )
        self.refused = prometheus_client.Counter(
            "namr_refused",
            "Requests refused or stopped for what they or all together take",
            ["kind"],
            **own,
        )
        self.failures = prometheus_client.Counter(
            "namr_follow_failures", "Polls that could not read or open what is current", **own
        )
        self.release = prometheus_client.Info("namr_release", "What is being served", **own)
        self.items = prometheus_client.Gauge("namr_items", "Items that can be found", **own)
        self.held_bytes = prometheus_client.Gauge(
            "namr_held_bytes", "Bytes of request bodies that are held", **own
        )

    def serving(self, *, release_id: str, model: str, num_items: int) -> None:
        """Another release is served from now on."""
        self.release.info({"release_id": release_id, "model": model})
        self.items.set(num_items)

    def searched(self, *, side: str, certainties: list[str], stages_ms: Mapping[str, float]) -> None:
        """A search was answered, one certainty a query."""
        for certainty in certainties:
            self.answers.labels(side, certainty).inc()
        for stage, milliseconds in stages_ms.items():
            self.stages.labels(stage.removesuffix("_ms")).observe(milliseconds / 1e3)

    def text(self) -> bytes:
        """All metrics in Prometheus' own format."""
        return prometheus_client.generate_latest(self.registry)
