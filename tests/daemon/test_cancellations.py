"""Cancellation of provider jobs after their runs were cancelled or requeued: whole daemons, and a fake of a proxy."""

import signal
from collections.abc import AsyncIterator

import pytest

from tests.fakes.midjourney_api import MidjourneyAPI
from tests.fakes.server import Response
from tests.support.daemon_harness import DaemonHarness
from tests.support.midjourney_harness import cancels, midjourney_harness
from tests.support.postgres import wait_until
from tests.support.runs import run_row

SECRET = "a webhook secret of these tests"


@pytest.fixture
async def harness(database: str, midjourney_api: MidjourneyAPI) -> AsyncIterator[DaemonHarness]:
    """A daemon that waits for webhooks, of which none comes by itself."""
    midjourney_api.stages = [{"status": "IN_PROGRESS", "progress": "10%"}]
    async with midjourney_harness(database, midjourney_api, WEBHOOK_SECRET=SECRET) as harness:
        yield harness


async def test_cancelling_a_parked_run_cancels_its_provider_job(
    harness: DaemonHarness, midjourney_api: MidjourneyAPI
) -> None:
    run = await harness.insert_run()
    await harness.wait_until_parked(run)
    await harness.cancel(run)
    await wait_until(lambda: cancels(midjourney_api) == ["/mj/task/1000/cancel"])
    await harness.wait_for_event(run, "provider_job_cancelled")
    assert (await run_row(harness.db, run))["status"] == "cancelled"
    assert await harness.db.fetchval("select count(*) from image_jobs.cancellations") == 0


async def test_cancelling_during_submit_cancels_the_provider_job(
    harness: DaemonHarness, midjourney_api: MidjourneyAPI
) -> None:
    go = midjourney_api.hold()
    run = await harness.insert_run()
    await wait_until(lambda: midjourney_api.jobs, timeout=20)
    await harness.cancel(run)
    await harness.wait_for_event(run, "cancelled")
    go.set()
    await wait_until(lambda: cancels(midjourney_api) == ["/mj/task/1000/cancel"])
    await harness.wait_for_event(run, "provider_job_cancelled")
    assert (await run_row(harness.db, run))["status"] == "cancelled"
    assert await harness.events(run, "unknown_outcome") == []


async def test_requeue_cancels_the_provider_job_and_resubmits(
    harness: DaemonHarness, midjourney_api: MidjourneyAPI
) -> None:
    run = await harness.insert_run()
    await harness.wait_until_parked(run)
    await harness.requeue(run)
    await wait_until(lambda: len(midjourney_api.jobs) == 2)
    await wait_until(lambda: cancels(midjourney_api) == ["/mj/task/1000/cancel"])
    assert (await harness.wait_until_parked(run))["provider_job_id"] == "1001"
    await midjourney_api.happen("1001", **midjourney_api.done())
    await harness.wait_for_status(run, "completed")


async def test_failed_cancellation_is_retried(harness: DaemonHarness, midjourney_api: MidjourneyAPI) -> None:
    run = await harness.insert_run()
    await harness.wait_until_parked(run)
    midjourney_api.next(Response(503))
    await harness.cancel(run)
    await wait_until(lambda: cancels(midjourney_api))

    async def retry_is_due() -> bool:
        return await harness.db.fetchval(
            "select tries = 1 and due_at < now() + interval '11 s' from image_jobs.cancellations"
        )

    await wait_until(retry_is_due)
    await harness.db.execute("update image_jobs.cancellations set due_at = now()")
    await harness.wait_for_event(run, "provider_job_cancelled")
    assert len(cancels(midjourney_api)) == 2


async def test_cancellation_outlives_its_daemon(harness: DaemonHarness, midjourney_api: MidjourneyAPI) -> None:
    run = await harness.insert_run()
    await harness.wait_until_parked(run)
    midjourney_api.hold()
    await harness.cancel(run)
    await wait_until(lambda: cancels(midjourney_api))
    harness.daemon.signal(signal.SIGKILL)
    await harness.daemon.ended()
    await harness.db.execute("update image_jobs.cancellations set due_at = now()")  # its lease is over
    async with harness.run_daemon() as other:
        await other.started()
        await harness.wait_for_event(run, "provider_job_cancelled")
    assert len(cancels(midjourney_api)) == 2
