"""The ledger: each file of ours runs once, by whatever tool, in whatever order, and however often it is run."""

from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from daemon import migrate
from tests.support.dump import dump
from tests.support.migrations import later_file, release
from tests.support.postgres import Cluster, connect
from tests.support.protocol import Db
from tests.support.psql import psql

pytestmark = pytest.mark.every_postgres

# Running the first file after it would undo this.
NEWER = "create or replace function image_jobs.now() returns timestamptz language sql as 'select clock_timestamp()'"
REPLACED = """
    create or replace function image_jobs.my_workflows() returns setof uuid
    language sql volatile security definer set search_path = '' as 'select gen_random_uuid()'
"""


@pytest.fixture
async def db(postgres: Cluster) -> AsyncIterator[Db]:
    """Yield a Supabase project that our migrations have not seen."""
    async with postgres.database(template=None) as dsn:
        connection = await connect(dsn)
        yield connection
        await connection.close()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Return our file, and a later one."""
    return sorted((release(tmp_path, later_file(NEWER)) / "migrations").iterdir())


async def ledger(db: Db) -> list[tuple[str, str, str]]:
    return [tuple(row) for row in await db.fetch("select version, name, hash from image_jobs.migrations order by 1")]


async def test_an_older_file_after_a_newer_one_changes_nothing(db: Db, files: list[Path]) -> None:
    first, second = files
    await psql(db, first)
    await db.execute(REPLACED)
    await psql(db, second)
    once = await dump(db), await ledger(db)
    assert "select clock_timestamp()" in once[0]
    assert "select gen_random_uuid()" in once[0]
    for file in (first, second, second, first):
        await psql(db, file)
        async with db.transaction():
            await db.execute(file.read_text())
    assert (await dump(db), await ledger(db)) == once


async def test_psql_and_migrate_write_the_same_hash(db: Db, files: list[Path]) -> None:
    for file in files:
        await psql(db, file)
    parts = [file.stem.partition("_") for file in files]
    written = [migrate.Migration(version, name, file) for (version, _, name), file in zip(parts, files, strict=True)]
    assert await ledger(db) == [(migration.version, migration.name, migration.hash) for migration in written]


async def test_comments_and_white_space_are_no_other_file(db: Db, files: list[Path]) -> None:
    await psql(db, files[0])
    text = files[0].read_text()
    await db.execute(text.replace("begin\n", "begin -- as ever\r\n\n", 1))
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError, match="made by another 0001"):
        await db.execute(text.replace("begin\n", "begin perform 1;\n", 1))


async def test_a_later_file_alone_names_the_one_it_needs(db: Db, files: list[Path]) -> None:
    before = await dump(db)
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError, match="needs 0001_initial") as error:
        await db.execute(files[1].read_text())
    assert "image-jobs migrate" in error.value.hint
    assert await dump(db) == before


async def test_a_file_leaves_the_timeouts_as_they_were(db: Db, files: list[Path]) -> None:
    async with db.transaction():
        await db.execute("set lock_timeout = '7s'")
        for file in files:
            await db.execute(file.read_text())
            assert await db.fetchval("show lock_timeout") == "7s"


async def test_no_public_function_of_ours_is_a_definer(db: Db, files: list[Path]) -> None:
    await psql(db, files[0])
    ours = await db.fetch(
        "select oid::regprocedure::text as name, prosecdef from pg_proc where pronamespace = 'public'::regnamespace"
    )
    assert len(ours) > 10
    assert [row["name"] for row in ours if row["prosecdef"]] == []
