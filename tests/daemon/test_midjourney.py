"""Midjourney from the row to the grid and its quarters: real daemons, database and storage, and a fake of the proxy."""

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.midjourney_api import MidjourneyAPI
from tests.fakes.server import Response, size_of
from tests.support.daemon_harness import DaemonHarness, fetch
from tests.support.midjourney_harness import midjourney_harness, polls
from tests.support.postgres import wait_until
from tests.support.runs import run_row


@pytest.fixture
async def harness(database: str, midjourney_api: MidjourneyAPI) -> AsyncIterator[DaemonHarness]:
    async with midjourney_harness(database, midjourney_api) as harness:
        yield harness


async def sizes(urls: list[str]) -> list[tuple[int, int]]:
    """The sizes of the images at public URLs."""
    return [size_of((await fetch(url)).content) for url in urls]


async def test_run_becomes_a_grid_and_four_images(harness: DaemonHarness, midjourney_api: MidjourneyAPI) -> None:
    forming = {"status": "IN_PROGRESS", "progress": "46%", "imageUrl": f"{midjourney_api.url}/forming.png"}
    midjourney_api.stages = [{"status": "SUBMITTED"}, forming, forming, midjourney_api.done()]
    run = await harness.insert_run()
    row = await harness.wait_for_status(run, "completed")
    payload = row["payload"]

    assert await sizes([payload["imageUrl"]]) == [(128, 96)]
    assert await sizes(payload["images"]) == [(64, 48)] * 4
    assert [f"{run}.{number}.png?" in url for number, url in enumerate(payload["images"], 1)] == [True] * 4
    assert payload["originalUrl"] == f"{midjourney_api.url}/grid.png"
    assert payload["cost"] is None
    assert row["provider_job_id"] == "1000"
    (submitted,) = await harness.events(run, "submitted")
    assert submitted["data"]["request"] == {"endpoint": "mj/submit/imagine", **midjourney_api.jobs[0].fields}
    assert len(midjourney_api.jobs) == 1


async def test_preview_stays_between_two_polls(harness: DaemonHarness, midjourney_api: MidjourneyAPI) -> None:
    midjourney_api.stages = [
        {"status": "IN_PROGRESS", "progress": "46%", "imageUrl": f"{midjourney_api.url}/forming.png"}
    ]
    run = await harness.insert_run()

    async def shown() -> str | None:
        return await harness.db.fetchval(
            "select preview_url from runs where id = $1 and claimed_by is null and progress = 46", run
        )

    assert await sizes([await wait_until(shown)]) == [(32, 32)]
    midjourney_api.stages = [midjourney_api.done()]
    await harness.wait_for_status(run, "completed")


async def test_grid_and_quarters_are_adopted_after_a_lost_settlement(
    harness: DaemonHarness, midjourney_api: MidjourneyAPI
) -> None:
    run = await harness.insert_run()
    first = (await harness.wait_for_status(run, "completed"))["payload"]
    # As if the daemon had died between storage and settlement.
    await harness.db.execute("alter table runs disable trigger user")
    await harness.db.execute(
        "update runs set status = 'pending', queue_state = 'pending', attempt = 1, payload = null, provider_job_id = null, finished_at = null,"
        " due_at = now() where id = $1",
        run,
    )
    await harness.db.execute("alter table runs enable trigger user")
    again = (await harness.wait_for_status(run, "completed"))["payload"]

    assert again["images"] == first["images"]
    assert len(midjourney_api.jobs) == 1


async def test_disk_failure_polls_again_without_resubmitting(
    database: str, midjourney_api: MidjourneyAPI, tmp_path: Path
) -> None:
    midjourney_api.stages = [{"status": "IN_PROGRESS", "progress": "10%"}]
    folder = tmp_path / "pictures"
    folder.mkdir()
    async with midjourney_harness(database, midjourney_api, IMAGE_JOBS_TMP_DIR=str(folder)) as harness:
        run = await harness.insert_run()
        await harness.wait_until_parked(run)
        folder.rename(tmp_path / "elsewhere")

        async def reported() -> bool:
            row = await run_row(harness.db, run)
            return "cannot use its disk" in (row["message"] or "")

        await wait_until(reported)
        midjourney_api.stages = [midjourney_api.done()]
        folder.mkdir()
        row = await harness.wait_for_status(run, "completed")
    assert (row["attempt"], row["provider_job_id"]) == (1, "1000")
    assert len(midjourney_api.jobs) == 1


@pytest.mark.parametrize("when", ["the provider job was saved", "the proxy had responded"])
async def test_provider_job_outlives_a_killed_daemon(
    when: str, harness: DaemonHarness, midjourney_api: MidjourneyAPI
) -> None:
    midjourney_api.stages = [{"status": "IN_PROGRESS", "progress": "10%"}]
    midjourney_api.mute = when == "the proxy had responded"
    run = await harness.insert_run()
    await wait_until(lambda: midjourney_api.tasks)
    await wait_until(lambda: midjourney_api.mute or polls(midjourney_api))
    await harness.wait_for_event(run, "submitted")
    async with harness.run_daemon() as other:
        await other.started()
        harness.daemon.signal(signal.SIGKILL)
        await harness.daemon.ended()
        midjourney_api.stages = [midjourney_api.done()]
        if midjourney_api.mute:
            await harness.wait_for_event(run, "taken_over")
            await harness.make_due(run)
        row = await harness.wait_for_status(run, "completed")

    assert row["provider_job_id"] == "1000"
    assert len(row["payload"]["images"]) == 4
    assert len(midjourney_api.jobs) == 1
    assert len(await harness.events(run, "submitted")) == 1


async def test_job_of_a_broken_response_is_found_by_the_next_attempt(
    harness: DaemonHarness, midjourney_api: MidjourneyAPI
) -> None:
    midjourney_api.cut_off = True
    run = await harness.insert_run()
    await harness.wait_for_retry(run)
    await harness.make_due(run)
    row = await harness.wait_for_status(run, "completed")

    assert row["attempt"] == 2
    assert len(await harness.events(run, "unknown_outcome")) == 1
    assert len(midjourney_api.jobs) == 1
    calls = await harness.db.fetch("select state from image_jobs.calls where run_id = $1 order by id", run)
    assert [call["state"] for call in calls] == ["charged", "free"]


async def test_requeue_after_success_makes_a_new_image(harness: DaemonHarness, midjourney_api: MidjourneyAPI) -> None:
    run = await harness.insert_run()
    await harness.wait_for_status(run, "completed")
    midjourney_api.next(Response(502))
    await harness.requeue(run)
    await harness.wait_for_retry(run)
    await harness.make_due(run)
    row = await harness.wait_for_status(run, "completed")

    assert row["provider_job_id"] == "1001"
    assert len({call.fields["state"] for call in midjourney_api.jobs}) == 2
