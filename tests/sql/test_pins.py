"""show_run: an older picture of a node is shown again, and stays until there is a newer run."""

from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.support.postgres import signed_in
from tests.support.protocol import Daemon, Db, insert_node, move_clock, node_data, run_in
from tests.support.runs import WORKFLOW, insert_run

pytestmark = pytest.mark.one_postgres

URL = "https://x.supabase.co/storage/v1/object/public/images"


def picture(run: str) -> dict[str, str]:
    """Return what a completed run leaves in storage."""
    return {"imageUrl": f"{URL}/{WORKFLOW}/{run}.png", "imagePath": f"{WORKFLOW}/{run}.png"}


async def draw(db: Db, daemon: Daemon, node: str = "n", **options: Any) -> str:
    """Complete a run of the node, with a picture of its own."""
    run = await insert_run(db, nodeId=node, **options)
    await daemon.complete(await daemon.claim_one(), picture(run)["imageUrl"], imagePath=picture(run)["imagePath"])
    return run


async def shown(db: Db, node: str = "n") -> tuple[str, str, str | None]:
    """Return the run that a node shows, whose picture, and which run is pinned."""
    data = await node_data(db, node)
    pinned = await db.fetchval("select pinned_run from workflow_nodes where id = $1", node)
    path = data.get("imagePath", "")
    return data.get("runId", ""), path.removeprefix(f"{WORKFLOW}/").removesuffix(".png"), pinned


async def show(db: Db, run: str, user: UUID | None = None) -> dict[str, Any]:
    if user is None:
        return await db.fetchval("select show_run($1)", run)
    async with signed_in(db, user):
        return await db.fetchval("select show_run($1)", run)


@pytest.mark.every_postgres
@pytest.mark.parametrize("newest", ["completed", "failed", "cancelled"])
async def test_an_older_picture_is_shown_until_a_new_run(
    db: Db, daemon: Daemon, node: str, member: UUID, newest: str
) -> None:
    older = await draw(db, daemon)
    await run_in(db, daemon, newest, nodeId=node)
    books = await db.fetch("select r::text from runs r union all select c::text from image_jobs.calls c order by 1")
    assert (await show(db, older, member))["jobId"] == older
    assert await shown(db) == (older, older, older)
    data = await node_data(db, node)
    assert data == {"label": "mine", "status": "completed", "runId": older, "progress": 100, **picture(older)}
    assert books == await db.fetch(
        "select r::text from runs r union all select c::text from image_jobs.calls c order by 1"
    )
    await db.execute("insert into image_jobs.stale_nodes (node_id) values ($1)", node)
    await db.execute("select image_jobs.refresh_stale_nodes()")  # as a sync does, for whatever reason
    assert await shown(db) == (older, older, older)
    new = await insert_run(db, nodeId=node)
    assert await shown(db) == (new, older, None)  # the old picture stays until the new one is there
    await db.execute("update runs set status = 'cancelled' where id = $1", new)
    assert await shown(db) == (new, older, None)


async def test_a_requeue_clears_the_pin(db: Db, daemon: Daemon, node: str, member: UUID) -> None:
    older = await draw(db, daemon)
    failed = await run_in(db, daemon, "failed", nodeId=node)
    await show(db, older, member)
    async with signed_in(db, member):
        await db.execute("select requeue_run($1)", failed)
    assert await shown(db) == (failed, older, None)


async def test_a_new_run_clears_the_pin_of_a_locked_node(db: Db, daemon: Daemon, node: str, database: str) -> None:
    older, _newer = await draw(db, daemon), await draw(db, daemon)
    await show(db, older)
    other = await asyncpg.connect(database)
    try:
        async with other.transaction():
            await other.execute("select from workflow_nodes where id = $1 for update", node)
            run = await insert_run(db, nodeId=node)
            assert await shown(db) == (older, older, older)
        await db.execute("select image_jobs.refresh_stale_nodes()")
    finally:
        await other.close()
    assert await shown(db) == (run, older, None)


