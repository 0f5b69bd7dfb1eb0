"""Processes of a system that is measured, and what they and their backends use."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.bench.machine import seconds_of_cpu, used
from tests.bench.systems import System
from tests.support.postgres import ROOT

POLL = 0.02
"""Seconds between two looks whether work is left: so exact is a measurement."""
PATIENCE = 60.0


@dataclass(frozen=True, slots=True)
class Measured:
    """The cost of a load. `backends` and `workers`: seconds of a processor; `wal`: bytes."""

    count: int
    seconds: float
    backends: float
    workers: float
    wal: int

    @property
    def rate(self) -> float:
        """Runs a second."""
        return self.count / self.seconds


class Workers:
    """Some processes of one system.

    Args:
        system: What they work for.
        pids: The processes.
    """

    def __init__(self, system: System, pids: Sequence[int]) -> None:
        self.system = system
        self._pids = pids

    async def work_off(self, count: int) -> Measured:
        """Insert work while they wait for it, and measure until it is done."""
        db = self.system.db
        await db.execute("analyze")
        before, processes = await used(db), self._seconds()
        await self.system.insert(count)
        inserted = await used(db)
        started = time.perf_counter()
        await self.wait_until_done()
        seconds = time.perf_counter() - started
        after = await used(db)
        backends = after.since(before).backends
        return Measured(count, seconds, backends, self._seconds() - processes, after.since(inserted).wal)

    async def trickle(self, count: int, pause: float) -> Measured:
        """Insert one after the other, at a pace at which each finds them idle, and measure what that takes."""
        db = self.system.db
        await db.execute("analyze")
        before, processes = await used(db), self._seconds()
        started = time.perf_counter()
        for number in range(count):
            await asyncio.sleep(max(0.0, started + number * pause - time.perf_counter()))
            await self.system.insert(1)
        await self.wait_until_done()
        seconds = time.perf_counter() - started
        it = (await used(db)).since(before)
        return Measured(count, seconds, it.backends, self._seconds() - processes, it.wal)

    async def wait_until_done(self) -> None:
        """Return once no work is left."""
        deadline = time.perf_counter() + PATIENCE
        while await self.system.db.fetchval(self.system.remaining):
            assert time.perf_counter() < deadline, f"{self.system.name}: work is left"
            await asyncio.sleep(POLL)

    def _seconds(self) -> float:
        return sum(map(seconds_of_cpu, self._pids))


@asynccontextmanager
async def workers(system: System, count: int) -> AsyncIterator[Workers]:
    """Start as many processes, and stop them at the end."""
    started: list[asyncio.subprocess.Process] = []
    try:
        program = "-m", "tests.bench.worker_process", system.key, system.dsn
        for _ in range(count):
            process = await asyncio.create_subprocess_exec(
                sys.executable, *program, cwd=ROOT, stdout=asyncio.subprocess.PIPE
            )
            started.append(process)
        for process in started:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
        them = Workers(system, [process.pid for process in started])
        # What each of them does once, it has done before anything is measured.
        await them.work_off(100 * count)
        yield them
    finally:
        for process in started:
            if process.returncode is None:
                process.kill()
            await process.wait()
