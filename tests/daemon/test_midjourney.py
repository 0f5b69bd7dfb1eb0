"""Midjourney from the row to the grid and its quarters: real daemons, database and storage, and a fake of the proxy."""

import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from tests.daemons import daemon
from tests.fakes.midjourney_api import KEY, MidjourneyAPI
from tests.fakes.openai_api import OpenAIAPI
from tests.fakes.server import Answer, size_of
from tests.openai_studio import Studio, open_studio
from tests.postgres import wait_until
from tests.runs import insert_run, run_row

STORY = ["created", "claimed", "submitted", "generated", "stored", "completed"]


@pytest.fixture
async def api() -> AsyncIterator[MidjourneyAPI]:
    async with MidjourneyAPI() as api:
        api.reset()  # it knows its address by now
        yield api


@pytest.fixture
def environment(api: MidjourneyAPI) -> dict[str, str]:
    return {
        "MIDJOURNEY_API_URL": api.url,
        "MIDJOURNEY_API_KEY": KEY,
        "IMAGE_JOBS_LEASE": "2",
        "IMAGE_JOBS_POLL_INTERVAL": "0.2",
    }


@pytest.fixture
async def studio(database: str, environment: dict[str, str]) -> AsyncIterator[Studio]:
    async with open_studio(database, OpenAIAPI(), **environment) as studio:
        yield studio
        rows = await studio.db.fetch(
            "select to_jsonb(r) as row from runs r union all select to_jsonb(e) from run_events e"
        )
        assert KEY not in json.dumps([row["row"] for row in rows]) + "\n".join(studio.daemon.raw)


async def order(studio: Studio) -> str:
    """Inserts a run; answers its id."""
    return await insert_run(studio.db, processor="midjourney:v7", workflow=uuid4())


async def sizes(urls: list[str]) -> list[tuple[int, int]]:
    """Fetches pictures as anybody may."""
    async with httpx.AsyncClient() as client:
        return [size_of((await client.get(url)).content) for url in urls]


async def test_a_run_becomes_a_grid_and_its_four_pictures(studio: Studio, api: MidjourneyAPI) -> None:
    forming = {"status": "IN_PROGRESS", "progress": "46%", "imageUrl": f"{api.url}/forming.png"}
    api.stages = [{"status": "SUBMITTED"}, forming, forming, api.done()]
    run = await order(studio)
    row = await studio.until(run, "completed")
    payload = row["payload"]

    assert await sizes([payload["imageUrl"]]) == [(128, 96)]
    assert await sizes(payload["images"]) == [(64, 48)] * 4
    assert [f"{run}.{number}.png?" in url for number, url in enumerate(payload["images"], 1)] == [True] * 4
    assert payload["originalUrl"] == f"{api.url}/grid.png"
    assert payload["cost"] is None
    assert row["provider_job_id"] == "1000"
    (submitted,) = await studio.events(run, "submitted")
    assert submitted["data"]["request"] == {"endpoint": "mj/submit/imagine", **api.orders[0].fields}
    assert len(api.orders) == 1


async def test_the_forming_picture_stays_on_display_between_two_questions(studio: Studio, api: MidjourneyAPI) -> None:
    api.stages = [{"status": "IN_PROGRESS", "progress": "46%", "imageUrl": f"{api.url}/forming.png"}]
    run = await order(studio)

    async def shown() -> str | None:
        return await studio.db.fetchval(
            "select preview_url from runs where id = $1 and claimed_by is null and progress = 46", run
        )

    assert await sizes([await wait_until(shown)]) == [(32, 32)]
    api.stages = [api.done()]
    await studio.until(run, "completed")


async def test_pictures_whose_settlement_was_lost_are_adopted_with_the_quarters(
    studio: Studio, api: MidjourneyAPI
) -> None:
    run = await order(studio)
    first = (await studio.until(run, "completed"))["payload"]
    # As if the daemon had died between storage and settlement.
    await studio.db.execute("alter table runs disable trigger user")
    await studio.db.execute(
        "update runs set status = 'pending', attempt = 1, payload = null, provider_job_id = null, finished_at = null,"
        " due_at = now() where id = $1",
        run,
    )
    await studio.db.execute("alter table runs enable trigger user")
    again = (await studio.until(run, "completed"))["payload"]

    assert again["images"] == first["images"]
    assert len(api.orders) == 1


async def test_without_a_disk_the_order_is_asked_about_again_and_not_made_anew(
    database: str, environment: dict[str, str], api: MidjourneyAPI, tmp_path: Path
) -> None:
    api.stages = [{"status": "IN_PROGRESS", "progress": "10%"}]
    folder = tmp_path / "pictures"
    folder.mkdir()
    async with open_studio(database, OpenAIAPI(), **environment, IMAGE_JOBS_TMP_DIR=str(folder)) as studio:
        run = await order(studio)

        async def parked() -> bool:
            return await studio.db.fetchval("select provider_job_id is not null from runs where id = $1", run)

        await wait_until(parked)
        folder.rename(tmp_path / "elsewhere")

        async def told() -> bool:
            row = await run_row(studio.db, run)
            return "cannot use its disk" in (row["message"] or "")

        await wait_until(told)
        api.stages = [api.done()]
        folder.mkdir()
        row = await studio.until(run, "completed")
    assert (row["attempt"], row["provider_job_id"]) == (1, "1000")
    assert len(api.orders) == 1


@pytest.mark.parametrize("when", ["the order was written down", "the proxy had answered"])
async def test_a_daemon_is_killed_after_it_ordered_and_another_fetches_the_same_order(
    when: str, studio: Studio, api: MidjourneyAPI, environment: dict[str, str]
) -> None:
    api.stages = [{"status": "IN_PROGRESS", "progress": "10%"}]
    api.mute = when == "the proxy had answered"
    run = await order(studio)
    await wait_until(lambda: api.tasks)

    async def asked() -> bool:
        return api.mute or any(call.path.endswith("/fetch") for call in api.requests)

    await wait_until(asked)
    await wait_until(lambda: studio.events(run, "submitted"))
    async with daemon(studio.project, **environment) as other:
        await other.started()
        studio.daemon.signal(signal.SIGKILL)
        await studio.daemon.ended()
        api.stages = [api.done()]
        if api.mute:
            await wait_until(lambda: studio.events(run, "taken_over"), timeout=20)
            await studio.hurry(run)
        row = await studio.until(run, "completed")

    assert row["provider_job_id"] == "1000"
    assert len(row["payload"]["images"]) == 4
    assert len(api.orders) == 1
    assert len(await studio.events(run, "submitted")) == 1


async def test_an_order_whose_answer_breaks_off_is_found_by_the_next_attempt(
    studio: Studio, api: MidjourneyAPI
) -> None:
    api.cut_off = True
    run = await order(studio)
    await studio.put_off(run)
    await studio.hurry(run)
    row = await studio.until(run, "completed")

    assert row["attempt"] == 2
    assert len(await studio.events(run, "unknown_outcome")) == 1
    assert len(api.orders) == 1


async def test_a_requeue_after_success_asks_for_a_new_picture(studio: Studio, api: MidjourneyAPI) -> None:
    run = await order(studio)
    await studio.until(run, "completed")
    api.next(Answer(502))
    await studio.db.execute("update runs set status = 'pending' where id = $1", run)
    await studio.put_off(run)
    await studio.hurry(run)
    row = await studio.until(run, "completed")

    assert row["provider_job_id"] == "1001"
    assert len({call.fields["state"] for call in api.orders}) == 2
