"""psql of PostgreSQL 15, the oldest that is supported."""

import asyncio
from pathlib import Path

from tests.support.postgres import bin_dir
from tests.support.protocol import Db


async def psql(connection: Db, file: Path, *options: str) -> None:
    """Run a file against the database of a connection, and end at the first error."""
    name, port = await connection.fetchrow("select current_database(), inet_server_port()") or ("", 0)
    process = await asyncio.create_subprocess_exec(
        bin_dir("pg15") / "psql",
        *("--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1", "--file", file, *options),
        f"postgresql://postgres@127.0.0.1:{port}/{name}",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
