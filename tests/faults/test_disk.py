"""Failures of the daemon's own disk (full, unwritable, gone): no image is paid twice in silence, no run is lost.

A file size limit stands for a full disk: a write beyond it fails with the same OSError, for root too.
"""

import asyncio
import random
import resource
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from tests.fakes.openai_api import held
from tests.support.daemon_harness import fetch
from tests.support.daemons import Daemon
from tests.support.fault_harness import FaultHarness
from tests.support.postgres import wait_until
from tests.support.runs import run_row


def limit_file_size(process: Daemon, size: int = resource.RLIM_INFINITY) -> None:
    """Let the daemon's files grow to `size` bytes and no further."""
    resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def noise(edge: int) -> bytes:
    """A black and white PNG of noise: its thumbnail is larger than itself."""
    file = BytesIO()
    Image.frombytes("1", (edge, edge), random.Random(1).randbytes(edge * edge // 8)).save(file, "PNG")
    return file.getvalue()


async def first_retry(harness: FaultHarness, run: str) -> dict[str, Any]:
    """Wait until the run has been put off. Returns the data of the event."""
    return (await harness.wait_for_event(run, "retry"))[0]["data"]


async def test_missing_tmp_dir_costs_no_money_and_no_attempt(harness: FaultHarness, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    async with harness.run_daemon(IMAGE_JOBS_TMP_DIR=str(folder)) as it:
        await it.started()
        folder.rmdir()
        run = await harness.insert_run()
        retry = await first_retry(harness, run)
        assert retry["code"] == "storage_disk"
        assert "IMAGE_JOBS_TMP_DIR" in str(retry["hint"])
        row = await run_row(harness.db, run)
        assert row["attempt"] == 0
        assert "No such file or directory" in row["message"]
        assert str(folder) not in str(dict(row))
        assert harness.api.requests == []
        assert it.logged("run.crashed") == []

        folder.mkdir()
        row = await harness.wait_for_status(run, "completed")
        await harness.assert_all_end_once()
    assert row["attempt"] == 1
    assert len(harness.api.requests) == 1


async def test_full_disk_before_the_call_costs_no_attempt(harness: FaultHarness) -> None:
    async with harness.run_daemon() as it:
        await it.started()
        first = await harness.insert_run()
        url = (await harness.wait_for_status(first, "completed"))["payload"]["imageUrl"]
        limit_file_size(it, 100)
        run = await harness.insert_run(prompt={"previousImage": url})
        assert (await first_retry(harness, run))["code"] == "storage_disk"
        assert (await run_row(harness.db, run))["attempt"] == 0
        assert len(harness.api.requests) == 1

        limit_file_size(it)
        await harness.wait_for_status(run, "completed")
        await harness.assert_all_end_once()
    assert len(harness.api.requests) == 2


async def test_full_disk_before_the_call_costs_no_call(harness: FaultHarness) -> None:
    async with harness.run_daemon(IMAGE_JOBS_CONCURRENCY="2") as it:
        await harness.ready(it)
        limit_file_size(it, 100)
        runs = [await harness.insert_run() for _ in range(4)]
        (short,) = await wait_until(lambda: it.logged("room.short"), timeout=20)
        assert "IMAGE_JOBS_TMP_DIR" in short["cure"]
        await harness.wait_until_idle()
        await asyncio.sleep(2.5)  # a daemon that went on claiming would have taken those that wait
        waiting = [await run_row(harness.db, run) for run in runs]
        assert [(row["status"], row["attempt"]) for row in waiting] == [("pending", 0)] * 4
        claimed = [await harness.events(run, "claimed") for run in runs]
        assert sum(map(len, claimed)) <= 2
        assert harness.api.requests == []
        limit_file_size(it)
        for run in runs:
            await harness.wait_for_status(run, "completed")
        await harness.assert_all_end_once()
    assert len(harness.api.requests) == 4
    assert len(it.logged("room.short")) == 1


async def test_full_disk_during_the_call_is_an_unknown_outcome(harness: FaultHarness) -> None:
    go = asyncio.Event()
    harness.api.next(held(go))
    async with harness.run_daemon() as it:
        await harness.ready(it)
        run = await harness.insert_run()
        await harness.wait_for_requests(1)
        limit_file_size(it, 100)
        go.set()
        retry = await first_retry(harness, run)
        assert retry["code"] == "storage_disk"
        assert "may have been paid" in str(retry["hint"])
        limit_file_size(it)
        row = await harness.wait_for_status(run, "completed")
        await harness.assert_all_end_once()
    (unknown,) = await harness.event_data(run, "unknown_outcome")
    assert unknown["possibleCost"] > 0
    assert row["attempt"] == 2
    assert len(harness.api.requests) == 2


async def test_thumbnail_is_left_out_on_a_full_disk(harness: FaultHarness) -> None:
    harness.api.picture = noise(512)
    go = asyncio.Event()
    harness.api.next(held(go))
    async with harness.run_daemon() as it:
        await harness.ready(it)
        run = await harness.insert_run()
        await harness.wait_for_requests(1)
        limit_file_size(it, len(harness.api.picture))
        go.set()
        row = await harness.wait_for_status(run, "completed")
        await harness.assert_all_end_once()
    assert row["payload"]["thumbnailUrl"] is None
    assert (await fetch(row["payload"]["imageUrl"])).content == harness.api.picture
    (warning,) = await harness.event_data(run, "warning")
    assert warning == {"field": "thumbnailUrl"}
    assert len(harness.api.requests) == 1


FEW_FILES = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, (90, 90))
runpy.run_module("daemon", run_name="__main__", alter_sys=True)
"""


async def test_few_file_descriptors_cost_no_picture(harness: FaultHarness) -> None:
    async with harness.run_daemon(program=("-c", FEW_FILES), IMAGE_JOBS_CONCURRENCY="24") as it:
        await it.started()
        (few,) = it.logged("files.few")
        assert few["limit"] == 90 < few["wanted"]
        assert "IMAGE_JOBS_CONCURRENCY" in few["cure"]
        runs = await harness.insert_runs(24)
        for run in runs:
            await harness.wait_for_status(run, "completed", timeout=60)
        await harness.assert_all_end_once()
    assert len(harness.api.requests) == 24
