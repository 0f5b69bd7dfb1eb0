"""migrate: every file once, in order, recorded in a ledger of our own."""

import asyncio
import re
import resource
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import pytest

from daemon import migrate
from daemon.errors import ImageJobsError
from daemon.migrate import migrations, pending
from tests.support.migrations import BEFORE_THE_LEDGER, later_file, release
from tests.support.postgres import MIGRATIONS, ROOT, connect, wait_until

ALL = [path.stem for path in sorted(MIGRATIONS.glob("*.sql"))]


@pytest.fixture
async def supabase(postgres):
    """Yield the DSN of a Supabase project that has none of our migrations."""
    async with postgres.database(template=None) as dsn:
        yield dsn


@pytest.fixture
async def project(supabase):
    """Yield a connection to `supabase`."""
    connection = await connect(supabase)
    yield connection
    await connection.close()


async def ledger(project) -> list[str]:
    rows = await project.fetch("select version, name from image_jobs.migrations order by version")
    return [f"{row['version']}_{row['name']}" for row in rows]


@pytest.mark.every_postgres
async def test_pending_migrations_run_once_in_order(supabase, project):
    assert await pending(supabase) == ALL
    assert (await migrate.migrate(supabase)).applied == ALL
    assert await pending(supabase) == []
    assert (await migrate.migrate(supabase)).applied == []
    assert await ledger(project) == ALL
    assert await project.fetchval("select count(*) from public.runs") == 0
    assert await project.fetchval("select to_regnamespace('supabase_migrations') is null")


def test_file_names_are_accepted_by_the_supabase_cli():
    assert [str(migration) for migration in migrations()] == ALL
    assert all(re.fullmatch(r"[0-9]+_.*\.sql", migration.path.name) for migration in migrations())
    assert len({migration.version for migration in migrations()}) == len(ALL)


async def test_the_ledger_has_the_hash_of_each_file(supabase, project):
    await migrate.migrate(supabase)
    rows = await project.fetch("select version, hash from image_jobs.migrations order by version")
    assert [tuple(row) for row in rows] == [(migration.version, migration.hash) for migration in migrations()]


OTHERS = {
    "another 0001_initial": "update image_jobs.migrations set hash = repeat('0', 64)",
    "one from before the ledger": BEFORE_THE_LEDGER,
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
async def test_a_database_of_another_0001_names_the_cure(supabase, project, change):
    await migrate.migrate(supabase)
    await project.execute(change)
    for check in (pending, migrate.migrate):
        with pytest.raises(ImageJobsError, match="made by another 0001 than this version's 0001_initial") as error:
            await check(supabase)
        assert "image-jobs dev --fresh" in error.value.hint
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError, match="made by another 0001") as refused:
        await project.execute(migrations()[0].path.read_text())
    assert "image-jobs dev --fresh" in refused.value.hint


async def test_only_missing_migrations_run(supabase, project, tmp_path, monkeypatch):
    await migrate.migrate(supabase)
    monkeypatch.setattr(
        migrate, "sql_directory", lambda: release(tmp_path, later_file("create table public.second ()"))
    )
    assert await pending(supabase) == ["0002_second"]
    assert (await migrate.migrate(supabase)).applied == ["0002_second"]
    assert await ledger(project) == [*ALL, "0002_second"]


