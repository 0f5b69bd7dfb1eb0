"""Projection: how a node shows its runs, and which keys of node_data are ours."""

from uuid import uuid4

import asyncpg
import pytest

from tests.support.postgres import signed_in
from tests.support.protocol import IMAGE, Daemon, Db, as_operator, insert_node, node_data, run_in
from tests.support.runs import WORKFLOW, insert_run, insert_runs, run_row

PATHS = ("previewPath", "imagePath", "thumbnailPath")
OWN = (*PATHS, "status", "runId", "progress", "message", "previewUrl", "imageUrl", "thumbnailUrl", "error", "updatedAt")
FORGED = dict.fromkeys(OWN, "forged")


async def version(db: Db, node: str = "n") -> int:
    return await db.fetchval("select version from workflow_nodes where id = $1", node)


# what it shows


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        ("pending", {"status": "pending", "progress": 0}),
        ("running", {"status": "running", "progress": 0}),
        ("parked", {"status": "running", "progress": 0}),
        ("completed", {"status": "completed", "progress": 100, "imageUrl": IMAGE}),
        ("failed", {"status": "error", "progress": 0, "error": "No.", "message": "Ask again."}),
        ("cancelled", {"status": "cancelled", "progress": 0}),
    ],
)
async def test_a_node_shows_the_state_of_its_run(db: Db, daemon: Daemon, node: str, state: str, shown: dict) -> None:
    run = await run_in(db, daemon, state, nodeId=node)
    assert await node_data(db, node) == {"label": "mine", "runId": run, **shown}


async def test_a_node_shows_progress_a_message_and_a_preview(db: Db, daemon: Daemon, node: str) -> None:
    run = await insert_run(db, nodeId=node)
    claimed = await daemon.claim_one()
    await daemon.record(claimed, progress=40, message="Drawing.", preview_url="https://example.com/p.webp")
    shown = {"label": "mine", "runId": run, "status": "running"}
    assert await node_data(db, node) == {
        **shown,
        "progress": 40,
        "message": "Drawing.",
        "previewUrl": "https://example.com/p.webp",
    }
    await daemon.complete(claimed, thumbnailUrl="https://example.com/t.webp")
    assert await node_data(db, node) == {
        **shown,
        "status": "completed",
        "progress": 100,
        "imageUrl": IMAGE,
        "thumbnailUrl": "https://example.com/t.webp",
    }


@pytest.mark.parametrize("way", ["public", "authenticated"])
async def test_a_node_has_the_paths_of_its_pictures(db: Db, daemon: Daemon, node: str, way: str) -> None:
    run = await insert_run(db, nodeId=node)
    claimed = await daemon.claim_one()
    preview, image, thumbnail = (f"{WORKFLOW}/{run}{end}" for end in (".preview.webp", ".png", ".thumb.webp"))
    url = f"https://example.com/storage/v1/object/{way}/images/{preview}?v=12345678"
    await daemon.record(claimed, progress=40, preview_url=url)
    assert {name: (await node_data(db, node)).get(name) for name in PATHS} == {
        "previewPath": preview,
        "imagePath": None,
        "thumbnailPath": None,
    }
    await daemon.complete(claimed, imagePath=image, thumbnailPath=thumbnail)
    shown = await node_data(db, node)
    assert {name: shown.get(name) for name in PATHS} == {
        "previewPath": None,
        "imagePath": image,
        "thumbnailPath": thumbnail,
    }


async def test_a_preview_is_removed_with_its_run(db: Db, daemon: Daemon, node: str) -> None:
    await insert_run(db, nodeId=node)
    claimed = await daemon.claim_one()
    await daemon.record(claimed, progress=40, preview_url="https://example.com/p.webp")
    await daemon.settle(claimed, "retry", payload={"error": "Later."}, message="Trying again soon.", due_in=5)
    shown = await node_data(db, node)
    assert "previewUrl" not in shown
    assert (shown["status"], shown["progress"], shown["message"]) == ("pending", 0, "Trying again soon.")


async def test_a_node_says_when_it_changed(db: Db, node: str) -> None:
    await insert_run(db, nodeId=node)
    updated = await db.fetchval("select node_data ->> 'updatedAt' from workflow_nodes")
    assert abs((await db.fetchval("select now() - $1::text::timestamptz", updated)).total_seconds()) < 60
    assert updated.endswith("Z")


async def test_a_run_whose_node_does_not_exist_is_no_error(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "completed", nodeId="nowhere")
    assert (await run_row(db, run))["status"] == "completed"


async def test_a_run_without_a_node_is_no_error(db: Db, daemon: Daemon, node: str) -> None:
    await run_in(db, daemon, "completed")
    assert await node_data(db, node) == {"label": "mine"}


