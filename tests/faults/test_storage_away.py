"""Storage failures, brief and lasting: an image that was paid for is not made again by itself."""

import asyncio

import pytest
from starlette.responses import HTMLResponse

from tests.support.daemon_harness import fetch
from tests.support.fault_harness import FaultHarness
from tests.support.postgres import wait_until
from tests.support.runs import run_row


@pytest.mark.parametrize("fault", ["refuses", "hangs", "breaks off"])
async def test_brief_storage_failure_costs_no_second_image(harness: FaultHarness, fault: str) -> None:
    async with harness.run_daemon() as it:
        await harness.ready(it)
        match fault:
            case "refuses":
                harness.gate.closed = True
            case "hangs":
                harness.gate.held["POST"] = asyncio.Event()
            case _:
                harness.gate.cuts = 2
        run = await harness.insert_run()
        await wait_until(lambda: harness.gate.uploads(run), timeout=20)
        harness.gate.closed = False
        if event := harness.gate.held.pop("POST", None):
            event.set()
        row = await harness.wait_for_status(run, "completed")
        await harness.assert_all_end_once()
    assert len(harness.api.requests) == 1
    assert (await harness.event_names(run)).count("generated") == 1
    assert len((await fetch(row["payload"]["imageUrl"])).content) == row["payload"]["bytes"]


async def test_object_store_away_costs_no_picture_and_no_call(harness: FaultHarness) -> None:
    harness.gate.error = lambda: HTMLResponse("<html>We will be back soon</html>")
    async with harness.run_daemon(IMAGE_JOBS_CONCURRENCY="1") as it:
        await harness.ready(it)
        harness.gate.take_no_uploads()
        first, second = await harness.insert_run(), await harness.insert_run()
        # More than three tries of the upload itself, and the second run is not begun.
        await wait_until(lambda: harness.gate.uploads(first) + harness.gate.uploads(second) > 3, timeout=30)
        assert len(harness.api.requests) == 1
        assert sorted([(await run_row(harness.db, run))["status"] for run in (first, second)]) == ["pending", "running"]
        harness.gate.take_uploads()
        for run in (first, second):
            row = await harness.wait_for_status(run, "completed")
            assert row["attempt"] == 1
        await harness.assert_all_end_once()
    assert len(harness.api.requests) == 2
    assert len(it.logged("storage.closed")) == 1
    assert len(it.logged("storage.opened")) == 1


@pytest.mark.parametrize("fault", ["no uploads", "key", "bucket"])
async def test_nothing_is_ordered_before_storage_takes_uploads(harness: FaultHarness, fault: str) -> None:
    settings: dict[str, str] = {}
    match fault:
        case "no uploads":
            harness.gate.take_no_uploads()
        case "key":
            settings["SUPABASE_SERVICE_ROLE_KEY"] = harness.project.keys.anon_key
        case _:
            settings["IMAGE_JOBS_BUCKET"] = "pictures"
    async with harness.run_daemon(**settings) as it:
        await it.started()
        run = await harness.insert_run()
        (closed,) = await wait_until(lambda: it.logged("storage.closed"), timeout=20)
        assert closed["cure"]
        await wait_until(lambda: harness.gate.probes > (fault == "no uploads"), timeout=20)
        await asyncio.sleep(1.5)  # longer than an idle daemon waits between two looks at the queue
        row = await run_row(harness.db, run)
        assert (row["status"], row["attempt"], harness.api.requests) == ("pending", 0, [])
        if fault == "key":
            assert "anon key" in closed["reason"]
            return
        harness.gate.take_uploads()
        if fault == "bucket":
            await harness.db.execute("select image_jobs.set_up('pictures')")
        await harness.wait_for_status(run, "completed")
        assert len(it.logged("storage.closed")) == 1


async def test_cancelling_ends_the_wait_for_storage(harness: FaultHarness) -> None:
    async with harness.run_daemon() as it:
        await harness.ready(it)
        harness.gate.closed = True
        run = await harness.insert_run()
        await wait_until(lambda: harness.gate.uploads(run) > 1, timeout=30)
        await harness.cancel(run)
        await harness.wait_until_idle()
        await harness.assert_all_end_once()
        tried = harness.gate.uploads(run)
    assert tried == harness.gate.uploads(run) <= 3


async def test_final_storage_refusal_fails_the_run_with_its_cost(harness: FaultHarness) -> None:
    harness.gate.error = lambda: HTMLResponse("<html>413 Request Entity Too Large</html>", 413)
    async with harness.run_daemon() as it:
        await harness.ready(it)
        harness.gate.closed_for = ".png"
        run = await harness.insert_run()
        row = await harness.wait_for_status(run, "failed")
        assert row["payload"]["code"] == "storage_too_large"
        assert "gateway" in row["payload"]["error"]
        assert "bucket" not in str(row["payload"])
        assert row["attempt"] == 1
        assert len(harness.api.requests) == 1
        assert harness.gate.uploads(run) == 1
        (generated,) = await harness.event_data(run, "generated")
        assert generated["cost"] > 0
        await harness.assert_all_end_once()

        harness.gate.closed_for = None
        await harness.requeue(run)
        await harness.wait_for_status(run, "completed")
        await harness.assert_all_end_once()
        await harness.wait_until_idle()
    costs = await harness.db.fetchrow("select images, cost from image_jobs.run_costs")
    assert costs is not None
    assert costs["images"] == len(harness.api.requests)
    assert float(costs["cost"]) == pytest.approx(2 * generated["cost"])


async def test_image_is_kept_without_its_thumbnail(harness: FaultHarness) -> None:
    harness.gate.closed_for = ".thumb.webp"
    async with harness.run_daemon() as it:
        await it.started()
        run = await harness.insert_run()
        row = await harness.wait_for_status(run, "completed")
        assert row["payload"]["thumbnailUrl"] is None
        assert len((await fetch(row["payload"]["imageUrl"])).content) == row["payload"]["bytes"]
        assert "no thumbnail" in str(
            await harness.db.fetchval("select payload from run_events where payload ->> 'event' = 'warning'")
        )
        await harness.assert_all_end_once()
