"""Decode images in children: few at once, each bounded in time and memory, and killed where nobody waits any more."""

import asyncio
import signal
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import structlog

from daemon.images.jobs import Crashed, Decoded, DiskError, Job, NoImage, TooLarge
from daemon.images.memory import children_that_fit, memory_limit
from daemon.images.process import Child, ChildDied

log = structlog.stdlib.get_logger()

IDLE_SECONDS = 30.0
"""Seconds without a job after which a child is ended: it would keep 20 MB, and a new one takes a quarter of a second."""
_NO_ROOM_PAUSES = (0.1, 0.5, 1.0, 2.0, 4.0)
"""Seconds between tries to start a child where the system is out of processes, files or memory."""


class DecoderKilled(Exception):
    """Two children were killed in the middle of the same job, and not for what it needed."""


class Decoder:
    """Decodes images. Children are started when they are needed.

    Permits are waited for in the event loop. What nobody has paid for (sources, previews) never takes the last child, where
    there are several: a picture that was made does not wait for a stranger's.

    Args:
        children: How many at once; None for what fits into this process's memory.
        idle: Seconds after which an idle child is ended.
    """

    def __init__(self, children: int | None = None, *, idle: float = IDLE_SECONDS) -> None:
        count = children_that_fit(memory_limit()) if children is None else children
        self._permits = asyncio.Semaphore(count)
        self._unpaid = asyncio.Semaphore(max(1, count - 1))
        self._seconds_idle = idle
        self._idle: dict[Child, asyncio.TimerHandle] = {}
        self._children: set[Child] = set()
        self._ending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End all children, whatever they do."""
        for child in [*self._children]:
            self._end(child)
        while self._ending:
            await asyncio.wait(self._ending)

    async def decode(self, job: Job, *, wall_seconds: float, paid: bool = False) -> Decoded | NoImage | TooLarge:
        """Do a job.

        Args:
            job: The image, and what is wanted of it.
            wall_seconds: Longest time in a child: for systems that have no limits, and for disks that hang.
            paid: Whether the image was paid for.

        Returns:
            What the child said. An image that is too much for its decoder is `NoImage`.

        Raises:
            DecoderKilled: If the children were killed from outside, twice.
            OSError: If the file cannot be read, or no child be started.
        """
        async with AsyncExitStack() as stack:
            if not paid:
                await stack.enter_async_context(self._unpaid)
            await stack.enter_async_context(self._permits)
            try:
                return await self._work(await self._idle_or_new(), job, wall_seconds)
            except _Killed:
                log.warning("decoder.killed", consequence="a new one tries once more")
            try:
                return await self._work(await self._start(), job, wall_seconds)
            except _Killed:
                raise DecoderKilled from None

    async def _work(self, child: Child, job: Job, wall_seconds: float) -> Decoded | NoImage | TooLarge:
        try:
            async with asyncio.timeout(wall_seconds):
                result = await child.work(job)
        except TimeoutError:
            self._end(child)
            return NoImage("Decoding the image takes too long.", f"more than {wall_seconds:.0f} s")
        except ChildDied as death:
            self._end(child)
            if death.by == signal.SIGKILL:
                raise _Killed from death
            if death.by == signal.SIGXCPU:
                return NoImage("Decoding the image takes too long.", f"more than {job.cpu_seconds} s of processor time")
            # Another child would end the same way.
            log.warning("decoder.died", reason=str(death))
            return NoImage("The image breaks its decoder.", str(death))
        except BaseException:  # cancelled, above all: nobody waits for the result
            self._end(child)
            raise
        self._rest(child)
        match result:
            case DiskError():
                raise OSError(result.errno, result.strerror)
            case Crashed():
                log.error("decoder.crashed", traceback=result.traceback)
                return NoImage("The image breaks its decoder.", result.traceback.strip().rpartition("\n")[2])
            case _:
                return result

    async def _idle_or_new(self) -> Child:
        while self._idle:
            child, timer = self._idle.popitem()
            timer.cancel()
            if child.alive:
                return child
            self._end(child)
        return await self._start()

    async def _start(self) -> Child:
        for pause in (*_NO_ROOM_PAUSES, None):
            try:
                child = await Child.start()
            except OSError as error:
                if pause is None:
                    raise
                log.warning("decoder.not_started", error=str(error), retry_in=pause)
                await asyncio.sleep(pause)
            else:
                self._children.add(child)
                return child
        raise AssertionError

    def _rest(self, child: Child) -> None:
        """Keep a child for the next job, for a while."""
        timer = asyncio.get_running_loop().call_later(self._seconds_idle, self._end, child)
        self._idle[child] = timer

    def _end(self, child: Child) -> None:
        """Kill a child and forget it."""
        if (timer := self._idle.pop(child, None)) is not None:
            timer.cancel()
        if child not in self._children:
            return
        self._children.discard(child)
        child.kill()
        task = asyncio.get_running_loop().create_task(child.wait(), name="end of a decoder")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


class _Killed(Exception):
    """A child was killed from outside."""
