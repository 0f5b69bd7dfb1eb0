"""Labels of metrics: few, whatever is inserted."""

from datetime import timedelta
from uuid import uuid4

import prometheus_client

from daemon.metrics import Metrics
from daemon.providers import PROVIDERS
from daemon.run import ClaimedRun
from tests.support.postgres import free_port


def claimed(processor: str | None) -> ClaimedRun:
    """A run of a processor, which may be null in the database."""
    asked: str = processor  # pyright: ignore[reportAssignmentType]
    return ClaimedRun(uuid4(), "run_1", 1, 1, "w", asked, asked, 1, {}, 1, 3, None, None, None, timedelta())


def test_label_of_a_provider_comes_from_the_registry() -> None:
    metrics = Metrics(free_port(), PROVIDERS)
    for processor in ("demo:painter", *(f"invented-{number}:painter" for number in range(20)), "", None):
        metrics.finished(claimed(processor), "completed", 1.0)
    text = prometheus_client.generate_latest().decode()
    assert 'image_jobs_runs_finished_total{outcome="completed",provider="demo"} 1.0' in text
    assert 'image_jobs_runs_finished_total{outcome="completed",provider="other"} 22.0' in text
    assert "invented" not in text
