"""The Supabase CLI beside `image-jobs migrate`: each has its own ledger, and neither is in the other's way."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from daemon import migrate
from tests.support.adoption import SPECIFICATION
from tests.support.dump import dump
from tests.support.migrations import later_file, release, without_comments
from tests.support.postgres import MIGRATIONS, ROOT, Cluster, connect
from tests.support.supabase_cli import SupabaseCli

# The CLI reads a file in a time that grows with the square of its size: some 20 seconds of CPU for ours.
pytestmark = pytest.mark.timeout(300)

ALL = [*(path.stem for path in sorted(MIGRATIONS.glob("*.sql"))), "0002_second"]
SHOP = "create table public.products (id int primary key); alter table public.products enable row level security;"


@pytest.fixture
async def project(postgres: Cluster) -> AsyncIterator[str]:
    """Yield the DSN of a Supabase project that our migrations have not seen."""
    async with postgres.database(template=None) as dsn:
        yield dsn


@pytest.fixture
async def db(project: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await connect(project)
    yield connection
    await connection.close()


@pytest.fixture
def cli(project: str, tmp_path: Path) -> SupabaseCli:
    """Return the CLI in an application's directory, with a migration of its own."""
    cli = SupabaseCli(tmp_path / "shop", project)
    cli.write("20250101000000_shop.sql", SHOP)
    return cli


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """Return the SQL of a release that has a second file, which replaces a function of the first."""
    body = "create or replace function image_jobs.now() returns timestamptz language sql return clock_timestamp()"
    return release(tmp_path / "sql", later_file(body))


async def test_migrate_and_export_follow_a_push_of_ours(
    project: str,
    db: "asyncpg.Connection[asyncpg.Record]",
    cli: SupabaseCli,
    second: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = migrate.export(cli.migrations)
    await cli.push()
    assert await migrate.pending(project) == []
    assert (await migrate.migrate(project)).applied == []
    assert [step.state for step in (await migrate.migrate(project)).steps] == ["there"] * 10

    monkeypatch.setattr(migrate, "sql_directory", lambda: second)
    assert (await migrate.migrate(project)).applied == ["0002_second"]
    once = await dump(db)
    (later,) = migrate.export(cli.migrations)
    assert later.name > first[0].name
    await cli.push()
    assert await dump(db) == once
    assert all(here == there for here, there in await cli.versions())


async def test_own_pushes_go_on_after_migrate(
    project: str,
    db: "asyncpg.Connection[asyncpg.Record]",
    cli: SupabaseCli,
    second: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_comments(second)
    monkeypatch.setattr(migrate, "sql_directory", lambda: second)
    await cli.push()
    assert (await migrate.migrate(project)).applied == ALL
    cli.write("20250102000000_orders.sql", "create table public.purchases (id int primary key)")
    await cli.push()

    # The first file comes after the second one has run, and downgrades nothing.
    once = await dump(db)
    exported = [path.name for path in migrate.export(cli.migrations)]
    await cli.push()
    assert await dump(db) == once
    rows = await db.fetch(
        "select version || '_' || name || '.sql' from supabase_migrations.schema_migrations order by 1"
    )
    assert [row[0] for row in rows] == ["20250101000000_shop.sql", "20250102000000_orders.sql", *exported]

    cli.write("20250103000000_merged_later.sql", "create table public.prices (id int primary key)")
    refused = await cli("db", "push")
    assert (refused.code, "--include-all" in refused.out + refused.err) == (1, True)
    await cli.push("--include-all")
    assert all(here == there for here, there in await cli.versions())


async def test_advisors_have_no_warning_about_ours(
    project: str, db: "asyncpg.Connection[asyncpg.Record]", cli: SupabaseCli
) -> None:
    await migrate.migrate(project)
    assert await cli.advisors() == set()
    # They look at ours, too.
    await db.execute("alter function public.cancel_run(varchar) reset search_path")
    assert await cli.advisors() == {
        ("function_search_path_mutable", "Function `public.cancel_run` has a role mutable search_path")
    }


OWN_POLICIES = """
    alter table runs enable row level security;
    alter table run_events enable row level security;
    alter table workflow_nodes enable row level security;
    create policy "Own runs" on runs to authenticated using (subject_id = (select auth.uid()));
    create policy "Own events" on run_events for select to authenticated using (true);
    create policy "Own nodes" on workflow_nodes to authenticated using (workflow_id = (select auth.uid()));
"""


@pytest.mark.parametrize("policies", ["", OWN_POLICIES], ids=["without policies", "with policies"])
async def test_advisors_find_policies_of_both_on_adopted_tables(
    project: str, db: "asyncpg.Connection[asyncpg.Record]", cli: SupabaseCli, policies: str
) -> None:
    await db.execute(SPECIFICATION + policies)
    before = await cli.advisors()
    await migrate.migrate(project)
    new = await cli.advisors() - before
    assert {lint for lint, _ in new} == {"multiple_permissive_policies"}
    tables = {re.findall(r"^Table `public\.(\w+)`", detail)[0] for _, detail in new}
    assert tables <= {"runs", "run_events", "workflow_nodes"}
    assert "multiple_permissive_policies" in (ROOT / "README.md").read_text()
