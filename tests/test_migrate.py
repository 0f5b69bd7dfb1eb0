"""migrate: every file once, in order, in Supabase's own table, whoever ran it."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from daemon import migrate
from daemon.errors import ImageJobsError
from daemon.migrate import migrations, pending
from tests.postgres import MIGRATIONS, ROOT, connect, wait_until

ALL = [path.stem for path in sorted(MIGRATIONS.glob("*.sql"))]


@pytest.fixture
async def supabase(postgres):
    """The DSN of a Supabase project that has none of our migrations."""
    async with postgres.database(template=None) as dsn:
        yield dsn


@pytest.fixture
async def project(supabase):
    """A connection to `supabase`."""
    connection = await connect(supabase)
    yield connection
    await connection.close()


async def history(project) -> list[str]:
    rows = await project.fetch("select version, name from supabase_migrations.schema_migrations order by version")
    return [f"{row['version']}_{row['name']}" for row in rows]


@pytest.mark.every_postgres
async def test_it_runs_all_in_order_and_the_second_time_none(supabase, project):
    assert await pending(supabase) == ALL
    assert await migrate.migrate(supabase) == ALL
    assert await pending(supabase) == []
    assert await migrate.migrate(supabase) == []
    assert await history(project) == ALL
    assert await project.fetchval("select count(*) from public.runs") == 0


async def test_every_file_has_a_name_that_the_supabase_cli_accepts():
    assert [str(migration) for migration in migrations()] == ALL
    assert all(re.fullmatch(r"[0-9]+_.*\.sql", migration.path.name) for migration in migrations())
    assert len({migration.version for migration in migrations()}) == len(ALL)


async def test_what_the_supabase_cli_has_pushed_is_not_run_again(supabase, project):
    await migrate.migrate(supabase)
    # An old CLI had no other columns; a new one has them, and the file's statements one by one.
    await project.execute("alter table supabase_migrations.schema_migrations drop name, drop statements")
    assert await pending(supabase) == []
    assert await migrate.migrate(supabase) == []


async def test_only_what_is_missing_runs(supabase, project):
    await migrate.migrate(supabase)
    last = migrations()[-1]
    await project.execute("delete from supabase_migrations.schema_migrations where version = $1", last.version)
    assert await pending(supabase) == [str(last)]
    assert await migrate.migrate(supabase) == [str(last)]


async def test_of_two_at_once_one_waits_and_then_skips(supabase, project):
    # A stranger holds the history's lock until both are waiting for it, so that they start from the same place.
    async with project.transaction():
        await project.execute(migrate.HISTORY)
        both = [asyncio.create_task(migrate.migrate(supabase)) for _ in range(2)]
        observer = await connect(supabase)
        waiting = (
            "select count(*) = 2 from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        )
        await wait_until(lambda: observer.fetchval(waiting))
        await observer.close()
    first, second = await asyncio.gather(*both)
    assert sorted(first + second) == ALL
    assert await history(project) == ALL


async def test_a_file_that_fails_leaves_nothing_of_itself_and_all_before_it(supabase, project, tmp_path, monkeypatch):
    (tmp_path / "migrations").mkdir()
    (tmp_path / "migrations/0001_good.sql").write_text("create table public.good ();")
    (tmp_path / "migrations/0002_bad.sql").write_text("create table public.half ();\nselect 1 / 0;")
    monkeypatch.setattr(migrate, "sql_directory", lambda: tmp_path)
    with pytest.raises(ImageJobsError, match="Migration 0002_bad failed: division by zero"):
        await migrate.migrate(supabase)
    assert await history(project) == ["0001_good"]
    assert await project.fetchval(
        "select to_regclass('public.good') is not null and to_regclass('public.half') is null"
    )


async def test_it_does_not_queue_behind_a_long_transaction_for_ever(supabase, project, tmp_path, monkeypatch):
    (tmp_path / "migrations").mkdir()
    buckets = "create schema private; create function private.make_bucket(text) returns void return null;"
    (tmp_path / "migrations/0001_change.sql").write_text(f"alter table public.busy add b int; {buckets}")
    monkeypatch.setattr(migrate, "sql_directory", lambda: tmp_path)
    monkeypatch.setattr(migrate, "LOCK_TIMEOUT", "50ms")
    await project.execute("create table public.busy (a int)")
    async with project.transaction():
        await project.execute("select * from public.busy")
        with pytest.raises(ImageJobsError, match="0001_change could not get a lock") as error:
            await migrate.migrate(supabase)
    assert "again" in error.value.hint
    assert await migrate.migrate(supabase) == ["0001_change"]


async def test_a_migration_of_the_same_number_but_not_ours_is_refused(supabase, project):
    await project.execute(migrate.HISTORY)
    await project.execute("insert into supabase_migrations.schema_migrations (version, name) values ('0001', 'todos')")
    for ask in (pending, migrate.migrate):
        with pytest.raises(ImageJobsError, match=r"0001_todos, where ours is 0001_foundations") as error:
            await ask(supabase)
        assert "Rename yours" in error.value.hint


async def test_another_bucket_is_made_when_asked_for(supabase, project):
    await migrate.migrate(supabase, bucket="pictures")
    await migrate.migrate(supabase, bucket="pictures")
    assert await project.fetchval("select public from storage.buckets where id = 'pictures'") is True


async def test_who_may_not_is_told_so(supabase, postgres, project):
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
