"""What a service counts, as Prometheus reads it."""

from namr.serve.telemetry import Metrics


def test_searches_are_counted_by_side_and_certainty_and_timed_by_stage() -> None:
    metrics = Metrics()
    metrics.searched(
        side="both",
        certainties=["proved", "unproved", "proved"],
        stages_ms={"embed_ms": 0.0, "rerank_ms": 30.0},
    )
    text = metrics.text().decode()
    assert 'namr_answers_total{certainty="proved",side="both"} 2.0' in text
    assert 'namr_answers_total{certainty="unproved",side="both"} 1.0' in text
    assert 'namr_stage_seconds_bucket{le="0.025",stage="rerank"} 0.0' in text
    assert 'namr_stage_seconds_bucket{le="0.05",stage="rerank"} 1.0' in text
    assert 'namr_stage_seconds_count{stage="embed"} 1.0' in text


def test_what_is_served_is_told_and_the_last_word_counts() -> None:
    metrics = Metrics()
    metrics.serving(release_id="first", model="digits 1", num_items=80)
    metrics.serving(release_id="second", model="digits 2", num_items=79)
    text = metrics.text().decode()
    assert 'namr_release_info{model="digits 2",release_id="second"} 1.0' in text
    assert "first" not in text
    assert "namr_items 79.0" in text


def test_two_services_in_one_process_do_not_mix() -> None:
    one, other = Metrics(), Metrics()
    one.refused.labels("Busy").inc()
    assert 'namr_refused_total{kind="Busy"} 1.0' in one.text().decode()
    assert "Busy" not in other.text().decode()
