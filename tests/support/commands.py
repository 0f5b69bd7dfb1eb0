"""Runs `image-jobs` as its users do: as a process, with nothing of this machine's own settings."""

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.postgres import ROOT


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class ImageJobs:
    """The command, run in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    async def start(self, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
        """Starts it; stdout and stderr are pipes."""
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "daemon", *arguments),
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment},
            cwd=self.directory,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def __call__(self, *arguments: str, **environment: str) -> Done:
        """Runs it to its end. A traceback is never an answer."""
        return await self.end(await self.start(*arguments, **environment))

    async def end(self, process: asyncio.subprocess.Process) -> Done:
        """Waits for its end."""
        out, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode is not None
        done = Done(process.returncode, out.decode(), err.decode())
        assert "Traceback" not in done.err, done.err
        return done
