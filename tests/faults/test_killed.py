"""Daemons killed at every point of a run: another one ends the run, once."""

import asyncio

import pytest

from tests.fakes.openai_api import hang
from tests.support.daemon_harness import fetch
from tests.support.fault_harness import FaultHarness, kill
from tests.support.postgres import wait_until
from tests.support.runs import run_row


async def test_killed_daemon_is_taken_over_with_possible_cost(harness: FaultHarness) -> None:
    harness.api.next(hang())
    async with harness.run_daemon() as one:
        await one.started()
        run = await harness.insert_run()
        await harness.wait_for_requests(1)
        async with harness.run_daemon() as two:
            await two.started()
            await harness.allow_take_over()
            await kill(one)
            row = await harness.wait_for_status(run, "completed")
            await harness.wait_until_idle()
    assert row["attempt"] == 2
    assert len(harness.api.requests) == 2
    (taken,) = await harness.event_data(run, "taken_over")
    assert taken["possibleCost"] is not None
    await harness.assert_all_end_once()


async def test_lost_session_lock_shortens_a_long_lease(harness: FaultHarness) -> None:
    harness.api.next(hang())
    async with harness.run_daemon(IMAGE_JOBS_LEASE="30") as one:
        await one.started()
        run = await harness.insert_run()
        await harness.wait_for_requests(1)
        async with harness.run_daemon(IMAGE_JOBS_LEASE="30") as two:
            await two.started()

            async def locked() -> bool:
                return await harness.db.fetchval("select bool_and(session_lock) from image_jobs.daemons")

            await wait_until(locked)
            await harness.allow_take_over()
            loop = asyncio.get_running_loop()
            killed = loop.time()
            await kill(one)
            await harness.wait_for_event(run, "taken_over")
            assert loop.time() - killed < 13  # 6 s of silence, and the beat that notices
            await harness.wait_for_status(run, "completed")
    assert len(harness.api.requests) == 2
    await harness.assert_all_end_once()


@pytest.mark.parametrize("thumbnail", [True, False])
async def test_image_stored_before_a_kill_is_adopted_with_its_payload(harness: FaultHarness, thumbnail: bool) -> None:
    harness.api.compatible = harness.api.only_urls = True
    harness.gate.closed_for = None if thumbnail else ".thumb.webp"
    harness.gate.held["GET"] = asyncio.Event()
    async with harness.run_daemon() as one:
        await one.started()
        run = await harness.insert_run()
        # It probes the public URL: the image is stored, the run is not settled.
        await wait_until(
            lambda: any(m == "GET" and "/object/public/" in path for m, path in harness.gate.requests), timeout=20
        )
        async with harness.run_daemon() as two:
            await two.started()
            await harness.allow_take_over()
            await kill(one)
            harness.gate.closed_for = None
            harness.gate.held.pop("GET").set()
            row = await harness.wait_for_status(run, "completed")
    assert len(harness.api.requests) == 1
    assert harness.gate.uploads(run) == 1
    payload = row["payload"]
    assert payload["originalUrl"] == f"{harness.api.url}/files/picture.png"
    assert payload["revisedPrompt"] == "As it was drawn"
    assert len((await fetch(payload["imageUrl"])).content) == payload["bytes"]
    assert (payload["thumbnailUrl"] is not None) == thumbnail
    assert (await harness.event_names(run)).count("generated") == 1
    assert "adopted" in await harness.event_names(run)
    await harness.assert_all_end_once()


async def test_parked_runs_of_a_killed_daemon_are_not_resubmitted(
    harness: FaultHarness,
) -> None:
    async with harness.run_daemon() as one:
        await one.started()
        runs = await harness.insert_runs(
            5, "demo:painter", demo={"submit": 3}, prompt={"basePrompt": "a", "size": "64x64"}
        )

        async def parked() -> bool:
            return await harness.db.fetchval("select bool_and(provider_job_id is not null) from runs")

        await wait_until(parked, timeout=20)
        await kill(one)
    async with harness.run_daemon(IMAGE_JOBS_POLL_INTERVAL="0.3") as two:
        await two.started()
        await harness.assert_all_end_once()
    for run in runs:
        assert (await harness.event_names(run)).count("submitted") == 1
        assert (await run_row(harness.db, run))["status"] == "completed"


async def test_successor_takes_over_a_daemon_that_died_alone(harness: FaultHarness) -> None:
    harness.api.next(hang())
    async with harness.run_daemon() as one:
        await one.started()
        run = await harness.insert_run()
        await harness.wait_for_requests(1)
        await kill(one)
    async with harness.run_daemon() as two:
        await two.started()
        await harness.wait_for_status(run, "completed")
    assert len(harness.api.requests) == 2
    await harness.assert_all_end_once()


async def test_run_fails_after_three_silent_holders(harness: FaultHarness) -> None:
    harness.api.next(hang(), hang(), hang())
    run = await harness.insert_run()
    async with harness.run_daemon() as process:
        await process.started()
        for attempt in (1, 2, 3):
            await harness.wait_for_requests(attempt)
            holder = await harness.claimed_by(run)
            # The death of its holder, as others see it: silent for longer than its lease.
            await harness.db.execute(
                "update image_jobs.daemons set ended_at = now(), ended = 'taken over' where id = $1", holder
            )
            await harness.db.execute("update image_jobs.daemons set fresh_since = fresh_since - interval '1 day'")

            async def taken_over(attempt: int = attempt) -> bool:
                return len(await harness.event_data(run, "taken_over")) == attempt

            await wait_until(taken_over)
            await harness.db.execute("update runs set due_at = now() where status = 'pending'")
        row = await harness.wait_for_status(run, "failed")
        await harness.wait_until_idle()
    assert row["payload"]["code"] == "outcome_unknown"
    await harness.assert_all_end_once()
