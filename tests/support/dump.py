"""The schema of a database as text."""

import asyncio

import asyncpg

from daemon.dev.postgres import embedded_bin_dir
from tests.support.postgres import bin_dir


async def dump(connection: "asyncpg.Connection[asyncpg.Record]") -> str:
    """Dump the schema without rows, on 15 with that server's own pg_dump.

    PostgreSQL 15.20 keeps `pg_attver` in the options of every column, which only the pg_dump beside it leaves out. The
    package of 17 has no pg_dump; the one of 18 reads it.
    """
    name, port = await connection.fetchrow("select current_database(), inet_server_port()") or ("", 0)
    old = connection.get_server_version().major == 15
    process = await asyncio.create_subprocess_exec(
        (bin_dir("pg15") if old else embedded_bin_dir()) / "pg_dump",
        *("--schema-only", "--no-owner", "--restrict-key=x"),
        f"postgresql://supabase_admin@127.0.0.1:{port}/{name}",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()
