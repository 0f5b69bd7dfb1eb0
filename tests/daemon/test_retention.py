"""Daemons that prune old runs and remove the files of runs that are gone."""

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.support.daemon_harness import DaemonHarness, fetch, open_harness
from tests.support.postgres import wait_until
from tests.support.runs import run_row
from tests.support.storage_gate import StorageGate


@pytest.fixture
def gate() -> StorageGate:
    return StorageGate()


@pytest.fixture
async def harness(database: str, gate: StorageGate) -> AsyncIterator[DaemonHarness]:
    async with open_harness(DaemonHarness, database, behind=gate.before) as harness:
        yield harness


async def keys(harness: DaemonHarness) -> list[str]:
    """The names of all objects, whichever bucket they are in."""
    return [row["name"] for row in await harness.db.fetch("select name from storage.objects order by name")]


async def removed(harness: DaemonHarness, run: str) -> None:
    """Wait until storage has no file of the run."""

    async def none_left() -> bool:
        return not any(run in key for key in await keys(harness))

    await wait_until(none_left, timeout=20)


async def put_off(harness: DaemonHarness) -> bool:
    """Whether a removal has been tried and waits for the next time: a lease is longer than its pause."""
    return await harness.db.fetchval(
        "select exists (select from image_jobs.file_removals where tries > 0 and due_at < now() + interval '30 s')"
    )


async def test_files_of_a_deleted_run_are_removed(harness: DaemonHarness) -> None:
    async with harness.run_daemon() as process:
        await process.started()
        deleted, kept = await harness.insert_run(), await harness.insert_run()
        row = await harness.wait_for_status(deleted, "completed")
        url = (await harness.wait_for_status(kept, "completed"))["payload"]["imageUrl"]
        await harness.db.execute("delete from runs where id = $1", deleted)
        await removed(harness, deleted)
        with pytest.raises(httpx.HTTPStatusError):
            await fetch(row["payload"]["imageUrl"])
        assert len((await fetch(url)).content) > 0
        assert await harness.db.fetchval("select count(*) from image_jobs.file_removals") == 0


async def test_files_are_removed_once_storage_is_back(harness: DaemonHarness, gate: StorageGate) -> None:
    async with harness.run_daemon() as process:
        await process.started()
        run = await harness.insert_run()
        await harness.wait_for_status(run, "completed")
        gate.allows = lambda method, _: method != "DELETE"
        await harness.db.execute("delete from runs where id = $1", run)
        await wait_until(lambda: put_off(harness), timeout=30)
        assert process.logged("files.not_removed")
        assert any(run in key for key in await keys(harness))
        gate.allows = lambda _method, _path: True
        await harness.db.execute("update image_jobs.file_removals set due_at = now()")
        await harness.db.execute("select pg_notify('image_jobs_drop', '')")
        await removed(harness, run)


async def test_old_runs_are_pruned_with_their_files(harness: DaemonHarness) -> None:
    async with harness.run_daemon() as process:
        await process.started()
        (old,) = await harness.insert_runs(1)
        shown = await harness.insert_run()
        for run in (old, shown):
            await harness.wait_for_status(run, "completed")
        await harness.db.execute("select set_config('image_jobs.writer', 'daemon', false)")
        await harness.db.execute("update runs set finished_at = finished_at - interval '8 days'")
    async with harness.run_daemon(IMAGE_JOBS_RETENTION="7") as process:
        await process.started()
        await removed(harness, old)
    assert await harness.db.fetchval("select count(*) from runs where id = $1", old) == 0
    assert (await run_row(harness.db, shown))["status"] == "completed"
    assert any(shown in key for key in await keys(harness))
