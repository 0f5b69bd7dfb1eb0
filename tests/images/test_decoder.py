"""The daemon's side of the children: they are killed, run out of time and memory, and die with the daemon."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from daemon.images.decoder import Decoder, DecoderKilled
from daemon.images.jobs import Decoded, Job, NoImage, TooLarge
from daemon.images.memory import CHILD
from daemon.images.process import Child, ChildDied
from tests.support.pictures import jpeg_of_scans, noise, png_of_black
from tests.support.postgres import ROOT, wait_until

ENDLESS = jpeg_of_scans(90)
"""A JPEG that takes seconds, and is no bomb by its scans."""


def children_of(process: int) -> list[psutil.Process]:
    """The decoding children of a process."""
    found: list[psutil.Process] = []
    for child in psutil.Process(process).children():
        with suppress(psutil.NoSuchProcess):
            if "daemon.images.child" in child.cmdline():
                found.append(child)
    return found


def mine() -> list[psutil.Process]:
    return children_of(os.getpid())


@pytest.fixture
async def decoder() -> AsyncIterator[Decoder]:
    async with Decoder(2) as decoder:
        yield decoder
    assert mine() == []


@pytest.fixture
def good(tmp_path: Path) -> Job:
    return job(tmp_path, noise())


@pytest.fixture
def endless(tmp_path: Path) -> Job:
    return job(tmp_path, ENDLESS)


def job(folder: Path, data: bytes, *, cpu_seconds: int = 20) -> Job:
    """A job for a file with those bytes."""
    handle, name = tempfile.mkstemp(dir=folder)
    os.write(handle, data)
    os.close(handle)
    return Job(name, 50_000_000, 20_000_000, cpu_seconds, thumbnail=f"{name}.webp")


async def under_way(decoder: Decoder, job: Job, **options: bool) -> "asyncio.Task[Decoded | NoImage | TooLarge]":
    """Start a job, and return once its child is at work."""
    task = asyncio.create_task(decoder.decode(job, wall_seconds=60, **options))

    def working() -> bool:
        return task.done() or any(child.cpu_times().user > 0.4 for child in mine())

    await wait_until(working)
    assert not task.done()
    return task


async def test_children_are_small_and_get_no_keys(monkeypatch: pytest.MonkeyPatch, good: Job) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    async with Decoder(1) as decoder:
        assert isinstance(await decoder.decode(good, wall_seconds=60), Decoded)
        (child,) = mine()
        assert "sk-secret" not in str(child.environ())
        assert child.memory_info().rss < 45e6


def test_children_import_pillow_alone() -> None:
    program = "import daemon.images.child, sys; print({name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert not set(re.findall(r"\w+", loaded)) & {"asyncio", "asyncpg", "pydantic", "httpx", "structlog", "ssl"}


async def test_last_child_is_left_for_paid_pictures(decoder: Decoder, good: Job, endless: Job) -> None:
    first = await under_way(decoder, endless)
    second = asyncio.create_task(decoder.decode(good, wall_seconds=60))
    assert isinstance(await decoder.decode(good, wall_seconds=60, paid=True), Decoded)
    assert not second.done()
    assert len(mine()) == 2
    first.cancel()
    assert isinstance(await second, Decoded)


async def test_cancelling_a_job_kills_its_child(decoder: Decoder, endless: Job) -> None:
    task = await under_way(decoder, endless)
    task.cancel()
    await asyncio.wait([task])
    await wait_until(lambda: mine() == [])


async def test_killed_child_is_replaced_once(decoder: Decoder, endless: Job, good: Job) -> None:
    task = await under_way(decoder, endless)
    (first,) = mine()
    first.kill()
    await wait_until(lambda: any(child.pid != first.pid for child in mine()))
    (second,) = [child for child in mine() if child.pid != first.pid]
    second.kill()
    with pytest.raises(DecoderKilled):
        await task
    assert isinstance(await decoder.decode(good, wall_seconds=60), Decoded)


async def test_child_killed_while_idle_costs_nothing(decoder: Decoder, good: Job) -> None:
    await decoder.decode(good, wall_seconds=60)
    for child in mine():
        child.kill()
    assert isinstance(await decoder.decode(good, wall_seconds=60), Decoded)


async def test_death_costs_no_other_job(decoder: Decoder, endless: Job, good: Job) -> None:
    await under_way(decoder, endless)
    (victim,) = mine()
    other = asyncio.create_task(decoder.decode(good, wall_seconds=60, paid=True))
    victim.kill()
    assert isinstance(await other, Decoded)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
async def test_picture_that_breaks_its_decoder_breaks_no_second(
    decoder: Decoder, endless: Job, number: signal.Signals
) -> None:
    task = await under_way(decoder, endless)
    (child,) = mine()
    child.send_signal(number)
    result = await task
    assert isinstance(result, NoImage)
    assert mine() == []


async def test_processor_time_is_bounded_for_each_job(decoder: Decoder, tmp_path: Path, good: Job) -> None:
    slow = job(tmp_path, ENDLESS, cpu_seconds=1)
    result = await decoder.decode(slow, wall_seconds=60)
    assert isinstance(result, NoImage)
    assert "too long" in result.message
    for _ in range(3):  # a child's whole life counts for the system
        assert isinstance(await decoder.decode(good, wall_seconds=60), Decoded)


async def test_a_clock_on_the_wall_ends_a_child_that_stands_still(decoder: Decoder, endless: Job) -> None:
    task = asyncio.create_task(decoder.decode(endless, wall_seconds=1.5))
    await wait_until(lambda: mine() != [])
    mine()[0].suspend()
    result = await task
    assert isinstance(result, NoImage)


@pytest.mark.skipif(sys.platform != "linux", reason="the system has no such limit")
async def test_memory_of_a_child_is_bounded(decoder: Decoder, tmp_path: Path) -> None:
    largest = job(tmp_path, png_of_black((4472, 4472)))
    assert isinstance(await decoder.decode(largest, wall_seconds=60), Decoded)
    (child,) = mine()
    status = await asyncio.to_thread(Path(f"/proc/{child.pid}/status").read_text)
    peak = 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])
    assert peak < CHILD
    assert child.memory_info().rss < 45e6  # given back
    limit, _ = child.rlimit(psutil.RLIMIT_AS)
    assert limit < child.memory_info().vms + CHILD


async def test_idle_children_end(good: Job) -> None:
    async with Decoder(2, idle=0.1) as decoder:
        await decoder.decode(good, wall_seconds=60)
        await wait_until(lambda: mine() == [])
        assert isinstance(await decoder.decode(good, wall_seconds=60), Decoded)


async def test_child_that_ends_early_is_an_error(good: Job) -> None:
    child = await Child.start()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ChildDied) as caught:
        await child.work(good)
    assert caught.value.by == signal.SIGKILL


PARENT = """
import asyncio, sys
from daemon.images.decoder import Decoder
from daemon.images.jobs import Job

async def main():
    async with Decoder(1) as decoder:
        await decoder.decode(Job(sys.argv[1], 10**9, 20_000_000, 20), wall_seconds=60)
        print("done", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("busy", [True, False])
async def test_children_die_with_a_killed_daemon(tmp_path: Path, *, busy: bool) -> None:
    path = job(tmp_path, ENDLESS if busy else noise()).path
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, path, cwd=ROOT, stdout=PIPE)
    if busy:
        await wait_until(lambda: any(child.cpu_times().user > 0.4 for child in children_of(parent.pid)))
    else:
        assert parent.stdout is not None
        await parent.stdout.readline()
    (child,) = children_of(parent.pid)
    parent.kill()
    await parent.wait()
    await wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, timeout=5)


async def test_ctrl_c_is_not_for_children(decoder: Decoder, endless: Job) -> None:
    task = await under_way(decoder, endless)
    (child,) = mine()
    assert os.getpgid(child.pid) != os.getpgid(0)
    child.send_signal(signal.SIGINT)
    done, _ = await asyncio.wait([task], timeout=0.5)
    assert not done or isinstance(task.result(), Decoded)
    task.cancel()