async def test_a_node_that_comes_after_its_runs_shows_the_newest(db: Db, daemon: Daemon) -> None:
    await run_in(db, daemon, "completed", nodeId="late")
    newest = await insert_run(db, nodeId="late")
    await insert_node(db, "late", WORKFLOW, label="mine")
    shown = {"label": "mine", "runId": newest, "status": "pending", "progress": 0}
    assert await node_data(db, "late") == {**shown, "imageUrl": IMAGE}  # until the new picture is there


async def test_the_node_of_a_foreign_workflow_is_not_touched(db: Db, daemon: Daemon, node: str) -> None:
    before = await version(db)
    await run_in(db, daemon, "completed", nodeId=node, workflow=uuid4())
    assert await node_data(db, node) == {"label": "mine"}
    assert await version(db) == before


async def test_a_later_node_shows_no_run_of_a_foreign_workflow(db: Db) -> None:
    await insert_run(db, nodeId="late", workflow=uuid4())
    await insert_node(db, "late", WORKFLOW)
    assert await node_data(db, "late") == {}


async def test_a_moved_node_shows_a_run_of_its_new_workflow(db: Db, daemon: Daemon, node: str) -> None:
    other = uuid4()
    await run_in(db, daemon, "completed", nodeId=node)
    theirs = await insert_run(db, nodeId=node, workflow=other)
    await db.execute("update workflow_nodes set workflow_id = $1", other)
    assert await node_data(db, node) == {"label": "mine", "runId": theirs, "status": "pending", "progress": 0}


@pytest.mark.parametrize("role", ["postgres", "service_role"])
async def test_a_run_that_an_operator_moves_leaves_its_node(db: Db, daemon: Daemon, node: str, role: str) -> None:
    first = await run_in(db, daemon, "completed", nodeId=node)
    second = await insert_run(db, nodeId=node)
    await insert_node(db, "other", WORKFLOW, label="other")
    move = "update runs set metadata = metadata || jsonb_build_object('nodeId', $2::text) where id = $1"
    await as_operator(db, role, move, second, "other")
    assert (await node_data(db, node))["runId"] == first
    assert await node_data(db, "other") == {"label": "other", "runId": second, "status": "pending", "progress": 0}
    await as_operator(db, role, move, first, "no such node")
    assert await node_data(db, node) == {"label": "mine"}
    await as_operator(db, role, move, first, "other")
    assert (await node_data(db, "other"))["runId"] == second


# which run owns it


async def test_the_highest_ticket_owns_the_node(db: Db, daemon: Daemon, node: str) -> None:
    older, newer = await insert_runs(db, 2, nodeId=node)
    assert (await node_data(db, node))["runId"] == newer
    for claimed in sorted(await daemon.claim(2), key=lambda claimed: claimed["id"] != newer):
        await daemon.complete(claimed, f"https://example.com/{claimed['id']}.png")
    shown = await node_data(db, node)
    assert shown["imageUrl"] == f"https://example.com/{newer}.png"
    assert shown["runId"] == newer != older


async def test_requeueing_an_older_run_gives_it_the_node(db: Db, daemon: Daemon, node: str) -> None:
    older = await run_in(db, daemon, "failed", nodeId=node)
    newer = await insert_run(db, nodeId=node)
    assert (await node_data(db, node))["runId"] == newer
    await db.execute("update runs set status = 'pending' where id = $1", older)
    assert (await node_data(db, node))["runId"] == older


async def test_the_old_image_stays_until_the_new_one_replaces_it(db: Db, daemon: Daemon, node: str) -> None:
    await run_in(db, daemon, "completed", nodeId=node)
    second = await insert_run(db, nodeId=node)
    assert (await node_data(db, node))["imageUrl"] == IMAGE
    claimed = await daemon.claim_one()
    await daemon.record(claimed, progress=50)
    shown = await node_data(db, node)
    assert (shown["runId"], shown["status"], shown["imageUrl"]) == (second, "running", IMAGE)
    await daemon.complete(claimed, "https://example.com/new.png")
    assert (await node_data(db, node))["imageUrl"] == "https://example.com/new.png"


@pytest.mark.parametrize("ending", ["failed", "cancelled"])
async def test_the_old_image_stays_if_the_new_one_never_comes(db: Db, daemon: Daemon, node: str, ending: str) -> None:
    await run_in(db, daemon, "completed", nodeId=node)
    await run_in(db, daemon, ending, nodeId=node)
    assert (await node_data(db, node))["imageUrl"] == IMAGE


async def test_a_thumbnail_never_outlives_its_image(db: Db, daemon: Daemon, node: str) -> None:
    await insert_run(db, nodeId=node)
    await daemon.complete(await daemon.claim_one(), thumbnailUrl="https://example.com/old.webp")
    await insert_run(db, nodeId=node)
    await daemon.complete(await daemon.claim_one(), "https://example.com/new.png")
    assert "thumbnailUrl" not in await node_data(db, node)


