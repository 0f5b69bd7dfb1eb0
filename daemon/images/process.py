"""A child process that decodes images, as the daemon sees it."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from pathlib import Path
from typing import Self

import daemon
from daemon.images.jobs import Job, Result, dump, load

_ROOT = Path(daemon.__file__).parents[1]
_PASSED = {
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "TMPDIR",
}
"""Variables that a child gets: where Python lies, and no keys."""
_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""For glibc: memory of a picture goes back to the system as soon as it is decoded."""


class ChildDied(Exception):
    """A child ended in the middle of a job.

    Args:
        by: The signal that ended it; None where it ended by itself.
    """

    def __init__(self, by: int | None) -> None:
        super().__init__(f"ended by {signal.Signals(by).name}" if by is not None else "ended")
        self.by = by


class Child:
    """One child process. Start it by `start`; one job at a time."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls) -> Self:
        """Start a child.

        Raises:
            OSError: If the system has no room for one.
        """
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {name: value for name, value in os.environ.items() if name in _PASSED}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "daemon.images.child"),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            env={**environment, **_MALLOC, "PYTHONPATH": os.pathsep.join(paths)},
            process_group=0,  # a Ctrl-C on the daemon's terminal is the daemon's alone
        )
        return cls(process)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return self._process.returncode is None

    async def work(self, job: Job) -> Result:
        """Do a job.

        Raises:
            ChildDied: If the child ended before it had a result.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(dump(job))
            await stdin.drain()
            line = await stdout.readline()
        except ConnectionError:
            line = b""
        if not line.endswith(b"\n"):
            code = await self._process.wait()
            raise ChildDied(-code if code < 0 else None)
        result = load(line)
        assert not isinstance(result, Job)
        return result

    def kill(self) -> None:
        """End it at once, whatever it does."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self.alive:
            # Not by asyncio, which looks first whether it has ended: then its own watcher misses how.
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    async def wait(self) -> None:
        """Wait until it has ended."""
        await self._process.wait()
