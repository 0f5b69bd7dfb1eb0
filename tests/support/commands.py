"""Runs `image-jobs` as a process, without the environment of this machine."""

import asyncio
import fcntl
import io
import json
import os
import pty
import re
import struct
import sys
import termios
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import asyncpg

from tests.support.postgres import ROOT

Db: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

STATE = ".state"
"""Where commands look for an `image-jobs dev`, in the directory in which a test starts them: not in the user's."""
UNREACHABLE = {"SUPABASE_URL": "http://127.0.0.1:1", "SUPABASE_SERVICE_ROLE_KEY": "a-key-that-is-secret"}
"""Settings of a project that cannot be reached."""
PASSWORD = "hunter22hunter"
"""Part of addresses; must not be in any output."""


@dataclass(frozen=True)
class Done:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class ImageJobs:
    """Runs the command in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    async def start(self, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
        """Start the command; stdout and stderr are pipes."""
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "daemon", *arguments),
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(ROOT),
                "COLUMNS": "200",
                "XDG_STATE_HOME": str(self.directory / STATE),
                **environment,
            },
            cwd=self.directory,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def __call__(self, *arguments: str, **environment: str) -> Done:
        """Run the command to its end. A traceback fails the test."""
        return await self.end(await self.start(*arguments, **environment))

    async def on_screen(self, columns: int, *arguments: str, **environment: str) -> str:
        """Run the command in a terminal of so many columns. Returns what it printed, without colours."""
        ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "daemon", *arguments),
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environment},
            cwd=self.directory,
            stdin=its,
            stdout=its,
            stderr=its,
        )
        os.close(its)
        printed = await asyncio.wait_for(asyncio.to_thread(_read_all, ours), 30)
        await process.wait()
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed.decode()).replace("\r\n", "\n")

    async def end(self, process: asyncio.subprocess.Process) -> Done:
        """Wait for the end of the command."""
        out, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode is not None
        done = Done(process.returncode, out.decode(), err.decode())
        assert "Traceback" not in done.err, done.err
        return done


def _read_all(terminal: int) -> bytes:
    """Read until the other side is closed, which Linux reports as an error."""
    printed = b""
    with os.fdopen(terminal, "rb", buffering=0) as source:
        while chunk := _read(source):
            printed += chunk
    return printed


def _read(source: io.FileIO) -> bytes:
    try:
        return source.read(65536)
    except OSError:
        return b""


async def insert_run(db: Db, run_id: str, processor: str = "demo:painter") -> str:
    """Insert a pending run."""
    await db.execute(
        "insert into public.runs (id, kind, subject_id, status, processor, metadata) "
        "values ($1, 'image_gen', $2, 'pending', $4, $3)",
        run_id,
        uuid4(),
        {"promptSpec": {"basePrompt": "a fox"}},
        processor,
    )
    return run_id


async def fail_run(db: Db, run_id: str, error: str) -> None:
    """End a run as a daemon does."""
    await end_run(db, run_id, outcome="failed", payload={"error": error, "code": "test", "hint": "Try another prompt."})


async def end_run(db: Db, run_id: str, **settlement: Any) -> None:
    """Claim the one run that waits, and settle it."""
    daemon = uuid4()
    await db.execute("select image_jobs.register_daemon($1, 'test', '0', 1, '30 s', '{demo}')", daemon)
    (claimed,) = await db.fetch("select run from image_jobs.sync($1, 1, true, '[]', '[]', null, null)", daemon)
    run = claimed["run"]
    settlement |= {"id": run_id, "claim": run["claim"], "events": []}
    await db.execute("select * from image_jobs.sync($1, 0, false, $2, '[]', null, null)", daemon, [settlement])
