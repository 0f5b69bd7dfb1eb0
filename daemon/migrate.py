"""Run `sql/migrations`, or copy them for the Supabase CLI, whose history is its own and never touched.

Each file writes itself into the ledger `image_jobs.migrations`, by whatever tool it is run.
"""

import asyncio
import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg

from daemon.database import Connection, connected
from daemon.errors import ImageJobsError
from daemon.indexes import are_postponed, build_indexes

DEFAULT_BUCKET = "images"
"""Made by a file that is run by another tool, unless `migrate` has named another one before."""

LOCK_TIMEOUT = "100ms"
"""A statement that waits for a table lock holds up every statement behind it: better to give up, and come again."""

LOCK_PATIENCE = 30.0
"""Seconds to come again for a lock."""

STATEMENT_TIMEOUT = 600
"""Seconds; a migration may have to walk a large table."""

LOCK = "select pg_advisory_xact_lock(hashtextextended('image_jobs.migrations', 0))"
"""Each file takes it, too."""

SCHEMA_IS_OURS = (
    "coalesce(starts_with(obj_description(to_regnamespace('image_jobs'), 'pg_namespace'), 'Image Job Orchestrator: '), false)"
    " and to_regclass('image_jobs.claims') is not null"
)
"""A comment can be anybody's."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file, `VERSION_NAME.sql`."""

    version: str
    name: str
    path: Path

    def __str__(self) -> str:
        return f"{self.version}_{self.name}"

    @property
    def block(self) -> str:
        """The file without its last line, `image_jobs.set_up`, of which `migrate` wants to know what it made."""
        before, tag, after = self.path.read_text().rpartition(f"$migration_{self.version}$;\n")
        return before + tag or after

    @property
    def hash(self) -> str:
        """The hash that the file writes into the ledger: of its block, without comments and white space."""
        body = self.block.partition(f"do $migration_{self.version}$")[2].rpartition("$")[0].rpartition("$")[0]
        return hashlib.sha256(re.sub(r"--[^\n]*|[ \t\r\n]+", "", body).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Step:
    """One thing around us that is wanted: a bucket, a policy of Storage or Realtime, a table in a publication.

    Attributes:
        step: Its name, with its article.
        state: `there`, `made`, `missing`, `refused`, `later` or `absent`, as `image_jobs.set_up` says.
        note: The reason, or what follows if it is missing.
        command: The SQL that makes it.
    """

    step: str
    state: str
    note: str | None
    command: str

    @property
    def title(self) -> str:
        """The name as a sentence begins with it."""
        return self.step[:1].upper() + self.step[1:]


@dataclass(frozen=True, slots=True)
class Migrated:
    """Result of `migrate`: the migrations that ran, as `VERSION_NAME`, and what is around them."""

    applied: list[str]
    steps: list[Step]


def sql_directory() -> Path:
    """Find the SQL: in the package if it was installed from a wheel, else beside it.

    Raises:
        ImageJobsError: If it is in neither place.
    """
    package = Path(__file__).parent
    for directory in (package / "sql", package.parent / "sql"):
        if (directory / "migrations").is_dir():
            return directory
    raise ImageJobsError("The SQL files are missing from this installation.", "Install the package anew.")


def migrations() -> list[Migration]:
    """List the files of `sql/migrations`, in order."""
    found: list[Migration] = []
    for path in sorted((sql_directory() / "migrations").glob("*.sql")):
        version, _, name = path.stem.partition("_")
        found.append(Migration(version, name, path))
    return found


async def pending(dsn: str) -> list[str]:
    """List the migrations that this database has not seen, as `VERSION_NAME`, in order.

    Raises:
        ImageJobsError: If the database cannot be reached, or was made by other files of these versions.
    """
    async with connected(dsn) as connection:
        return [str(migration) for migration in await _missing(connection)]


async def migrate(dsn: str, *, bucket: str = DEFAULT_BUCKET, private: bool = False) -> Migrated:
    """Run what is pending, each file in a transaction of its own, and make what is missing around it.

    Two at once do no harm: one waits for the other, then finds it done.

    Raises:
        ImageJobsError: If a migration fails; those before it stay.
    """
    async with connected(dsn, timeout=STATEMENT_TIMEOUT) as connection:
        missing = await _missing(connection)
        applied = [str(migration) for migration in missing if await _run(connection, migration)]
        await _build_indexes(connection)
        steps = await connection.fetch("select * from image_jobs.set_up($1, $2)", bucket, private)
    return Migrated(applied, [Step(**row) for row in steps])


async def check_set_up(connection: Connection, bucket: str, *, private: bool) -> list[Step]:
    """Return the state of what is wanted around us. Makes nothing."""
    rows = await connection.fetch("select * from image_jobs.check_set_up($1, $2)", bucket, private)
    return [Step(**row) for row in rows]


def export(directory: Path) -> list[Path]:
    """Copy the migrations that a directory of the Supabase CLI lacks, under names that sort last there.

    Returns:
        The files that were written.

    Raises:
        ImageJobsError: If it is no directory, cannot be read or written, or has another file of one of these versions.
    """
    try:
        return _export(directory)
    except OSError as error:
        raise ImageJobsError(
            f"Migrations cannot be copied to {directory} ({error.strerror or error}).",
            "Name a directory that this user may write, like supabase/migrations.",
        ) from error


def _export(directory: Path) -> list[Path]:
    if not directory.is_dir() and (directory.exists() or not directory.absolute().parent.is_dir()):
        raise ImageJobsError(
            f"{directory} is no directory.", "Run supabase init first, then name its supabase/migrations."
        )
    directory.mkdir(exist_ok=True)
    written: list[Path] = []
    for migration in migrations():
        copies = list(directory.glob(f"[0-9]*_image_jobs_{migration}.sql"))
        if any(Migration(migration.version, migration.name, copy).hash != migration.hash for copy in copies):
            raise ImageJobsError(
                f"{copies[0]} is another {migration.version} than this version's {migration}.",
                "There is no release yet, so no way from one to the other: delete that file, and migrate a new database.",
            )
        if not copies:
            path = directory / f"{_next_version(directory)}_image_jobs_{migration}.sql"
            try:
                path.write_bytes(migration.path.read_bytes())
            except OSError:
                path.unlink(missing_ok=True)  # half of it would be refused as another file the next time
                raise
            written.append(path)
    return written


def _next_version(directory: Path) -> str:
    """Return now as a version of the Supabase CLI, or a second after the newest there, if that is later."""
    now = datetime.now(UTC)
    newest = max((path.name.partition("_")[0] for path in directory.glob("[0-9]*_*.sql")), default="")
    try:
        now = max(now, datetime.strptime(newest, "%Y%m%d%H%M%S").replace(tzinfo=UTC) + timedelta(seconds=1))
    except ValueError:  # not all versions are times
        if newest.isdigit() and newest > f"{now:%Y%m%d%H%M%S}":
            return str(int(newest) + 1).zfill(len(newest))
    return f"{now:%Y%m%d%H%M%S}"


async def _missing(connection: Connection) -> Sequence[Migration]:
    """Return the files of versions that are newer than the ledger's last."""
    if not await connection.fetchval(f"select {SCHEMA_IS_OURS}"):
        return migrations()
    if not await connection.fetchval("select to_regclass('image_jobs.migrations') is not null"):
        raise _made_by_another(migrations()[0])
    rows = await connection.fetch("select version, hash from image_jobs.migrations")
    ledger: dict[str, str | None] = {row["version"]: row["hash"] for row in rows}
    for migration in migrations():
        # There is no hash if a tool has hidden the file's text from it.
        if (ledger.get(migration.version) or migration.hash) != migration.hash:
            raise _made_by_another(migration)
    return [migration for migration in migrations() if migration.version > max(ledger, default="")]


def _made_by_another(migration: Migration) -> ImageJobsError:
    return ImageJobsError(
        f"This database was made by another {migration.version} than this version's {migration}.",
        "There is no release yet, so no way from one to the other: start with image-jobs dev --fresh, or migrate a new database.",
    )


async def _run(connection: Connection, migration: Migration) -> bool:
    """Run one file; False if another migrator has done so meanwhile."""
    try:
        return await _run_patiently(connection, migration)
    except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as error:
        raise ImageJobsError(
            f"Migration {migration} could not get a lock: another transaction holds a table that it changes.",
            "Nothing was changed by it. Run image-jobs migrate again when that transaction has ended.",
        ) from error
    except asyncpg.InsufficientPrivilegeError:
        raise  # `connected` explains it
    except asyncpg.PostgresError as error:
        message, detail, hint = (getattr(error, name, None) or "" for name in ("message", "detail", "hint"))
        if detail.startswith("- "):  # what is in the way, each with its cure: it is the file itself that refuses
            raise ImageJobsError(message, f"{detail}\n{hint}") from error
        raise ImageJobsError(
            f"Migration {migration} failed: {message.rstrip('.')}.", hint or "Nothing was changed by it."
        ) from error


async def _run_patiently(connection: Connection, migration: Migration) -> bool:
    postponed = await are_postponed(connection)
    until = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            async with connection.transaction():
                # First, so that a second migrator waits here, and not in the middle of something.
                await connection.execute(LOCK)
                if migration.version not in {missing.version for missing in await _missing(connection)}:
                    return False
                await connection.execute(
                    f"set local lock_timeout = '{LOCK_TIMEOUT}'; set local statement_timeout = '{STATEMENT_TIMEOUT}s'"
                )
                if postponed:
                    await connection.execute("set local image_jobs.indexes = 'later'")
                await connection.execute(migration.block)
                return True
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.2)


async def _build_indexes(connection: Connection) -> None:
    try:
        for migration in migrations():
            await build_indexes(connection, migration.block, timeout=STATEMENT_TIMEOUT)
    except asyncpg.PostgresError as error:
        message, detail, hint = (getattr(error, name, None) or "" for name in ("message", "detail", "hint"))
        raise ImageJobsError(
            f"The schema is there, but not all of its indexes: {message.rstrip('.')}.",
            detail or hint or "Run image-jobs migrate again: it builds what is missing.",
        ) from error
