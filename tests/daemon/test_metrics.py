"""Metrics and log of a whole daemon: what has become of runs, in every way that they can go."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.daemon_harness import DaemonHarness, start_harness
from tests.support.postgres import Cluster, free_port, wait_until
from tests.support.promtool import dashboard_queries, evaluate, firing, has_values, rule_names, steady

pytestmark = pytest.mark.timeout(180)


@dataclass(kw_only=True)
class MeteredHarness(DaemonHarness):
    """A daemon whose metrics are served."""

    port: int

    async def scrape(self) -> dict[str, float]:
        """Return what `/metrics` shows: {name and labels: value}."""
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://127.0.0.1:{self.port}/metrics")).text
        lines = (line.rpartition(" ") for line in text.splitlines() if line[0] != "#")
        return {name: float(value) for name, _, value in lines}

    async def total(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's series that have these labels."""
        wanted = {f'{label}="{value}"' for label, value in labels.items()}
        return sum(
            value
            for series, value in (await self.scrape()).items()
            if re.match(rf"{name}(\{{|$)", series) and wanted <= set(re.findall(r'\w+="[^"]*"', series))
        )

    async def wait_for_total(self, wanted: float, name: str, **labels: str) -> None:
        """Wait until that sum is so much; more is an error, at once."""

        async def reached() -> bool:
            total = await self.total(name, **labels)
            assert total <= wanted + 1e-9, (name, labels, total)
            return total > wanted - 1e-9

        await wait_until(reached, timeout=40)

    async def wait_for_level(self, wanted: float, name: str, **labels: str) -> None:
        """Wait until that sum of a gauge is so much; it may show what was before, which may be more."""

        async def reached() -> bool:
            return await self.total(name, **labels) == wanted

        await wait_until(reached, timeout=40)


@pytest.fixture(scope="module")
async def metered(postgres: Cluster) -> AsyncIterator[MeteredHarness]:
    """A daemon that paints, and whose metrics are served."""
    port = free_port()
    environment = {
        "IMAGE_JOBS_METRICS_PORT": str(port),
        "IMAGE_JOBS_POLL_INTERVAL": "0.2",
        "WEBHOOK_SECRET_HMAC": "s" * 20,
    }
    async with (
        postgres.database() as dsn,
        start_harness(MeteredHarness, dsn, environment=environment, port=port) as harness,
    ):
        yield harness


async def follow_every_fate(it: MeteredHarness) -> None:
    """Insert a run for each way to go, and wait until all have ended."""
    noop: dict[str, Any] = {"noop": True, "cost": 0.25}
    completed = [await it.insert_run(demo=noop), await it.insert_run(demo={**noop, "submit": 0.1})]
    failed = [
        await it.insert_run(demo={"fail": "It went wrong.", "final": True}),
        await it.insert_run(demo={"refuse": True}),
        await it.insert_run("demo:nothing", demo={"fail": "No.", "final": True}),
    ]
    worn_out, throttled = (
        await it.insert_run(demo={"fail": "Not yet."}),
        await it.insert_run(demo={**noop, "throttle": 0.1, "times": 1}),
    )
    for times in (1, 2):
        await it.wait_for_retry(worn_out, times)
        await it.make_due(worn_out)
    for run in (*completed, throttled):
        await it.wait_for_status(run, "completed")
    for run in (*failed, worn_out):
        await it.wait_for_status(run, "failed")
    held = await it.insert_run(demo={"hang": True})
    await it.wait_for_status(held, "running")
    await it.cancel(held)
    await it.db.execute("insert into image_jobs.provider_limits (provider, paused) values ('demo', true)")
    waiting = await it.insert_runs(3, demo=noop)
    await it.wait_for_level(3, "image_jobs_waiting", provider="demo")
    await it.wait_for_level(1, "image_jobs_provider_closed", provider="demo", reason="paused")
    await it.db.execute("update runs set status = 'cancelled' where id = any ($1)", waiting)
    await it.db.execute("delete from image_jobs.provider_limits where provider = 'demo'")


async def test_every_fate_is_counted_once(metered: MeteredHarness) -> None:
    await follow_every_fate(metered)

    await metered.wait_for_total(3, "image_jobs_runs_total", outcome="completed")
    await metered.wait_for_total(4, "image_jobs_runs_total", outcome="failed")
    await metered.wait_for_total(4, "image_jobs_runs_total", outcome="cancelled")
    runs = await metered.db.fetchval("select count(*) from runs where status in ('completed', 'failed', 'cancelled')")
    assert await metered.total("image_jobs_runs_total") == runs
    assert await metered.total("image_jobs_runs_total", outcome="failed", code="demo_failed") == 3
    assert await metered.total("image_jobs_runs_total", provider="demo", model="other") == 1
    assert await metered.total("image_jobs_attempts_total", outcome="parked") >= 1
    assert await metered.total("image_jobs_attempts_total", outcome="retried") == 3
    for stage in ("queued", "generate", "store", "settle"):
        assert await metered.total("image_jobs_stage_seconds_count", stage=stage) == 3

    states = await metered.db.fetch("select state, count(*) from image_jobs.calls group by state")
    for state, count in states:
        await metered.wait_for_total(count, "image_jobs_calls_total", state=state)
    await metered.wait_for_total(0.75, "image_jobs_usd_total", state="charged")
    assert await metered.total("image_jobs_uploads_total", result="stored") >= 3
    assert await metered.total("image_jobs_listener_connected") == 1
    assert await metered.total("image_jobs_last_beat_seconds") < 30
    assert await metered.total("image_jobs_build_info") == 1


