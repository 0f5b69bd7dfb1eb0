"""Members forge nothing: no column of a run that is ours, and no write in the name of the daemon."""

import asyncpg
import pytest

from tests.sql.test_rls import ANN, ANNS, BOB, BOBS, DENIED, asking, everything
from tests.sql.test_rls import db as db  # noqa: PLC0414 - a fixture
from tests.support.postgres import signed_in

pytestmark = pytest.mark.every_postgres


OWN_COLUMNS = {
    "payload": '{"imageUrl": "https://evil.example/x.png"}',
    "progress": "50",
    "priority": "9",
    "attempt": "-5",
    "max_attempts": "99",
    "claim": "1",
    "ticket": "9223372036854775807",
    "claimed_by": str(ANN),
    "provider_job_id": "job",
    "created_by": str(BOB),
    "finished_at": "2020-01-01",
    "message": "x",
    "preview_url": "https://evil.example/x.png",
    "lane": "x",
    "rank": "-1",
    "workflow_rank": "-1",
    "submitted_at": "2020-01-01",
    "refused_since": "2020-01-01",
    "webhook": "came",
    "routed_to": "google:gemini-3-pro-image",
    "call": "1",
    "unheld": "true",
    "source_workflow": str(BOBS),
    "queue_state": "pending",
    "queued_at": "2020-01-01",
    "requeued_by": str(BOBS),
}


async def test_a_member_forges_no_column_of_a_run(db):
    for column, value in OWN_COLUMNS.items():
        with pytest.raises(asyncpg.InvalidParameterValueError) as refused:
            async with signed_in(db, ANN):
                await db.execute(
                    f"insert into runs (kind, subject_id, status, processor, metadata, {column}) "
                    f"values ('image_gen', $1, 'pending', 'demo:painter', $2, '{value}')",
                    ANNS,
                    asking(),
                )
        assert refused.value.hint


async def test_every_column_of_a_run_is_a_members_or_ours(db):
    """A new column has to be put on one side or the other."""
    columns = {
        row[0] for row in await db.fetch("select column_name from information_schema.columns where table_name = 'runs'")
    }
    theirs = {"id", "kind", "subject_id", "status", "processor", "metadata", "due_at"}
    overwritten = {"started_at", "created_at", "updated_at"}
    assert columns == set(OWN_COLUMNS) | theirs | overwritten


async def test_a_member_inserts_pending_runs_only(db):
    for status in ("running", "completed", "failed", "cancelled", "research", ""):
        with pytest.raises(asyncpg.InvalidParameterValueError):
            async with signed_in(db, ANN):
                await db.execute(
                    "insert into runs (kind, subject_id, status, processor, metadata) "
                    "values ('image_gen', $1, $2, 'demo:painter', $3)",
                    ANNS,
                    status,
                    asking(),
                )


async def test_times_set_by_a_member_are_ignored(db):
    async with signed_in(db, ANN):
        row = await db.fetchrow(
            "insert into runs (kind, subject_id, status, processor, metadata, created_at, updated_at, started_at) "
            "values ('image_gen', $1, 'pending', 'demo:painter', $2, '2000-01-01', '2000-01-01', '2000-01-01') returning *",
            ANNS,
            asking(),
        )
    assert row["created_at"] == row["updated_at"] == row["started_at"]
    assert row["created_at"].year > 2000


async def test_a_member_inserts_no_run_of_another_kind(db):
    with pytest.raises(DENIED):
        async with signed_in(db, ANN):
            await db.execute(
                "insert into runs (id, kind, subject_id, status) values ('x', 'research', $1, 'pending')", ANNS
            )


@pytest.mark.parametrize("writer", ["projection", "daemon"])
async def test_a_client_cannot_pose_as_the_projection(db, writer):
    before = await db.fetchval("select node_data from workflow_nodes where id = 'ann-node'")
    async with signed_in(db, ANN):
        await db.execute("select set_config('image_jobs.writer', $1, true)", writer)
        await db.execute(
            "update workflow_nodes set node_data = node_data || $1, run_ticket = 0, version = 0",
            {"status": "completed", "imageUrl": "https://evil.example/x.png"},
        )
        after = await db.fetchval("select node_data from workflow_nodes where id = 'ann-node'")
    assert after == before


async def test_a_client_that_poses_as_the_daemon_breaks_only_its_own(db):
    before = await everything(db)
    for call in ("cancel_run('ann-run')", "requeue_run('ann-run')"):
        with pytest.raises(asyncpg.PostgresError):
            async with signed_in(db, ANN):
                await db.execute("select set_config('image_jobs.writer', 'daemon', true)")
                await db.execute(f"select {call}")
    assert await everything(db) == before