@pytest.mark.parametrize("state", ["pending", "running", "parked", "failed", "cancelled"])
async def test_only_completed_runs_are_shown(db: Db, daemon: Daemon, node: str, member: UUID, state: str) -> None:
    run = await run_in(db, daemon, state, nodeId=node)
    with pytest.raises(asyncpg.InvalidParameterValueError, match="has no picture to show") as refused:
        await show(db, run, member)
    assert refused.value.hint


@pytest.mark.parametrize("state", ["pending", "running", "parked"])
async def test_nothing_is_pinned_while_a_run_is_under_way(
    db: Db, daemon: Daemon, node: str, member: UUID, state: str
) -> None:
    older = await draw(db, daemon)
    await run_in(db, daemon, state, nodeId=node)
    before = await shown(db)
    with pytest.raises(asyncpg.InvalidParameterValueError, match="has a run in line or under way") as refused:
        await show(db, older, member)
    assert refused.value.hint == "Wait until it has ended, or cancel it first."
    assert await shown(db) == before


@pytest.mark.parametrize("options", [{}, {"nodeId": "elsewhere"}, {"nodeId": "foreign"}], ids=str)
async def test_a_run_without_a_node_is_not_shown(db: Db, daemon: Daemon, member: UUID, options: dict[str, str]) -> None:
    await insert_node(db, "foreign", uuid4())
    run = await run_in(db, daemon, "completed", **options)
    with pytest.raises(asyncpg.InvalidParameterValueError, match="has no node that could show it") as refused:
        await show(db, run, member)
    assert refused.value.hint


async def test_an_unknown_or_foreign_run_is_not_found(db: Db, daemon: Daemon, node: str, member: UUID) -> None:
    run = await draw(db, daemon)
    for asked, user in (("job_1", member), (run, uuid4())):
        with pytest.raises(asyncpg.PostgresError) as refused:
            await show(db, asked, user)
        assert (refused.value.sqlstate, refused.value.as_dict()["message"]) == ("PT404", "There is no such run.")


@pytest.mark.every_postgres
@pytest.mark.parametrize("pose", ["authenticated", "authenticated projection", "service_role"])
async def test_a_frontend_cannot_forge_a_pin(db: Db, daemon: Daemon, node: str, member: UUID, pose: str) -> None:
    role, _, writer = pose.partition(" ")
    older, newer = await draw(db, daemon), await draw(db, daemon)
    async with signed_in(db, member if role == "authenticated" else None, role=role):
        await db.execute("select set_config('image_jobs.writer', $1, true)", writer)
        await db.execute("update workflow_nodes set pinned_run = $1", older)
        await db.execute(
            "insert into workflow_nodes (id, workflow_id, node_type, node_data, pinned_run) "
            "values ('m', $1, 'image', '{}', $2)",
            WORKFLOW,
            older,
        )
    assert await shown(db) == (newer, newer, None)
    assert await shown(db, "m") == ("", "", None)
    await show(db, older, member)
    async with signed_in(db, member):  # dragged: the whole row is written back as it was loaded before
        await db.execute("update workflow_nodes set pinned_run = null, position = '{\"x\": 1}' where id = 'n'")
    assert await shown(db) == (older, older, older)


async def test_a_pin_is_broadcast(db: Db, daemon: Daemon, node: str) -> None:
    older, _newer = await draw(db, daemon), await draw(db, daemon)
    await db.execute("truncate realtime.messages")
    await show(db, older)
    (message,) = await db.fetch("select payload from realtime.messages where event = 'nodes_changed'")
    (sent,) = message["payload"]["nodes"]
    assert (sent["id"], sent["pinned_run"], sent["node_data"]["runId"]) == (node, older, older)
    assert "run_ticket" not in sent


async def test_a_deleted_pin_shows_the_newest_run(db: Db, daemon: Daemon, node: str) -> None:
    older, newer = await draw(db, daemon), await draw(db, daemon)
    await show(db, older)
    await db.execute("delete from runs where id = $1", older)
    assert await shown(db) == (newer, newer, None)


