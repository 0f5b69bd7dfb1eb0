"""The way to the present schema: runs `sql/migrations` and notes them where the Supabase CLI does.

So `image-jobs migrate` and `supabase db push` agree on what has run, whichever of them ran it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from daemon.database import Connection, connected
from daemon.errors import ImageJobsError

DEFAULT_BUCKET = "images"
"""The one that the migrations make."""

LOCK_TIMEOUT = "5s"
"""A statement that waits for a table lock makes everybody behind it wait as well: better to fail and be run again."""

STATEMENT_TIMEOUT = 600.0
"""Seconds; a migration may have to walk a large table."""

# As the CLI makes it, step by step; only the lock is ours: two migrators on a new database would trip over each other.
HISTORY = """
select pg_advisory_xact_lock(hashtextextended('supabase_migrations', 0));
create schema if not exists supabase_migrations;
create table if not exists supabase_migrations.schema_migrations (version text not null primary key);
alter table supabase_migrations.schema_migrations add column if not exists statements text[];
alter table supabase_migrations.schema_migrations add column if not exists name text;
"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file, `VERSION_NAME.sql`."""

    version: str
    name: str
    path: Path

    def __str__(self) -> str:
        return f"{self.version}_{self.name}"


def sql_directory() -> Path:
    """Where the SQL is: in the package if it was installed from a wheel, else beside it.

    Raises:
        ImageJobsError: If it is in neither place.
    """
    package = Path(__file__).parent
    for directory in (package / "sql", package.parent / "sql"):
        if (directory / "migrations").is_dir():
            return directory
    raise ImageJobsError("The SQL files are missing from this installation.", "Install the package anew.")


def migrations() -> list[Migration]:
    """All of them, in order."""
    found: list[Migration] = []
    for path in sorted((sql_directory() / "migrations").glob("*.sql")):
        version, _, name = path.stem.partition("_")
        found.append(Migration(version, name, path))
    return found


async def pending(dsn: str) -> list[str]:
    """The migrations that this database has not seen, as `VERSION_NAME`, in order.

    Raises:
        ImageJobsError: If the database cannot be asked, or has other migrations of the same versions.
    """
    async with connected(dsn) as connection:
        return [str(migration) for migration in await _missing(connection)]


async def migrate(dsn: str, *, bucket: str = DEFAULT_BUCKET) -> list[str]:
    """Runs what is pending, each file in a transaction of its own, and makes the buckets that are missing.

    Two at once do no harm: one waits for the other, then finds it done.

    Returns:
        The migrations that ran, as `VERSION_NAME`.

    Raises:
        ImageJobsError: If one fails; those before it stay.
    """
    async with connected(dsn, timeout=STATEMENT_TIMEOUT) as connection:
        if missing := await _missing(connection):
            async with connection.transaction():
                await connection.execute(HISTORY)
        done = [str(migration) for migration in missing if await _run(connection, migration)]
        await connection.execute("select private.make_bucket($1)", bucket)
    return done


async def _missing(connection: Connection) -> Sequence[Migration]:
    history = await connection.fetchval("select to_regclass('supabase_migrations.schema_migrations') is not null")
    if not history:
        return migrations()
    rows = await connection.fetch("select * from supabase_migrations.schema_migrations")
    names: dict[str, str | None] = {row["version"]: row.get("name") for row in rows}
    missing: list[Migration] = []
    for migration in migrations():
        if migration.version not in names:
            missing.append(migration)
        elif (other := names[migration.version]) not in (None, "", migration.name):
            raise ImageJobsError(
                f"This database has a migration {migration.version}_{other}, where ours is {migration}.",
                "Rename yours (the Supabase CLI uses timestamps), also in supabase_migrations.schema_migrations.",
            )
    return missing


async def _run(connection: Connection, migration: Migration) -> bool:
    """Runs one file; answers False if somebody else did so meanwhile."""
    sql = migration.path.read_text()
    try:
        async with connection.transaction():
            # First, so that a second migrator waits here, and not in the middle of something.
            mine = await connection.fetchval(
                "insert into supabase_migrations.schema_migrations (version, name, statements) values ($1, $2, $3) "
                "on conflict (version) do nothing returning true",
                migration.version,
                migration.name,
                [sql],
            )
            if mine:
                await connection.execute(f"set local lock_timeout = '{LOCK_TIMEOUT}'")
                await connection.execute(sql)
            return bool(mine)
    except asyncpg.LockNotAvailableError as error:
        raise ImageJobsError(
            f"Migration {migration} could not get a lock: another transaction holds a table that it changes.",
            "Nothing was changed by it. Run image-jobs migrate again when that transaction has ended.",
        ) from error
    except asyncpg.PostgresError as error:
        raise ImageJobsError(
            f"Migration {migration} failed: {error}.", getattr(error, "hint", None) or "Nothing was changed by it."
        ) from error