async def test_of_two_migrators_one_waits_and_then_skips(supabase, project):
    # Another session holds the ledger's lock until both are waiting for it, so that they start from the same place.
    async with project.transaction():
        await project.execute(migrate.LOCK)
        both = [asyncio.create_task(migrate.migrate(supabase)) for _ in range(2)]
        observer = await connect(supabase)
        waiting = (
            "select count(*) = 2 from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        )
        await wait_until(lambda: observer.fetchval(waiting))
        await observer.close()
    first, second = await asyncio.gather(*both)
    assert sorted(first.applied + second.applied) == ALL
    assert await ledger(project) == ALL


async def test_a_failing_file_is_rolled_back_and_those_before_it_stay(supabase, project, tmp_path, monkeypatch):
    bad = later_file("create table public.half (); perform 1 / 0")
    monkeypatch.setattr(migrate, "sql_directory", lambda: release(tmp_path, bad))
    with pytest.raises(ImageJobsError, match="Migration 0002_second failed: division by zero"):
        await migrate.migrate(supabase)
    assert await ledger(project) == ALL
    assert await project.fetchval("select to_regclass('public.half') is null")


async def test_migrate_gives_up_waiting_for_a_lock(supabase, project, tmp_path, monkeypatch):
    await migrate.migrate(supabase)
    change = later_file("alter table public.runs add b int")
    monkeypatch.setattr(migrate, "sql_directory", lambda: release(tmp_path, change))
    monkeypatch.setattr(migrate, "LOCK_PATIENCE", 0.2)
    async with project.transaction():
        await project.execute("select * from public.runs")
        with pytest.raises(ImageJobsError, match="0002_second could not get a lock") as error:
            await migrate.migrate(supabase)
    assert "again" in error.value.hint
    assert (await migrate.migrate(supabase)).applied == ["0002_second"]


async def test_a_bucket_of_another_name_is_the_only_one(supabase, project):
    await migrate.migrate(supabase, bucket="pictures")
    await migrate.migrate(supabase, bucket="pictures")
    await project.execute(migrations()[0].path.read_text())
    assert await project.fetchval("select public from storage.buckets where id = 'pictures'") is True
    assert await project.fetchval("select array_agg(id order by id) from storage.buckets") == [
        "image-sources",
        "pictures",
        "pictures-context",
        "pictures-kept",
    ]


@pytest.mark.parametrize("there", [[], ["20250101000000_todos.sql"], ["0001_todos.sql", "notes.txt"]])
def test_export_copies_what_a_folder_lacks_and_no_more(tmp_path: Path, there):
    folder = tmp_path / "migrations"
    if there:
        folder.mkdir()
    for name in there:
        (folder / name).touch()
    before = f"{datetime.now(UTC):%Y%m%d%H%M%S}"
    written = migrate.export(folder)
    assert [path.name[14:] for path in written] == [f"_image_jobs_{name}.sql" for name in ALL]
    assert before <= written[0].name[:14] <= f"{datetime.now(UTC):%Y%m%d%H%M%S}"
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in sorted(MIGRATIONS.glob("*.sql"))]
    assert migrate.export(folder) == []
    assert len(list(folder.iterdir())) == len(there) + len(ALL)


@pytest.mark.parametrize("folder", ["/proc/x", "/sys/x", "a" * 300])
def test_export_that_cannot_write_says_so(folder):
    with pytest.raises(ImageJobsError) as refused:
        migrate.export(Path(folder))
    assert refused.value.hint


def test_export_leaves_no_half_of_a_file(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ImageJobsError, match="cannot be copied"):
            migrate.export(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("newest", "expected"),
    [
        ("29991231235959_todos.sql", "30000101000000"),
        ("29990199999999_todos.sql", "29990200000000"),
        ("99999999999999999_todos.sql", "100000000000000000"),
    ],
)
def test_export_sorts_after_the_newest_there(tmp_path: Path, newest, expected):
    (tmp_path / newest).touch()
    (tmp_path / "20250101000000_older.sql").touch()
    assert migrate.export(tmp_path)[0].name == f"{expected}_image_jobs_{ALL[0]}.sql"


def test_export_of_a_release_copies_its_new_files_in_order(tmp_path: Path, monkeypatch):
    folder = tmp_path / "migrations"
    (first,) = migrate.export(folder)
    monkeypatch.setattr(migrate, "sql_directory", lambda: release(tmp_path / "sql", later_file("perform 1")))
    (second,) = migrate.export(folder)
    assert second.name > first.name
    assert second.name.endswith("_image_jobs_0002_second.sql")


def test_export_refuses_another_copy_and_a_missing_folder(tmp_path: Path):
    (copy,) = migrate.export(tmp_path)
    copy.write_text(copy.read_text().replace("begin", "begin perform 1;", 1))
    with pytest.raises(ImageJobsError, match="is another 0001 than this version's 0001_initial"):
        migrate.export(tmp_path)
    for folder in (copy, tmp_path / "no/supabase/migrations"):
        with pytest.raises(ImageJobsError, match="is no directory") as error:
            migrate.export(folder)
        assert "supabase init" in error.value.hint


async def test_missing_rights_are_explained(supabase, postgres, project):
    await postgres.sudo("drop role if exists visitor")
    await postgres.sudo("create role visitor login")
    stranger = supabase.replace("postgres@", "visitor@")
    with pytest.raises(ImageJobsError, match="not allowed") as error:
        await migrate.migrate(stranger)
    assert "postgres" in error.value.hint


def test_an_installed_package_finds_its_sql(tmp_path: Path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, site], check=True)
    code = "from daemon.migrate import *; print(sql_directory(), *migrations(), sep='\\n')"
    ask = [sys.executable, "-c", code]
    done = subprocess.run(ask, cwd=tmp_path, env={"PYTHONPATH": str(site)}, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str(site / "daemon/sql"), *ALL]