async def test_a_pin_outlives_the_newest_run(db: Db, daemon: Daemon, node: str) -> None:
    older, newer = await draw(db, daemon), await draw(db, daemon)
    await show(db, older)
    await db.execute("delete from runs where id = $1", newer)
    assert await shown(db) == (older, older, older)
    run = await insert_run(db, nodeId=node)
    assert await shown(db) == (run, older, None)


async def test_a_pinned_run_that_moves_shows_the_newest(db: Db, daemon: Daemon, node: str) -> None:
    await insert_node(db, "m", WORKFLOW)
    older, newer = await draw(db, daemon), await draw(db, daemon)
    await show(db, older)
    await db.execute("""update runs set metadata = metadata || '{"nodeId": "m"}' where id = $1""", older)
    assert (await shown(db), await shown(db, "m")) == ((newer, newer, None), (older, older, None))


async def test_a_pinned_run_is_never_pruned(db: Db, daemon: Daemon, node: str) -> None:
    """Also where its picture lies elsewhere, and its address does not say whose it is."""
    pinned = await run_in(db, daemon, "completed", nodeId=node)
    await run_in(db, daemon, "completed", nodeId=node)
    newest = await run_in(db, daemon, "completed", nodeId=node)
    await show(db, pinned)
    await move_clock(db, "91 days")
    done = await db.fetchval("select image_jobs.prune_runs(image_jobs.now() - interval '90 d', '', 1000)")
    assert done["pruned"] == 1
    assert [row["id"] for row in await db.fetch("select id from runs order by ticket")] == [pinned, newest]
    assert await db.fetchval("select pinned_run from workflow_nodes") == pinned


async def test_the_sweep_leaves_the_files_of_a_pinned_run(db: Db, daemon: Daemon, node: str) -> None:
    older, newer = await draw(db, daemon), await draw(db, daemon)
    for run in (older, newer, "gone"):
        await db.execute(
            "insert into storage.objects (bucket_id, name, user_metadata) values ('images', $1, $2)",
            f"{WORKFLOW}/{run}.png",
            {"image_jobs": run},
        )
    await show(db, older)
    await db.execute("delete from runs where id = $1", newer)
    await db.execute("select image_jobs.find_lost_files('images', 'images', '', 1000)")
    lost = await db.fetch("select run_id from image_jobs.file_removals order by 1")
    assert [row[0] for row in lost] == sorted([newer, "gone"])


async def test_a_forgotten_users_pin_goes_with_them(db: Db, daemon: Daemon, node: str, member: UUID) -> None:
    await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", WORKFLOW, uuid4())
    async with signed_in(db, member):
        theirs = await insert_run(db, nodeId=node)
    await daemon.complete(await daemon.claim_one(), picture(theirs)["imageUrl"], imagePath=picture(theirs)["imagePath"])
    newer = await draw(db, daemon)
    await show(db, theirs)
    await db.execute("select image_jobs.forget_user($1)", member)
    assert await shown(db) == (newer, newer, None)


@pytest.mark.parametrize("newest", ["failed", "cancelled"])
async def test_a_node_put_back_has_its_picture(db: Db, daemon: Daemon, node: str, newest: str) -> None:
    drawn = await draw(db, daemon)
    last = await run_in(db, daemon, newest, nodeId=node)
    await db.execute("delete from workflow_nodes")
    await insert_node(db, node, WORKFLOW, label="mine")
    assert await shown(db) == (last, drawn, None)


async def test_a_picture_goes_with_its_deleted_run(db: Db, daemon: Daemon, node: str) -> None:
    """Whether the node's newest run has one of its own, or not."""
    first, second = await draw(db, daemon), await draw(db, daemon)
    failed = await run_in(db, daemon, "failed", nodeId=node)
    await db.execute("delete from runs where id = $1", second)
    assert await shown(db) == (failed, first, None)
    await db.execute("delete from runs where id = $1", first)
    assert await shown(db) == (failed, "", None)
