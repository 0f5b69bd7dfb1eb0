"""Who sees which object of Storage: members those of their workflows, by policies that touch nothing of an application's."""

from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import asyncpg
import pytest

from daemon.migrate import migrate
from tests.support.postgres import Cluster, connect, signed_in
from tests.support.protocol import Db
from tests.support.runs import WORKFLOW

pytestmark = pytest.mark.one_postgres

SOURCES = "image-sources"
OTHER = UUID("bbbbbbbb-0000-4000-8000-000000000000")
SEES = "select bucket_id, name from storage.objects order by 1, 2"


async def store(db: Db, bucket: str, *names: str, metadata: dict[str, str] | None = None) -> None:
    await db.execute("insert into storage.buckets (id, name) values ($1, $1) on conflict do nothing", bucket)
    for name in names:
        await db.execute(
            "insert into storage.objects (bucket_id, name, user_metadata) values ($1, $2, $3)", bucket, name, metadata
        )


async def seen(db: Db, user: object | None, role: str = "authenticated") -> list[tuple[str, str]]:
    async with signed_in(db, None if user is None else str(user), role):
        return [tuple(row) for row in await db.fetch(SEES)]


async def test_only_members_see_pictures_and_sources(db: Db, member: object) -> None:
    await store(db, "images", f"{WORKFLOW}/job_1.png", f"{OTHER}/job_2.png")
    await store(db, SOURCES, f"{WORKFLOW}/mine.png", f"{OTHER}/theirs.png")
    for beside in ("images-context", "images-kept"):
        await store(db, beside, f"{WORKFLOW}/job_1.json")
    assert await seen(db, member) == [(SOURCES, f"{WORKFLOW}/mine.png"), ("images", f"{WORKFLOW}/job_1.png")]
    assert await seen(db, uuid4()) == []
    assert await seen(db, None, "anon") == []


async def test_former_members_see_no_objects(db: Db, member: object) -> None:
    await store(db, "images", f"{WORKFLOW}/before.png")
    await db.execute("delete from workflow_members where user_id = $1", UUID(str(member)))
    await store(db, "images", f"{WORKFLOW}/after.png")
    assert await seen(db, member) == []


@pytest.mark.parametrize(
    "name",
    [
        "x.png",
        "/a",
        "//a.png",
        "a/b.png",
        f"{WORKFLOW}",
        f"{WORKFLOW}/",
        f"/{WORKFLOW}/a.png",
        f"{str(WORKFLOW).upper()}/a.png",
        "%",
    ],
)
async def test_other_names_are_hidden_and_break_nothing(db: Db, member: object, name: str) -> None:
    for bucket in ("images", SOURCES):
        await store(db, bucket, name, f"{WORKFLOW}/job_1.png")
    assert await seen(db, member) == [(SOURCES, f"{WORKFLOW}/job_1.png"), ("images", f"{WORKFLOW}/job_1.png")]


async def test_members_add_and_delete_sources_but_change_none(db: Db, member: object) -> None:
    insert = "insert into storage.objects (bucket_id, name) values ($1, $2)"
    await store(db, SOURCES, f"{OTHER}/theirs.png")
    async with signed_in(db, str(member)):
        await db.execute(insert, SOURCES, f"{WORKFLOW}/mine.png")
    async with signed_in(db, str(member)):
        assert await db.execute("update storage.objects set name = name || 'x'") == "UPDATE 0"
    refused = [(SOURCES, f"{OTHER}/a.png"), (SOURCES, "a.png"), (SOURCES, "/a"), ("images", f"{WORKFLOW}/a.png")]
    for bucket, name in refused:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with signed_in(db, str(member)):
                await db.execute(insert, bucket, name)
    for user, left in ((uuid4(), 2), (member, 1)):
        async with signed_in(db, str(user)):
            await db.execute("select set_config('storage.allow_delete_query', 'true', true)")
            await db.execute("delete from storage.objects")
        assert await db.fetchval("select count(*) from storage.objects") == left
    assert await db.fetchval("select name from storage.objects") == f"{OTHER}/theirs.png"


UPLOAD = "insert into storage.objects (bucket_id, name) values ($1, $2)"


@pytest.mark.parametrize(("count", "size"), [(1000, 1), (2, 1_000_000_000)], ids=["pictures", "bytes"])
async def test_a_workflow_takes_a_limited_number_of_sources(db: Db, member: object, count: int, size: int) -> None:
    await store(db, SOURCES, f"{OTHER}/theirs.png")
    await db.execute(
        """insert into storage.objects (bucket_id, name, metadata)
        select $1, $2 || '/' || n || '.png', jsonb_build_object('size', $3::bigint) from generate_series(1, $4) n""",
        SOURCES,
        str(WORKFLOW),
        size,
        count,
    )
    another = uuid4()
    await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", another, UUID(str(member)))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with signed_in(db, str(member)):
            await db.execute(UPLOAD, SOURCES, f"{WORKFLOW}/more.png")
    async with signed_in(db, str(member)):
        await db.execute(UPLOAD, SOURCES, f"{another}/first.png")
    await db.execute("select set_config('storage.allow_delete_query', 'true', false)")
    await db.execute("delete from storage.objects where name = $1", f"{WORKFLOW}/1.png")
    async with signed_in(db, str(member)):
        await db.execute(UPLOAD, SOURCES, f"{WORKFLOW}/more.png")


