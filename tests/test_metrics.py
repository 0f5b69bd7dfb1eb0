"""Labels of metrics: few, whatever is inserted; and what counts as what."""

from datetime import timedelta
from uuid import uuid4

import prometheus_client
import pytest

from daemon.metrics import MOST_CODES, Gauge, Metrics, Process, Tally
from daemon.run import ClaimedRun, Fate
from tests.support.postgres import free_port

IDLE = Process(
    slots=4,
    held=1,
    outbox=0,
    listener_connected=True,
    last_beat_seconds=1.5,
    uploads_stored=3,
    uploads_failed=1,
    base64_refused=2,
)


@pytest.fixture
def metrics() -> Metrics:
    """Metrics that know one model."""
    metrics = Metrics(free_port())
    metrics.watch({"demo": {"painter"}}, lambda: IDLE)
    return metrics


def claimed(processor: str | None) -> ClaimedRun:
    """A run of a processor, which may be null in the database."""
    asked: str = processor  # pyright: ignore[reportAssignmentType]
    return ClaimedRun(uuid4(), "run_1", 1, 1, "w", asked, asked, 1, {}, 1, 3, None, None, None, timedelta())


def scraped(metrics: Metrics) -> dict[str, float]:
    """Return what a scrape shows: {name and labels: value}."""
    lines = prometheus_client.generate_latest(metrics.registry).decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_labels_come_from_the_registry(metrics: Metrics) -> None:
    for processor in ("demo:painter", "demo:x", *(f"invented-{number}:painter" for number in range(20)), "", None):
        metrics.settled(claimed(processor), Fate("completed"))
    runs = {name: value for name, value in scraped(metrics).items() if name.startswith("image_jobs_runs_total")}
    assert runs == {
        'image_jobs_runs_total{code="",model="painter",outcome="completed",provider="demo"}': 1,
        'image_jobs_runs_total{code="",model="other",outcome="completed",provider="demo"}': 1,
        'image_jobs_runs_total{code="",model="other",outcome="completed",provider="other"}': 22,
    }


def test_codes_cannot_fill_the_memory(metrics: Metrics) -> None:
    for code in ("refused", "A sentence.", None, *(f"code_{number}" for number in range(2 * MOST_CODES))):
        metrics.settled(claimed("demo:painter"), Fate("failed", code=code))
    codes = [name for name in scraped(metrics) if "runs_total" in name]
    assert len(codes) <= MOST_CODES + 1
    assert any('code="refused"' in name for name in codes)
    assert not any("sentence" in name for name in codes)


def test_parked_and_retried_runs_have_not_ended(metrics: Metrics) -> None:
    for outcome in ("retried", "parked", "released", "fallback"):
        metrics.settled(claimed("demo:painter"), Fate(outcome, code="timeout"))  # pyright: ignore[reportArgumentType]
    found = scraped(metrics)
    assert not [name for name in found if name.startswith("image_jobs_runs_total")]
    assert found['image_jobs_attempts_total{outcome="retried",provider="demo"}'] == 1
    assert sum(value for name, value in found.items() if name.startswith("image_jobs_attempts_total")) == 4


def test_stages_are_in_seconds(metrics: Metrics) -> None:
    times = {"queuedMs": 1500, "generateMs": 3000, "storeMs": 250, "settleMs": 5}
    metrics.settled(claimed("demo:painter"), Fate("completed", timings=times))
    found = scraped(metrics)
    sums = [found[f'image_jobs_stage_seconds_sum{{provider="demo",stage="{stage}"}}'] for stage in
            ("queued", "generate", "store", "settle")]  # fmt: skip
    assert sums == [1.5, 3.0, 0.25, 0.005]


def test_tallies_are_counted(metrics: Metrics) -> None:
    for tally in (
        Tally("runs", "demo", "cancelled", 40, "painter", code="whatever"),
        Tally("calls", "demo", "charged", 2, "painter", usd=0.08),
        Tally("calls", "demo", "free", 1, "painter"),
        Tally("webhooks", "hmac", "accepted", 3),
        Tally("webhooks", "invented", "refused", 5),
        Tally("base64", "", "", 1),
    ):
        metrics.tally(tally)
    found = scraped(metrics)
    assert found['image_jobs_runs_total{code="",model="painter",outcome="cancelled",provider="demo"}'] == 40
    assert found['image_jobs_calls_total{model="painter",provider="demo",state="charged"}'] == 2
    assert found['image_jobs_usd_total{model="painter",provider="demo",state="charged"}'] == 0.08
    assert found['image_jobs_webhooks_total{provider="hmac",result="accepted"}'] == 3
    assert found['image_jobs_webhooks_total{provider="other",result="refused"}'] == 5
    assert found["image_jobs_base64_refused_total"] == 3


def test_a_scrape_shows_the_process_and_the_queue(metrics: Metrics) -> None:
    metrics.show(
        [
            Gauge("waiting", "demo", 3),
            Gauge("waiting", "invented", 4),
            Gauge("waiting", "made-up", 5),
            Gauge("oldest_waiting", "demo", 7.5),
            Gauge("closed", "demo", 1, "paused"),
        ]
    )
    found = scraped(metrics)
    assert found['image_jobs_waiting{provider="demo"}'] == 3
    assert found['image_jobs_waiting{provider="other"}'] == 9
    assert found['image_jobs_oldest_waiting_seconds{provider="demo"}'] == 7.5
    assert found['image_jobs_provider_closed{provider="demo",reason="paused"}'] == 1
    assert found["image_jobs_slots"] == 4
    assert found["image_jobs_listener_connected"] == 1
    assert found["image_jobs_last_beat_seconds"] == 1.5
    assert found['image_jobs_uploads_total{result="failed"}'] == 1
    metrics.show(())
    assert 'image_jobs_waiting{provider="demo"}' not in scraped(metrics)
