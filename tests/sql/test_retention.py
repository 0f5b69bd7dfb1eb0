"""Old runs are pruned, files of runs that are gone are removed, and users are erased."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.support.postgres import connect, signed_in, wait_until
from tests.support.protocol import Daemon, Db, insert_node, move_clock, node_data, run_in
from tests.support.runs import WORKFLOW, insert_run, insert_runs, run_row

NOTHING = {"pruned": 0, "after": None, "refused": 0, "reason": None}
BUCKETS = ["images", "images-context", "images-kept"]
URL = "https://x.supabase.co/storage/v1/object/public/images"


@pytest.fixture
async def second(database: str) -> AsyncIterator[Db]:
    """Open a second connection."""
    connection = await connect(database)
    yield connection
    await connection.close()


async def prune(db: Db, older: str = "90 d", *, after: str = "", limit: int = 1000) -> dict[str, Any]:
    return await db.fetchval(
        "select image_jobs.prune_runs(image_jobs.now() - $1::text::interval, $2, $3)", older, after, limit
    )


async def walk(db: Db, keep: str | None = None, limit: int = 1000) -> dict[str, Any]:
    return await db.fetchval("select image_jobs.walk($1, $2::text::interval, $3)", BUCKETS, keep, limit)


async def removals(db: Db) -> list[str]:
    return [row[0] for row in await db.fetch("select run_id from image_jobs.file_removals order by 1")]


async def take(db: Db) -> dict[str, dict[str, list[str]]]:
    """Take what is due: files by bucket, by run."""
    rows = await db.fetch("select image_jobs.take_file_removals(100)")
    return {row[0]["run_id"]: row[0]["files"] for row in rows}


async def store(db: Db, *keys: str, bucket: str = "images", **metadata: str) -> None:
    """Put objects into storage's table, as the server does."""
    await db.executemany(
        "insert into storage.objects (bucket_id, name, user_metadata) values ($1, $2, $3)",
        [(bucket, key, metadata) for key in keys],
    )


async def exists(db: Db, run: str) -> bool:
    return await db.fetchval("select exists (select from runs where id = $1)", run)


# pruning


@pytest.mark.every_postgres
@pytest.mark.parametrize("state", ["completed", "failed", "cancelled"])
async def test_old_terminal_runs_go_with_their_events(db: Db, daemon: Daemon, state: str) -> None:
    run = await run_in(db, daemon, state)
    assert await prune(db) == NOTHING
    await move_clock(db, "91 days")
    assert await prune(db) == NOTHING | {"pruned": 1}
    assert not await exists(db, run)
    assert await db.fetchval("select count(*) from run_events where run_id = $1", run) == 0
    assert await removals(db) == [run]


@pytest.mark.parametrize("state", ["pending", "running", "parked"])
async def test_unfinished_runs_are_never_pruned(db: Db, daemon: Daemon, state: str) -> None:
    run = await run_in(db, daemon, state)
    await move_clock(db, "9 years")
    assert (await prune(db))["pruned"] == 0
    assert await exists(db, run)


async def test_runs_of_other_kinds_are_never_pruned(db: Db) -> None:
    await db.execute(
        "insert into runs (id, kind, subject_id, status, finished_at) values ('r', 'research', $1, 'completed', '2001-01-01')",
        WORKFLOW,
    )
    assert (await prune(db))["pruned"] == 0
    await db.execute("delete from runs where id = 'r'")
    assert await removals(db) == []


async def test_the_run_that_a_node_shows_is_kept(db: Db, daemon: Daemon, node: str) -> None:
    older = await run_in(db, daemon, "completed", nodeId=node)
    shown = await run_in(db, daemon, "completed", nodeId=node)
    before = await node_data(db, node)
    await move_clock(db, "91 days")
    assert (await prune(db))["pruned"] == 1
    assert (await exists(db, older), await exists(db, shown)) == (False, True)
    assert await node_data(db, node) == before


async def test_a_picture_that_a_node_still_shows_is_kept(db: Db, daemon: Daemon, node: str) -> None:
    shown = await insert_run(db, nodeId=node)
    url = f"{URL}/{WORKFLOW}/{shown}.png?v=0a1b2c3d"
    await daemon.complete(await daemon.claim_one(), url)
    await run_in(db, daemon, "failed", nodeId=node)
    assert (await node_data(db, node))["imageUrl"] == url
    await move_clock(db, "91 days")
    assert (await prune(db))["pruned"] == 0
    assert await exists(db, shown)