async def test_deleting_a_run_shows_the_one_before(db: Db, daemon: Daemon, node: str) -> None:
    first = await run_in(db, daemon, "completed", nodeId=node)
    second = await insert_run(db, nodeId=node)
    await db.execute("delete from runs where id = $1", second)
    assert await node_data(db, node) == {
        "label": "mine",
        "runId": first,
        "status": "completed",
        "progress": 100,
        "imageUrl": IMAGE,
    }
    await db.execute("delete from runs")
    assert await node_data(db, node) == {"label": "mine"}


async def test_deleting_an_older_run_changes_nothing(db: Db, daemon: Daemon, node: str) -> None:
    first = await run_in(db, daemon, "failed", nodeId=node)
    await insert_run(db, nodeId=node)
    before = await version(db)
    await db.execute("delete from runs where id = $1", first)
    assert await version(db) == before


# whose keys


@pytest.mark.parametrize("role", ["authenticated", "service_role"])
async def test_a_frontend_cannot_forge_our_keys(db: Db, daemon: Daemon, node: str, role: str) -> None:
    member = uuid4()
    await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", WORKFLOW, member)
    await run_in(db, daemon, "completed", nodeId=node)
    before = await node_data(db, node)
    async with signed_in(db, member if role == "authenticated" else None, role=role):
        await db.execute("update workflow_nodes set node_data = $1", {**FORGED, "label": "theirs", "colour": "red"})
    assert await node_data(db, node) == {**before, "label": "theirs", "colour": "red"}


async def test_our_keys_survive_a_write_of_the_whole_node_data(db: Db, daemon: Daemon, node: str) -> None:
    await run_in(db, daemon, "completed", nodeId=node)
    before = await node_data(db, node)
    await db.execute("""update workflow_nodes set node_data = '{"label": "dragged"}', position = '{"x": 1}'""")
    assert await node_data(db, node) == {**before, "label": "dragged"}


async def test_a_new_node_has_none_of_our_keys_until_it_has_a_run(db: Db) -> None:
    await insert_node(db, "n", WORKFLOW, label="mine", **FORGED)
    assert await db.fetchval("select node_data from workflow_nodes") == {"label": "mine"}


async def test_a_client_setting_is_not_the_projection(db: Db, daemon: Daemon, node: str) -> None:
    member = uuid4()
    await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", WORKFLOW, member)
    await run_in(db, daemon, "completed", nodeId=node)
    before = await node_data(db, node)
    async with signed_in(db, member):
        await db.execute("select set_config('image_jobs.writer', 'projection', true)")
        await db.execute("update workflow_nodes set node_data = $1, run_ticket = 0", {**FORGED, "label": "mine"})
    assert await node_data(db, node) == before


@pytest.mark.parametrize("data", [[], "text", 7, None])
async def test_node_data_is_an_object(db: Db, data: object) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError, match="node_data must be an object") as refused:
        await db.execute(
            "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ('n', $1, 'image', $2)",
            WORKFLOW,
            data,
        )
    assert refused.value.hint


async def test_an_upsert_keeps_what_the_node_shows(db: Db, daemon: Daemon, node: str) -> None:
    await run_in(db, daemon, "completed", nodeId=node)
    before = await node_data(db, node)
    created = await db.fetchval("select created_at from workflow_nodes")
    for _ in range(2):
        await db.execute(
            "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ('n', $1, 'image', $2) "
            "on conflict (id) do update set node_data = excluded.node_data, created_at = excluded.created_at",
            WORKFLOW,
            {"label": "upserted", **FORGED},
        )
    assert await node_data(db, node) == {**before, "label": "upserted"}
    assert await db.fetchval("select created_at from workflow_nodes") == created


# version


async def test_the_version_grows_with_every_change_only(db: Db, daemon: Daemon, node: str) -> None:
    versions = [await version(db)]

    async def grown() -> bool:
        versions.append(await version(db))
        assert versions[-1] >= versions[-2]
        return versions[-1] > versions[-2]

    await insert_run(db, nodeId=node)
    assert await grown()
    claimed = await daemon.claim_one()
    assert await grown()
    await daemon.record(claimed, progress=10)
    assert await grown()
    await daemon.record(claimed, progress=10)
    assert not await grown()
    await daemon.complete(claimed)
    assert await grown()
    await db.execute("""update workflow_nodes set position = '{"x": 5}'""")
    assert await grown()
    await db.execute("update workflow_nodes set position = position, node_data = node_data, version = 1")
    assert not await grown()


async def test_versions_come_from_one_sequence(db: Db, node: str) -> None:
    await insert_node(db, "m", WORKFLOW)
    assert await version(db, "m") > await version(db, node)
    await db.execute("""update workflow_nodes set position = '{"x": 5}' where id = $1""", node)
    assert await version(db, node) > await version(db, "m")