async def test_the_limit_of_sources_reads_one_folder(db: Db, member: object) -> None:
    await db.execute(
        """insert into storage.objects (bucket_id, name)
        select 'image-sources', gen_random_uuid() || '/a.png' from generate_series(1, 20000)"""
    )
    await db.execute('create index if not exists as_hosted on storage.objects (bucket_id, name collate "C")')
    await db.execute("analyze storage.objects")
    async with signed_in(db, str(member)):
        looks = [
            await db.fetchval(
                "explain (analyze, buffers, format json) select image_jobs.may_upload($1)", f"{WORKFLOW}/more.png"
            )
            for _ in range(5)
        ]
    plans = [explained[0]["Plan"] for explained in looks]
    # The first one reads the catalogues, and so does one after an analyze of the server's own.
    assert min(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] for plan in plans) < 50


async def test_another_bucket_takes_the_policy_along(db: Db, member: object) -> None:
    await store(db, "images", f"{WORKFLOW}/old.png")
    await db.execute("select image_jobs.set_up('pictures')")
    await store(db, "pictures", f"{WORKFLOW}/new.png")
    assert await seen(db, member) == [("pictures", f"{WORKFLOW}/new.png")]


async def test_private_is_made_and_remembered_but_never_undone(db: Db) -> None:
    async def public() -> bool:
        return await db.fetchval("select public from storage.buckets where id = 'images'")

    await db.execute("select image_jobs.set_up('images', true)")
    assert not await public()
    await db.execute("update storage.buckets set public = true where id = 'images'")
    await db.execute("select image_jobs.set_up()")
    assert not await public()
    await db.execute("select image_jobs.set_up('images', false)")
    assert not await public()


# an application that was there before, with buckets of these names


@pytest.fixture
async def adopted(postgres: Cluster) -> AsyncIterator[Db]:
    """Connect to a project that had our buckets' names, and one more, with policies of its own, before it was migrated."""
    async with postgres.database(template=None) as dsn:
        db = await connect(dsn)
        await db.execute("""
            insert into storage.buckets (id, name, public) values
              ('images', 'images', false), ('image-sources', 'image-sources', false), ('avatars', 'avatars', false);
            create policy "Users see their avatars" on storage.objects for select to authenticated
              using (bucket_id = 'avatars' and split_part(name, '/', 1) = auth.uid()::text);
        """)
        await migrate(dsn)
        yield db
        await db.close()


async def test_files_of_an_application_stay_hidden(adopted: Db) -> None:
    """A bucket of ours by name may have folders of users in it; and anybody may found a workflow of such an id."""
    victim, stranger = uuid4(), uuid4()
    for bucket in ("images", SOURCES):
        await store(adopted, bucket, f"{victim}/passport.png")
    await store(adopted, "images", f"{victim}/job_1.png", metadata={"image_jobs": "job_1"})
    await adopted.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", victim, stranger)
    assert await seen(adopted, stranger) == [("images", f"{victim}/job_1.png")]
    states = await adopted.fetch("select step, state, note from image_jobs.check_set_up('images')")
    absent = [row["step"] for row in states if row["state"] == "absent"]
    assert len(absent) == 3
    assert all("sources" in step for step in absent)
    assert {row["state"] for row in states if row["step"] not in absent} == {"there"}


async def plan(db: Db, user: UUID, query: str) -> tuple[str, list[str]]:
    """Return the plan that a query has for a user, and its rows."""
    async with signed_in(db, user):
        lines = await db.fetch(f"explain (analyze, costs off, timing off, summary off) {query}")
        return "\n".join(line[0] for line in lines), [row["name"] for row in await db.fetch(query)]


async def test_listing_other_buckets_costs_what_it_did(adopted: Db) -> None:
    user = uuid4()
    await adopted.execute(
        """insert into storage.objects (bucket_id, name)
        select 'avatars', u || '/' || n || '.png' from unnest(array[$1, gen_random_uuid()]) u, generate_series(1, 500) n""",
        user,
    )
    await adopted.execute("set enable_seqscan = off")
    query = f"select name from storage.objects where bucket_id = 'avatars' and name >= '{user}/' and name < '{user}0'"
    text, names = await plan(adopted, user, query)
    assert len(names) == 500
    assert "Index" in text
    # The workflows are asked for by no row of another bucket.
    assert "never executed" in text
    for policy in ("Members see the pictures of their workflows", "Members see the sources of their workflows"):
        await adopted.execute(f'drop policy if exists "{policy}" on storage.objects')
    assert (await plan(adopted, user, query))[1] == names


async def test_workflows_are_asked_for_once_a_statement(db: Db, member: object) -> None:
    await store(db, "images", *(f"{WORKFLOW}/job_{n}.png" for n in range(50)))
    text, names = await plan(db, UUID(str(member)), "select name from storage.objects where bucket_id = 'images'")
    assert len(names) == 50
    assert "SubPlan" not in text
    assert "loops=50" not in text
