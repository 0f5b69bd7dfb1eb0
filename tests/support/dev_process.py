"""Runs `image-jobs dev` as a process, reads its output, stops it, and checks that no process is left."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from tests.support.commands import STATE
from tests.support.postgres import ROOT, wait_until


class Dev:
    """A running `image-jobs dev` and what it prints."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.text = ""

    async def read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.text += line.decode()

    async def says(self, pattern: str | re.Pattern[str]) -> re.Match[str]:
        """Wait until the output matches a pattern."""

        def found() -> re.Match[str] | bool | None:
            return re.search(pattern, self.text) or self.process.returncode is not None

        match = await wait_until(found, timeout=40)
        assert isinstance(match, re.Match), self.text
        return match

    def family(self) -> list[psutil.Process]:
        """Return all processes that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def daemon(self) -> psutil.Process:
        (found,) = [child for child in self.family() if child.cmdline()[-3:] == ["-m", "daemon", "run"]]
        return found

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 40)


@asynccontextmanager
async def running(directory: Path, port: int, *more: str, **settings: str) -> AsyncIterator[Dev]:
    """Start dev in a directory; at the end stop it, and wait until all its processes have ended.

    Args:
        more: Arguments of the command.
        settings: Variables of its environment.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "daemon", "dev", "--port", str(port), *more),
        cwd=directory,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(directory / STATE), **settings},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    dev = Dev(process)
    reading = asyncio.create_task(dev.read())
    family: list[psutil.Process] = []
    try:
        await dev.says("Ctrl-C stops everything")
        await wait_until(lambda: len(dev.family()) > 2)
        family = dev.family()
        yield dev
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            await dev.ended()
        await reading
    await wait_until(lambda: not any(alive(child) for child in family), timeout=30)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