async def test_the_source_of_an_unfinished_run_is_kept(db: Db, daemon: Daemon) -> None:
    source = await run_in(db, daemon, "completed")
    other = await run_in(db, daemon, "completed")
    await insert_run(db, prompt={"previousImage": f"{URL}/{WORKFLOW}/{source}.png?v=0a1b2c3d"})
    await move_clock(db, "91 days")
    assert (await prune(db))["pruned"] == 1
    assert (await exists(db, source), await exists(db, other)) == (True, False)


@pytest.mark.parametrize("spelled", ["{}.png?from=/a", "{}.png#top", "%6A{}.png"])
async def test_a_source_is_kept_however_it_is_spelled(db: Db, daemon: Daemon, spelled: str) -> None:
    source = await run_in(db, daemon, "completed")
    name = spelled.format(source if "%" not in spelled else source.removeprefix("j"))
    await insert_run(db, prompt={"previousImage": f"{URL}/{WORKFLOW}/{name}"})
    await move_clock(db, "91 days")
    assert (await prune(db))["pruned"] == 0


@pytest.mark.every_postgres
async def test_a_run_that_the_application_keeps_stops_no_other(db: Db, daemon: Daemon) -> None:
    kept = await run_in(db, daemon, "completed")
    runs = [await run_in(db, daemon, "completed") for _ in range(2)]
    await db.execute("create table gallery (run_id varchar references runs (id))")
    await db.execute("insert into gallery values ($1)", kept)
    await move_clock(db, "91 days")
    done = await prune(db)
    assert (done["pruned"], done["refused"]) == (2, 1)
    assert "gallery" in done["reason"]
    assert await removals(db) == sorted(runs)
    assert (await walk(db, "90 d"))["reason"] == done["reason"]


async def test_a_walk_that_fails_stops_no_other(db: Db) -> None:
    await insert_run(db)
    await db.execute("update runs set status = 'cancelled'")
    await db.execute("alter table storage.objects rename to other")
    await db.execute("create view storage.objects as select 1 as nothing")
    await move_clock(db, "91 days")
    done = await walk(db, "90 d")
    assert done["pruned"] == 1
    assert "does not exist" in done["reason"]


async def test_files_of_an_earlier_bucket_go_with_their_run(db: Db, daemon: Daemon) -> None:
    await walk(db)
    run = await run_in(db, daemon, "completed")
    await store(db, f"{WORKFLOW}/{run}.png", image_jobs=run)
    await db.execute("insert into storage.buckets (id, name) values ('pics', 'pics')")
    await db.execute("select image_jobs.walk('{pics,pics-context,pics-kept}', null, 10)")
    await db.execute("delete from runs where id = $1", run)
    assert await take(db) == {run: {"images": [f"{WORKFLOW}/{run}.png"]}}


async def test_a_role_that_sees_no_files_removes_none(db: Db, daemon: Daemon, member: UUID) -> None:
    run = await run_in(db, daemon, "completed")
    await db.execute("delete from runs where id = $1", run)
    await db.execute(
        "grant execute on function image_jobs.take_file_removals(integer), image_jobs.sees_files(), image_jobs.now() to authenticated"
    )
    async with signed_in(db, member):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="cannot see what is stored"):
            async with db.transaction():
                await take(db)
    assert await removals(db) == [run]


async def test_pruning_frees_the_idempotency_key(db: Db, daemon: Daemon) -> None:
    await run_in(db, daemon, "completed", idempotencyKey="k")
    await move_clock(db, "91 days")
    await prune(db)
    await insert_run(db, idempotencyKey="k")


