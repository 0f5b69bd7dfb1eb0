"""Daemon processes for tests, beside a database and the stand-in for Supabase."""

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
from starlette.types import ASGIApp

from daemon.dev.supabase.gateway import one_port
from daemon.dev.supabase.keys import Keys, make_keys
from daemon.dev.supabase.rest import rest_app
from daemon.dev.supabase.storage import storage_app
from tests.support.postgres import ROOT, wait_until
from tests.support.servers import served

Pool = asyncpg.Pool


@dataclass
class Supabase:
    """A project: a database, and REST and Storage at `url`."""

    dsn: str
    url: str
    keys: Keys

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a daemon for this project, without this machine's own settings."""
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "error::RuntimeWarning",
            "DATABASE_URL": self.dsn,
            "SUPABASE_URL": self.url,
            "SUPABASE_SERVICE_ROLE_KEY": self.keys.service_role_key,
            "SUPABASE_ANON_KEY": self.keys.anon_key,
            "IMAGE_JOBS_DEMO": "1",
            "IMAGE_JOBS_LOG_FORMAT": "json",
            **more,
        }


@asynccontextmanager
async def supabase(dsn: str, behind: Callable[[ASGIApp], ASGIApp] = lambda app: app) -> AsyncIterator[Supabase]:
    """Serve REST and Storage for a database, behind `behind`."""
    keys = make_keys("a secret of these tests that is long enough")
    with tempfile.TemporaryDirectory() as directory:
        async with (
            asyncpg.create_pool(dsn, min_size=1, max_size=8) as pool,
            asyncpg.create_pool(dsn.replace("//postgres@", "//authenticator@"), min_size=0, max_size=4) as gateway,
            served(behind(_api(pool, gateway, Path(directory), keys))) as url,
        ):
            yield Supabase(dsn, url, keys)


def _api(pool: Pool, gateway: Pool, directory: Path, keys: Keys) -> ASGIApp:
    return one_port({"/rest/v1": rest_app(gateway, keys), "/storage/v1": storage_app(pool, directory, keys)})


@dataclass
class Daemon:
    """A daemon process and its log."""

    process: asyncio.subprocess.Process
    lines: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    raw: list[str] = field(default_factory=list[str])

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The log lines of one event."""
        return [line for line in self.lines if line.get("event") == event]

    async def started(self, timeout: float = 30) -> "Daemon":
        """Wait until it claims. Returns itself."""

        def over() -> bool:
            return bool(self.logged("listener.connected")) or self.process.returncode is not None

        await wait_until(over, timeout=timeout)
        assert self.process.returncode is None, "\n".join(self.raw)
        return self

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; fails with its last lines if it has ended by itself."""
        try:
            self.process.send_signal(number)
        except ProcessLookupError:
            lines = "\n".join(self.raw[-20:])
            raise AssertionError(f"The daemon has ended by itself, with {self.process.returncode}:\n{lines}") from None

    async def ended(self, timeout: float = 30) -> int:
        """Wait until it has ended. Returns the exit code; fails with its last lines."""
        try:
            return await asyncio.wait_for(self.process.wait(), timeout)
        except TimeoutError:
            lines = "\n".join(self.raw[-20:])
            raise AssertionError(f"The daemon has not ended after {timeout} s:\n{lines}") from None

    async def read(self) -> None:
        """Read its log until it ends."""
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            text = line.decode(errors="replace").rstrip()
            self.raw.append(text)
            if text.startswith("{"):
                self.lines.append(json.loads(text))


@asynccontextmanager
async def daemon(
    project: Supabase, *, program: Sequence[str] = ("-m", "daemon"), **environment: str
) -> AsyncIterator[Daemon]:
    """Run `image-jobs run` as a process; kill it at the end if it still runs."""
    with tempfile.TemporaryDirectory() as directory:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *program,
            "run",
            env=project.environment(**environment),
            cwd=directory,
            stderr=asyncio.subprocess.PIPE,
        )
        it = Daemon(process)
        reading = asyncio.create_task(it.read())
        try:
            yield it
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            await reading