async def test_webhooks_are_counted(metered: MeteredHarness) -> None:
    for _ in range(2):
        await metered.db.execute("select image_jobs.receive_webhook('hmac', '{}', '{}')")
    await metered.wait_for_total(2, "image_jobs_webhooks_total", provider="hmac", result="refused")


async def test_failed_run_is_a_warning_with_all_that_is_known(metered: MeteredHarness) -> None:
    run = await metered.insert_run(demo={"fail": "It went wrong.", "final": True})
    row = await metered.wait_for_status(run, "failed")

    def lines() -> list[dict[str, Any]]:
        return [line for line in metered.daemon.logged("run.finished") if line["run_id"] == run]

    (line,) = await wait_until(lines)
    assert (line["level"], line["error"], line["code"]) == ("warning", "It went wrong.", "demo_failed")
    assert (line["workflow"], line["node"]) == (str(row["subject_id"]), row["metadata"]["nodeId"])


async def test_run_that_the_database_gives_up_is_counted_and_logged(metered: MeteredHarness) -> None:
    """Its daemon went silent at the last attempt: no settlement says that it has failed."""
    before = await metered.total("image_jobs_runs_total", code="outcome_unknown")
    run = await metered.insert_run(demo={"hang": True})
    await metered.wait_for_status(run, "running")
    async with metered.db.transaction():
        await metered.db.execute("select set_config('image_jobs.writer', 'daemon', true)")
        await metered.db.execute("update runs set max_attempts = 1 where id = $1", run)
        await metered.db.execute("select image_jobs.abandon_runs(claimed_by) from runs where id = $1", run)
    await metered.wait_for_status(run, "failed")
    await metered.wait_for_total(before + 1, "image_jobs_runs_total", code="outcome_unknown")
    await wait_until(
        lambda: [line for line in metered.daemon.logged("run.finished") if line["run_id"] == run and "node" in line]
    )


async def scrape_while_paused(it: MeteredHarness) -> dict[str, float]:
    """Return a scrape of a daemon that has seen something of everything, with a paused provider and a run that waits for it."""
    await it.wait_for_status(await it.insert_run(demo={"noop": True, "cost": 0.25, "submit": 0.1}), "completed")
    await it.wait_for_status(await it.insert_run(demo={"fail": "No.", "final": True}), "failed")
    await it.db.execute("select image_jobs.receive_webhook('hmac', '{}', '{}')")
    await it.db.execute("insert into image_jobs.provider_limits (provider, paused) values ('demo', true)")
    waiting = await it.insert_run(demo={"noop": True})

    async def shown() -> bool:
        totals = [await it.total(f"image_jobs_{name}") for name in ("waiting", "provider_closed", "usd_total")]
        return 0 not in (*totals, await it.total("image_jobs_webhooks_total"))

    await wait_until(shown, timeout=60)
    scrape = await it.scrape()
    await it.cancel(waiting)
    await it.db.execute("delete from image_jobs.provider_limits where provider = 'demo'")
    return scrape


async def test_rules_and_dashboard_read_the_series_of_a_daemon(metered: MeteredHarness, tmp_path: Path) -> None:
    """Every rule is silent while all is well, and fires once when it is not; every query of the dashboard has values."""
    scraped = await scrape_while_paused(metered)
    course = steady(scraped)
    evaluate(course, {has_values(query): 1 for query in dashboard_queries()}, tmp_path)

    course |= {series: "0x60" for series in scraped if 'outcome="failed"' in series}
    bad: dict[str, str] = {}
    failed = 'image_jobs_runs_total{code="demo_failed",model="painter",outcome="failed",provider="demo"}'
    for rule, series, value, values in (
        ("ImageJobsDaemonSilent", "image_jobs_last_beat_seconds", "2x60", "5+60x60"),
        ("ImageJobsRunsFail", failed, "0x60", "0+2x60"),
        ("ImageJobsPollingTimesOut", failed.replace("demo_failed", "polling_timeout"), "0x60", "0+1x60"),
        ("ImageJobsProviderClosed", 'image_jobs_provider_closed{provider="demo",reason="paused"}', "0x60", "1x60"),
        ("ImageJobsWaitLong", 'image_jobs_oldest_waiting_seconds{provider="demo"}', "3x60", "3+60x60"),
        ("ImageJobsUploadsFail", 'image_jobs_uploads_total{result="failed"}', "0x60", "0+3x60"),
    ):
        assert series.replace("polling_timeout", "demo_failed") in scraped, rule
        course[series] = value
        bad[series] = values
    assert len(rule_names()) == len(bad) == 6
    evaluate(course, dict.fromkeys(map(firing, rule_names()), 0), tmp_path)
    evaluate({**course, **bad}, dict.fromkeys(map(firing, rule_names()), 1), tmp_path)