async def test_costs_of_pruned_runs_stay_in_the_books(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    await daemon.settle(
        claimed,
        "completed",
        payload={"imageUrl": f"{URL}/{WORKFLOW}/x.png"},
        calls=[{"id": claimed["call"], "state": "charged", "cost": 0.04, "image": True}],
    )
    await move_clock(db, "91 days")
    await prune(db)
    assert float(await db.fetchval("select cost from image_jobs.calls")) == 0.04


async def test_pruning_goes_on_where_a_step_ended(db: Db, daemon: Daemon) -> None:
    runs = sorted(await insert_runs(db, 5))
    await db.execute("update runs set status = 'cancelled'")
    await move_clock(db, "91 days")
    first = await prune(db, limit=3)
    assert first == NOTHING | {"pruned": 3, "after": runs[2]}
    assert await prune(db, after=first["after"], limit=3) == NOTHING | {"pruned": 2}


async def test_locked_runs_are_left_for_the_next_time(db: Db, second: Db, daemon: Daemon) -> None:
    locked, free = await run_in(db, daemon, "completed"), await run_in(db, daemon, "completed")
    await move_clock(db, "91 days")
    async with second.transaction():
        await second.execute("select from runs where id = $1 for update", locked)
        assert (await prune(db))["pruned"] == 1
    assert (await exists(db, locked), await exists(db, free)) == (True, False)


# walks


@pytest.mark.every_postgres
async def test_a_walk_prunes_step_by_step_then_rests(db: Db) -> None:
    await insert_runs(db, 5)
    await db.execute("update runs set status = 'cancelled'")
    await move_clock(db, "91 days")
    assert await walk(db, "90 d", 3) == {"pruned": 3, "found": 0, "more": True, "reason": None}
    assert await walk(db, "90 d", 3) == {"pruned": 2, "found": 0, "more": False, "reason": None}
    await insert_runs(db, 1)
    await db.execute("update runs set status = 'cancelled'")
    await move_clock(db, "182 days")
    assert (await walk(db, "90 d"))["pruned"] == 1


async def test_nothing_is_pruned_without_a_retention(db: Db) -> None:
    await insert_run(db)
    await db.execute("update runs set status = 'cancelled'")
    await move_clock(db, "9 years")
    assert (await walk(db))["pruned"] == 0


async def test_two_daemons_never_take_the_same_walk(db: Db, second: Db) -> None:
    await walk(db, "90 d")
    await insert_run(db)
    await db.execute("update runs set status = 'cancelled'")
    await db.execute("update image_jobs.walks set due_at = now() - interval '1 s'")
    async with second.transaction():
        await second.execute("select from image_jobs.walks where holds = 'runs' for update")
        await move_clock(db, "91 days")
        assert (await walk(db, "90 d"))["pruned"] == 0
    assert (await walk(db, "90 d"))["pruned"] == 1


@pytest.mark.every_postgres
async def test_files_of_truncated_runs_are_found(db: Db) -> None:
    run, living = await insert_runs(db, 2)
    for name in (run, living):
        await store(db, f"{WORKFLOW}/{name}.png", f"{WORKFLOW}/{name}.thumb.webp", image_jobs=name)
        await store(db, f"{WORKFLOW}/{name}.json", bucket="images-context")
        await store(db, f"{WORKFLOW}/{name}-7.bin", bucket="images-kept")
    row = await run_row(db, living)
    await db.execute("truncate runs cascade")
    await db.execute(
        "insert into runs (id, kind, subject_id, status, processor, metadata) values ($1, 'image_gen', $2, 'pending', $3, $4)",
        *(living, WORKFLOW, row["processor"], row["metadata"]),
    )
    assert (await walk(db))["found"] == 1
    assert await take(db) == {
        run: {
            "images": [f"{WORKFLOW}/{run}.png", f"{WORKFLOW}/{run}.thumb.webp"],
            "images-context": [f"{WORKFLOW}/{run}.json"],
            "images-kept": [f"{WORKFLOW}/{run}-7.bin"],
        }
    }


@pytest.mark.parametrize("holds", ["images-context", "images-kept"])
async def test_a_lost_file_beside_the_images_is_found(db: Db, holds: str) -> None:
    name = {"images-context": "lost.json", "images-kept": "lost-copy.png"}[holds]
    await store(db, f"{WORKFLOW}/{name}", bucket=holds)
    assert (await walk(db))["found"] == 1
    assert await take(db) == {"lost": {holds: [f"{WORKFLOW}/{name}"]}}


async def test_files_of_an_application_are_not_found(db: Db) -> None:
    names = (
        "logo.png",
        f"{WORKFLOW}/logo.png",
        f"{WORKFLOW}/a/b.png",
        f"{WORKFLOW}/a b.png",
        f"avatars/{WORKFLOW}.png",
    )
    await store(db, *names)
    await store(db, *(f"{name}.old" for name in names), owner="me")
    await store(db, *(f"{name}.older" for name in names), sha256="0a", request="r", preview="a")
    await store(db, f"{WORKFLOW}/a/b.webp", "no-uuid/a.png", f"{WORKFLOW}/other.png", image_jobs="a")
    assert (await walk(db))["found"] == 0


# removals


@pytest.mark.every_postgres
@pytest.mark.parametrize("state", ["pending", "parked", "completed", "failed", "cancelled"])
async def test_deleting_a_run_requests_the_removal_of_its_files(db: Db, daemon: Daemon, state: str) -> None:
    run = await run_in(db, daemon, state)
    await db.execute("delete from runs where id = $1", run)
    assert await take(db) == {run: {}}
    assert await take(db) == {}


async def test_files_of_a_run_deleted_at_work_go_later(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "running")
    await db.execute("delete from runs where id = $1", run)
    assert await take(db) == {}
    await move_clock(db, "6 min")
    assert await take(db) == {run: {}}


async def test_a_removal_takes_the_files_of_its_run_alone(db: Db) -> None:
    await db.execute(
        "insert into image_jobs.file_removals (workflow_id, run_id, due_at) values ($1, 'a', now())", WORKFLOW
    )
    mine = [f"{WORKFLOW}/a.1.png", f"{WORKFLOW}/a.png", f"{WORKFLOW}/a.preview.webp", f"{WORKFLOW}/a.thumb.webp"]
    others = ("ab.png", "a-1.png", "a_1.png", "a", "a.png/x.png", "a.PNG x", "A.png", "a-1.bin")
    await walk(db)
    await store(db, *mine, *(f"{WORKFLOW}/{name}" for name in others), f"{uuid4()}/a.png", "a.png", image_jobs="a")
    await store(db, f"{WORKFLOW}/a.svg", owner="me")
    await store(db, *mine, bucket="images-kept")
    await store(db, f"{WORKFLOW}/a-12.bin", f"{WORKFLOW}/a-copy.thumb.webp", bucket="images-kept")
    await store(
        db, *(f"{WORKFLOW}/{name}" for name in ("a-1-12.bin", "a-1-copy.png", "ab-1.bin")), bucket="images-kept"
    )
    assert await take(db) == {
        "a": {"images": sorted(mine), "images-kept": [f"{WORKFLOW}/a-12.bin", f"{WORKFLOW}/a-copy.thumb.webp"]}
    }


async def test_a_run_of_that_id_that_is_there_again_keeps_its_files(db: Db) -> None:
    run = await insert_run(db)
    await db.execute("update runs set status = 'cancelled'")
    row = await run_row(db, run)
    await db.execute("delete from runs")
    await db.execute(
        "insert into runs (id, kind, subject_id, status, processor, metadata) values ($1, 'image_gen', $2, 'pending', $3, $4)",
        *(run, WORKFLOW, row["processor"], row["metadata"]),
    )
    await store(db, f"{WORKFLOW}/{run}.png")
    assert await take(db) == {}
    assert await removals(db) == []


async def test_an_id_whose_files_are_being_removed_is_refused(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "completed")
    await db.execute("delete from runs where id = $1", run)
    await take(db)
    statement = """insert into runs (id, kind, subject_id, status, processor, metadata)
        values ($1, 'image_gen', $2, 'pending', 'demo:painter', '{"promptSpec": {"basePrompt": "a fox"}}')"""
    with pytest.raises(Exception, match="files of an earlier run") as refused:
        await db.execute(statement, run, WORKFLOW)
    assert refused.value.sqlstate == "22023"
    await db.execute("select image_jobs.finish_file_removal($1, $2, true)", WORKFLOW, run)
    await db.execute(statement, run, WORKFLOW)


async def test_a_removal_that_fails_is_tried_again_later(db: Db) -> None:
    await db.execute(
        "insert into image_jobs.file_removals (workflow_id, run_id, due_at) values ($1, 'a', now())", WORKFLOW
    )
    pauses = []
    for _ in range(12):
        await move_clock(db, "1 day")
        await db.execute("update image_jobs.file_removals set due_at = image_jobs.now()")
        assert await take(db) == {"a": {}}
        await db.execute("select image_jobs.finish_file_removal($1, 'a', false)", WORKFLOW)
        pauses.append(
            await db.fetchval(
                "select extract(epoch from due_at - image_jobs.now())::float8 from image_jobs.file_removals"
            )
        )
    assert pauses[:3] == pytest.approx([10, 20, 40], abs=1)
    assert pauses[-1] == pytest.approx(3600, abs=1)


# forgetting


@pytest.mark.every_postgres
async def test_forgetting_a_user_leaves_nothing_but_sums(db: Db, daemon: Daemon, member: UUID) -> None:
    other, shared = uuid4(), uuid4()
    await db.execute(
        "insert into workflow_members (workflow_id, user_id) values ($1, $2), ($1, $3)", shared, member, other
    )
    mine = await run_in(db, daemon, "completed")
    (theirs, ours) = await insert_runs(db, 2, workflow=shared)
    await db.execute("select set_config('image_jobs.writer', 'daemon', false)")
    await db.execute("update runs set created_by = $1 where id = $2", member, ours)
    await insert_node(db, "alone", WORKFLOW, label="mine")
    await insert_node(db, "together", shared, label="ours")
    await db.execute("update image_jobs.calls set user_id = $1", member)
    for user, workflow in ((member, WORKFLOW), (member, shared), (other, shared)):
        async with signed_in(db, user):
            await db.execute("select share_workflow($1)", workflow)

    assert await db.fetchval("select image_jobs.forget_user($1)", member) == {"runs": 2, "nodes": 1, "memberships": 2}
    assert await removals(db) == sorted([mine, ours])
    assert [row["id"] for row in await db.fetch("select id from runs")] == [theirs]
    assert [row["id"] for row in await db.fetch("select id from workflow_nodes")] == ["together"]
    assert [row["user_id"] for row in await db.fetch("select user_id from workflow_members")] == [other]
    assert [row["created_by"] for row in await db.fetch("select created_by from image_jobs.workflow_links")] == [other]
    assert await db.fetch("select run_id, user_id from image_jobs.calls") == [(mine, None)]


@pytest.mark.one_postgres
@pytest.mark.parametrize("held", ["own", "requeued"])
async def test_forgetting_a_user_deadlocks_with_no_settlement(
    db: Db, second: Db, database: str, member: UUID, held: str
) -> None:
    """All runs are locked before nodes: the last of more than a slice of the user's own, and that of another, which the user
    has requeued."""
    await insert_node(db, "n", WORKFLOW)
    await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", WORKFLOW, uuid4())
    own, requeued = await insert_run(db, nodeId="n"), await insert_run(db)
    more = await insert_runs(db, 1000 if held == "own" else 0)
    await db.execute("select set_config('image_jobs.writer', 'daemon', false)")
    await db.execute("update runs set created_by = $1 where id = any ($2)", member, [own, *more])
    await db.execute("update runs set requeued_by = $1 where id = $2", member, requeued)
    third = await connect(database)
    try:
        async with second.transaction():
            await second.execute("select from runs where id = $1 for update", more[-1] if more else requeued)
            forgetting = asyncio.create_task(third.fetchval("select image_jobs.forget_user($1)", member))
            waiting = "select exists (select from pg_locks where not granted and pid = $1)"
            await wait_until(lambda: db.fetchval(waiting, third.get_server_pid()))
            await second.execute("update workflow_nodes set position = '{}' where id = 'n'")
        assert (await forgetting)["runs"] == 1 + len(more)
    finally:
        await third.close()
    assert [row["id"] for row in await db.fetch("select id from runs where requeued_by is null")] == [requeued]


async def sources(db: Db) -> dict[str, list[str]]:
    """Lease removals of sources; return the names of each."""
    rows = await db.fetch("select image_jobs.take_source_removals(100)")
    return {row[0]["belongs_to"]: sorted(row[0]["names"]) for row in rows}


async def test_forgetting_a_user_removes_uploads(db: Db, member: UUID) -> None:
    shared, other = uuid4(), uuid4()
    for name, owner in ((f"{WORKFLOW}/a.png", other), (f"{shared}/b.png", member), (f"{shared}/c.png", other)):
        await db.execute(
            "insert into storage.objects (bucket_id, name, owner_id) values ('image-sources', $1, $2)", name, str(owner)
        )
    for user in (member, other):
        await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", shared, user)
    await db.execute("select image_jobs.forget_user($1)", member)
    assert await sources(db) == {"user": [f"{shared}/b.png"], "workflow": [f"{WORKFLOW}/a.png"]}
    assert await sources(db) == {}
    await db.execute("select image_jobs.finish_source_removal('user', $1, false)", member)
    assert await sources(db) == {}
    async with db.transaction():
        await db.execute("select set_config('storage.allow_delete_query', 'true', true)")
        await db.execute("delete from storage.objects where name like '%/b.png' or name like '%/a.png'")
    await db.execute("update image_jobs.source_removals set due_at = image_jobs.now()")
    assert await sources(db) == {}
    assert await db.fetch("select * from image_jobs.source_removals") == []


async def test_uploads_of_an_application_are_left_alone(db: Db, member: UUID) -> None:
    await db.execute("update image_jobs.project set own_buckets = '{}'")
    name = f"{WORKFLOW}/a.png"
    await db.execute(
        "insert into storage.objects (bucket_id, name, owner_id) values ('image-sources', $1, $2)", name, str(member)
    )
    await db.execute("select image_jobs.forget_user($1)", member)
    assert await sources(db) == {}
