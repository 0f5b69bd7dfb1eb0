"""Pictures that cost a decoder much: they cost their own run, and no other, whatever becomes of its child."""

import asyncio
import signal
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from daemon.storage.client import Storage
from tests.support.daemons import Daemon
from tests.support.fault_harness import FaultHarness, kill
from tests.support.memory_limit import memory_limit
from tests.support.pictures import jpeg_of_scans, png_of_black
from tests.support.postgres import wait_until

TINY = {"size": "64x64"}
BOMBS = {
    "many scans": jpeg_of_scans(10_000),
    "many pixels": png_of_black((12_000, 12_000)),
    "slow": jpeg_of_scans(99, (4400, 4400)),
}
SLOW = jpeg_of_scans(60)
"""Seconds of decoding, and a picture all the same."""
LIMIT = 512_000_000


def decoders(process: int) -> list[psutil.Process]:
    """The living children of a daemon that decode."""
    found: list[psutil.Process] = []
    for child in psutil.Process(process).children():
        with suppress(psutil.NoSuchProcess):
            if "daemon.images.child" in child.cmdline():
                found.append(child)
    return found


async def upload(harness: FaultHarness, folder: Path, data: bytes) -> str:
    """Put a picture into storage; return its address."""
    file = folder / "upload"
    await asyncio.to_thread(file.write_bytes, data)
    async with Storage(harness.project.url, harness.project.keys.service_role_key, bucket="images") as storage:
        key = f"{uuid4()}/source.png"
        await storage.upload(key, file, content_type="image/png")
        return await storage.object_url(key, "0")


async def watch_memory(process: int, peak: list[int]) -> None:
    """Keep the largest sum of memory of a process and its children, until cancelled."""
    while True:
        total = 0
        for each in [psutil.Process(process), *decoders(process)]:
            with suppress(psutil.NoSuchProcess):
                total += each.memory_info().rss
        peak[0] = max(peak[0], total)
        await asyncio.sleep(0.02)


@pytest.mark.one_postgres
async def test_bombs_stop_no_ordinary_run(harness: FaultHarness, tmp_path: Path) -> None:
    """The whole tree lives in `LIMIT`: by a cgroup, which kills what needs more, where this machine lets us make one; else only
    its resident memory is looked at, since a child's RLIMIT_AS bounds addresses, and each process alone."""
    peak = [0]
    with memory_limit(LIMIT) as limit:
        async with harness.run_daemon(IMAGE_JOBS_CONCURRENCY="12") as it:
            if limit is not None:
                limit.add(it.process.pid)
            await assert_bombs_cost_their_own_runs(harness, it, tmp_path, peak)
        used = limit and limit.peak
    print(f"bombs: {peak[0] / 1e6:.0f} MB resident, cgroup: {used and used / 1e6}")  # noqa: T201 - for the note
    assert 0 < peak[0] < LIMIT


async def assert_bombs_cost_their_own_runs(harness: FaultHarness, it: Daemon, tmp_path: Path, peak: list[int]) -> None:
    await it.started()
    watching = asyncio.create_task(watch_memory(it.process.pid, peak))
    refused = [
        await harness.insert_run("demo:painter", prompt={"previousImage": await upload(harness, tmp_path, bomb)})
        for bomb in BOMBS.values()
    ]
    ordinary = await harness.insert_runs(8, "demo:painter", prompt=TINY)
    for run in ordinary:
        await harness.wait_for_status(run, "completed", timeout=40)
    for run in refused:
        row = await harness.wait_for_status(run, "failed", timeout=40)
        assert row["payload"]["code"] == "input_image_invalid"
        assert row["payload"]["error"].startswith("promptSpec.previousImage cannot be used: ")
        assert row["attempt"] == 1
    it.signal(signal.SIGTERM)
    assert await it.ended() == 0
    watching.cancel()


@pytest.mark.one_postgres
async def test_killed_decoder_costs_its_run_no_attempt(harness: FaultHarness, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    source = await upload(harness, tmp_path, SLOW)
    async with harness.run_daemon(IMAGE_JOBS_TMP_DIR=str(folder)) as it:
        await it.started()
        run = await harness.insert_run("demo:painter", prompt={**TINY, "previousImage": source})
        (child,) = await wait_until(lambda: decoders(it.process.pid))
        child.kill()
        row = await harness.wait_for_status(run, "completed", timeout=40)
        assert row["attempt"] == 1

        again = await harness.insert_run("demo:painter", prompt={**TINY, "previousImage": source})

        def decoding() -> psutil.Process | None:
            return next((each for each in decoders(it.process.pid) if each.cpu_percent(0.1) > 5), None)

        child = await wait_until(decoding)
        await kill(it)
        await wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
        assert list(folder.iterdir()) != []
    await harness.cancel(again)
    async with harness.run_daemon(IMAGE_JOBS_TMP_DIR=str(folder)) as it:
        await it.started()
        assert list(folder.iterdir()) == []
