"""The daemon's own disk fails: full, unwritable, gone. Nothing is paid for twice in silence, and no run is lost.

A file size limit stands for a full disk: what is written beyond it fails with an OSError just so, for root too.
"""

import random
import resource
from io import BytesIO
from pathlib import Path

from PIL import Image

from tests.daemons import Daemon
from tests.faults.world import World
from tests.postgres import wait_until
from tests.runs import event_names, run_row


def leave_room(it: Daemon, size: int = resource.RLIM_INFINITY) -> None:
    """Files of the daemon may grow to `size` bytes from now on."""
    resource.prlimit(it.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def noise(edge: int) -> bytes:
    """A black and white PNG that is small for its many details: its thumbnail is larger than itself."""
    file = BytesIO()
    Image.frombytes("1", (edge, edge), random.Random(1).randbytes(edge * edge // 8)).save(file, "PNG")
    return file.getvalue()


async def put_off(world: World, run: str) -> dict[str, object]:
    """Waits until the run has been put off once; answers the event's data."""

    async def waits() -> bool:
        return "retry" in await event_names(world.db, run)

    await wait_until(waits, timeout=20)
    return (await world.events(run, "retry"))[0]


async def test_a_temporary_directory_that_is_gone_costs_neither_money_nor_an_attempt(
    world: World, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    async with world.daemon(IMAGE_JOBS_TMP_DIR=str(folder)) as it:
        await it.started()
        folder.rmdir()
        (run,) = await world.order()
        retry = await put_off(world, run)
        assert retry["code"] == "storage_disk"
        assert "IMAGE_JOBS_TMP_DIR" in str(retry["hint"])
        row = await run_row(world.db, run)
        assert row["attempt"] == 0
        assert "No such file or directory" in row["message"]
        assert str(folder) not in str(dict(row))
        assert world.api.requests == []
        assert it.logged("run.crashed") == []

        folder.mkdir()
        row = await world.until(run, "completed")
        await world.all_ended_once()
    assert row["attempt"] == 1
    assert len(world.api.requests) == 1


async def test_an_image_to_refine_that_does_not_fit_costs_neither_money_nor_an_attempt(world: World) -> None:
    async with world.daemon() as it:
        await it.started()
        (first,) = await world.order()
        url = (await world.until(first, "completed"))["payload"]["imageUrl"]
        leave_room(it, 100)
        (run,) = await world.order(promptSpec={"basePrompt": "a red fox", "previousImage": url})
        assert (await put_off(world, run))["code"] == "storage_disk"
        assert (await run_row(world.db, run))["attempt"] == 0
        assert len(world.api.requests) == 1

        leave_room(it)
        await world.until(run, "completed")
        await world.all_ended_once()
    assert len(world.api.requests) == 2


async def test_an_answer_that_does_not_fit_is_an_unknown_outcome_with_its_possible_cost(world: World) -> None:
    async with world.daemon() as it:
        await it.started()
        leave_room(it, 100)
        (run,) = await world.order()
        retry = await put_off(world, run)
        assert retry["code"] == "storage_disk"
        assert "may have been paid" in str(retry["hint"])
        leave_room(it)
        row = await world.until(run, "completed")
        await world.all_ended_once()
    (unknown,) = await world.events(run, "unknown_outcome")
    assert unknown["possibleCost"] > 0
    assert row["attempt"] == 2
    assert len(world.api.requests) == 2


async def test_a_thumbnail_that_does_not_fit_is_left_out(world: World) -> None:
    world.api.picture = noise(512)
    async with world.daemon() as it:
        await it.started()
        leave_room(it, len(world.api.picture))
        (run,) = await world.order()
        row = await world.until(run, "completed")
        await world.all_ended_once()
    assert row["payload"]["thumbnailUrl"] is None
    assert await world.fetched(row["payload"]["imageUrl"]) == world.api.picture
    (warning,) = await world.events(run, "warning")
    assert warning == {"field": "thumbnailUrl"}
    assert len(world.api.requests) == 1
