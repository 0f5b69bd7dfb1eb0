"""Storage and Realtime are present, absent, half made, come later, or let nobody in: the rest works, and all is said."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from daemon.indexes import build_indexes
from daemon.migrate import Migrated, migrate
from tests.support.postgres import MIGRATIONS, SUPABASE, Cluster, connect, wait_until
from tests.support.protocol import new_daemon, run_in

pytestmark = pytest.mark.every_postgres

BUCKETS = tuple(f"the bucket {name}" for name in ("images", "images-context", "images-kept", "image-sources"))
POLICIES = tuple(
    f'the policy "{name}" on storage.objects'
    for name in (
        "Members see the pictures of their workflows",
        "Members see the sources of their workflows",
        "Members add sources to their workflows",
        "Members delete the sources of their workflows",
    )
)
POLICY = 'the policy "Members hear the nodes of their workflows" on realtime.messages'
PUBLICATION = "workflow_nodes in the publication supabase_realtime"

COLUMNS = ("public boolean default false", "file_size_limit bigint", "allowed_mime_types text[]")
NO_COLUMNS = f"alter table storage.buckets {', '.join(f'drop column {column.split()[0]}' for column in COLUMNS)}"
ALL_COLUMNS = f"alter table storage.buckets {', '.join(f'add column {column}' for column in COLUMNS)}"
# Made by the superuser before our migrations: the states of what is not there, a word of each reason, what comes later.
SHAPES: dict[str, tuple[str, dict[str, tuple[str, str]], str]] = {
    "neither": (
        "drop schema storage cascade; drop schema realtime cascade; drop publication supabase_realtime",
        {PUBLICATION: ("absent", "no such publication")},
        SUPABASE.read_text(),
    ),
    "no table of buckets": (
        "drop table storage.buckets cascade",
        {
            **dict.fromkeys(BUCKETS, ("later", "lacks allowed_mime_types, file_size_limit, id, name, public")),
            **dict.fromkeys(POLICIES, ("later", "lack buckets.allowed_mime_types")),
        },
        SUPABASE.read_text(),
    ),
    "buckets without their later columns": (
        NO_COLUMNS,
        {
            **dict.fromkeys(BUCKETS, ("later", "lacks allowed_mime_types, file_size_limit, public")),
            **dict.fromkeys(POLICIES, ("later", "lack buckets.allowed_mime_types")),
        },
        ALL_COLUMNS,
    ),
    "objects without a later column": (
        "alter table storage.objects drop column user_metadata",
        dict.fromkeys(POLICIES, ("later", "lack objects.user_metadata")),
        "alter table storage.objects add column user_metadata jsonb",
    ),
    "objects of somebody else": (
        "alter table storage.objects owner to supabase_admin",
        dict.fromkeys(POLICIES, ("refused", "must be owner of")),
        "alter table storage.objects owner to supabase_storage_admin",
    ),
    "no messages of Realtime": (
        "drop table realtime.messages cascade",
        {POLICY: ("later", "has not made realtime.messages")},
        SUPABASE.read_text(),
    ),
    "no topic of Realtime": (
        "drop function realtime.topic() cascade",
        {POLICY: ("later", "has not made realtime.messages")},
        SUPABASE.read_text(),
    ),
    "messages of somebody else": (
        "alter table realtime.messages owner to supabase_admin",
        {POLICY: ("refused", "must be owner of table messages")},
        "alter table realtime.messages owner to supabase_realtime_admin",
    ),
    "a closed Storage": (
        "revoke all on storage.buckets from postgres, supabase_storage_admin, anon, authenticated, service_role",
        dict.fromkeys(BUCKETS, ("refused", "permission denied for table buckets")),
        "grant all on storage.buckets to postgres",
    ),
    "a publication of somebody else": (
        "alter publication supabase_realtime owner to supabase_admin",
        {PUBLICATION: ("refused", "must be owner of publication")},
        "alter publication supabase_realtime owner to postgres",
    ),
}


@pytest.fixture
async def project(postgres: Cluster) -> AsyncIterator[str]:
    """Yield the DSN of a Supabase project that our migrations have not seen."""
    async with postgres.database(template=None) as dsn:
        yield dsn


def lacking(done: Migrated) -> dict[str, str]:
    """Return what is not there, with its state."""
    return {step.step: step.state for step in done.steps if step.state not in ("there", "made")}


@pytest.mark.parametrize(("before", "expected", "later"), SHAPES.values(), ids=SHAPES)
async def test_migrate_makes_what_it_may_and_the_rest_later(
    postgres: Cluster, project: str, before: str, expected: dict[str, tuple[str, str]], later: str
) -> None:
    name = project.rpartition("/")[2]
    await postgres.sudo(before, name)
    done = await migrate(project)
    assert lacking(done) == {step: state for step, (state, _) in expected.items()}
    for step in done.steps:
        assert expected.get(step.step, ("", ""))[1] in (step.note or "")
    db = await connect(project)
    await run_in(db, await new_daemon(db), "completed")
    assert lacking(await migrate(project)) == lacking(done)

    await postgres.sudo(later, name)
    # By the file's last line: its block changes nothing any more.
    await db.execute(max(MIGRATIONS.glob("*.sql")).read_text())
    states = await db.fetch("select step, state from image_jobs.check_set_up('images')")
    assert {row["step"]: row["state"] for row in states} == dict.fromkeys(
        (*BUCKETS, *POLICIES, POLICY, PUBLICATION), "there"
    )
    await db.close()


async def test_each_command_makes_its_step(postgres: Cluster, project: str) -> None:
    await migrate(project)
    name = project.rpartition("/")[2]
    await postgres.sudo(
        """
        set session_replication_role = replica;
        delete from storage.buckets;
        drop policy "Members see the pictures of their workflows" on storage.objects;
        drop policy "Members see the sources of their workflows" on storage.objects;
        drop policy "Members add sources to their workflows" on storage.objects;
        drop policy "Members delete the sources of their workflows" on storage.objects;
        drop policy "Members hear the nodes of their workflows" on realtime.messages;
        alter publication supabase_realtime drop table public.workflow_nodes;
        """,
        name,
    )
    db = await connect(project)
    steps = await db.fetch("select * from image_jobs.check_set_up('images')")
    assert {row["state"] for row in steps} == {"missing"}
    for step in steps:
        await db.execute(step["command"])
    assert {step.state for step in (await migrate(project)).steps} == {"there"}
    await db.close()


async def test_a_refused_step_is_a_warning_with_its_sql(postgres: Cluster, project: str) -> None:
    await postgres.sudo("alter table realtime.messages owner to supabase_admin", project.rpartition("/")[2])
    db = await connect(project)
    heard: list[tuple[str, str, str]] = []
    db.add_log_listener(lambda _, message: heard.append((message.severity, message.message, message.hint)))
    await db.execute(next(MIGRATIONS.glob("0001_*.sql")).read_text())
    (warning,) = [said for said in heard if said[0] == "WARNING"]
    assert warning[1] == f"The{POLICY[3:]} could not be made: must be owner of table messages."
    assert "create policy" in warning[2]
    await db.close()


async def test_of_two_at_once_the_second_finds_it_made(postgres: Cluster, project: str) -> None:
    await migrate(project)
    await postgres.sudo(
        'drop policy "Members hear the nodes of their workflows" on realtime.messages', project.rpartition("/")[2]
    )
    first = await connect(project)
    async with first.transaction():
        await first.execute("select pg_advisory_xact_lock(hashtextextended('image_jobs.set_up', 0))")
        both = [asyncio.create_task(migrate(project)) for _ in range(2)]
        waiting = "select count(*) = 2 from pg_locks where locktype = 'advisory' and not granted"
        await wait_until(lambda: first.fetchval(waiting))
    states = sorted(step.state for done in await asyncio.gather(*both) for step in done.steps if step.step == POLICY)
    assert states == ["made", "there"]
    await first.close()


@pytest.mark.one_postgres
async def test_quoted_identifiers_make_no_difference(postgres: Cluster, project: str) -> None:
    await postgres.sudo(f"alter database {project.rpartition('/')[2]} set quote_all_identifiers = on")
    await migrate(project)
    again = await migrate(project)
    assert {step.state for step in again.steps} == {"there"}
    db = await connect(project)
    sql = max(MIGRATIONS.glob("*.sql")).read_text()
    assert await build_indexes(db, sql, timeout=60) == []
    await db.close()
