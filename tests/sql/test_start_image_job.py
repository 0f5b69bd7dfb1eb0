"""start_image_job and idempotency keys."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.support.postgres import connect, signed_in, wait_until
from tests.support.protocol import (
    Db,
)
from tests.support.runs import WORKFLOW, event_names, run_row

REFUSED = asyncpg.InvalidParameterValueError


PROMPT: dict[str, Any] = {"basePrompt": "a red fox"}


async def insert(db: Db, **columns: Any) -> "asyncpg.Record":
    """Insert a run of which every column can be chosen; return the row."""
    columns = {
        "kind": "image_gen",
        "subject_id": WORKFLOW,
        "status": "pending",
        "processor": "demo:painter",
        "metadata": {"promptSpec": PROMPT},
    } | columns
    numbers = ", ".join(f"${number}" for number in range(1, len(columns) + 1))
    row = await db.fetchrow(
        f"insert into runs ({', '.join(columns)}) values ({numbers}) returning *", *columns.values()
    )
    assert row is not None
    return row


def prompt() -> dict[str, Any]:
    return {"promptSpec": PROMPT}


# idempotency


async def test_a_second_insert_with_the_same_key_is_a_duplicate(db: Db) -> None:
    user, workflow = uuid4(), uuid4()
    metadata = {**prompt(), "idempotencyKey": "k"}
    async with signed_in(db, user):
        await insert(db, subject_id=workflow, metadata=metadata)
    with pytest.raises(asyncpg.UniqueViolationError) as refused:
        async with signed_in(db, user):
            await insert(db, subject_id=workflow, metadata=metadata)
    assert refused.value.constraint_name == "runs_idempotency"


async def test_a_second_insert_by_an_operator_is_a_duplicate_too(db: Db) -> None:
    metadata = {**prompt(), "idempotencyKey": "k"}
    await insert(db, metadata=metadata)
    with pytest.raises(asyncpg.UniqueViolationError):
        await insert(db, metadata=metadata)


async def test_a_key_counts_for_one_user_and_one_workflow(db: Db) -> None:
    metadata = {**prompt(), "idempotencyKey": "k"}
    other = uuid4()
    await insert(db, metadata=metadata)
    await insert(db, metadata=metadata, subject_id=other)
    await insert(db, metadata=metadata, created_by=uuid4())
    await insert(db, metadata={**metadata, "idempotencyKey": "another"})
    await insert(db)
    await insert(db)
    assert await db.fetchval("select count(*) from runs") == 6


def request(workflow: UUID, **more: Any) -> dict[str, Any]:
    return {
        "nodeId": "n",
        "workflowId": str(workflow),
        "provider": "demo",
        "model": "painter",
        "promptSpec": PROMPT,
        **more,
    }


@pytest.mark.parametrize("where", ["at the top", "in the metadata"])
async def test_start_image_job_with_the_same_key_returns_the_first_run(db: Db, where: str) -> None:
    key: dict[str, Any] = {"idempotencyKey": "k"}
    asked = request(uuid4(), **(key if where == "at the top" else {"metadata": key}))
    user = uuid4()
    records: list[dict[str, Any]] = []
    for _ in range(2):
        async with signed_in(db, user):
            records.append(await db.fetchval("select start_image_job($1)", asked))
    assert records[0] == records[1]
    assert await db.fetchval("select count(*) from runs") == 1
    assert await event_names(db, records[0]["jobId"]) == ["created"]


@pytest.mark.parametrize("signed", [True, False])
async def test_of_two_concurrent_calls_both_return_the_first_run(database: str, db: Db, signed: bool) -> None:
    user, workflow = uuid4(), uuid4()
    await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", workflow, user)
    asked = request(workflow, idempotencyKey="k")
    other = await connect(database)

    async def second() -> dict[str, Any]:
        async with signed_in(other, user if signed else None, "authenticated" if signed else "service_role"):
            return await other.fetchval("select start_image_job($1)", asked)

    try:
        async with signed_in(db, user if signed else None, "authenticated" if signed else "service_role"):
            first = await db.fetchval("select start_image_job($1)", asked)
            waiting = asyncio.create_task(second())
            await wait_for_lock(database)
        assert await waiting == first
    finally:
        await other.close()
    assert await db.fetchval("select count(*) from runs") == 1


async def wait_for_lock(dsn: str) -> None:
    """Wait until a session of this database waits for a lock."""
    watcher = await connect(dsn)
    try:
        await wait_until(
            lambda: watcher.fetchval(
                "select exists (select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock')"
            )
        )
    finally:
        await watcher.close()


# start_image_job


async def test_start_image_job_returns_an_image_job_record(db: Db) -> None:
    workflow = uuid4()
    async with signed_in(db):
        record = await db.fetchval("select start_image_job($1)", request(workflow))
    run = await run_row(db, record["jobId"])
    assert record == {
        "jobId": run["id"],
        "nodeId": "n",
        "workflowId": str(workflow),
        "provider": "demo",
        "model": "painter",
        "status": "pending",
        "startedAt": record["startedAt"],
        "finishedAt": None,
        "imageUrl": None,
        "metadata": {"nodeId": "n", "promptSpec": PROMPT},
        "error": None,
    }
    assert record["startedAt"]


async def test_named_fields_win_over_metadata(db: Db) -> None:
    metadata = {
        "nodeId": "forged",
        "promptSpec": {"basePrompt": "forged"},
        "webhookUrl": "https://example.com/kept",
        "mode": "kept",
        "mine": {"deep": {"er": [1, None]}},
    }
    asked = request(uuid4(), metadata=metadata, idempotencyKey="k", fallback=["google:a"])
    async with signed_in(db):
        record = await db.fetchval("select start_image_job($1)", asked)
    assert record["metadata"] == {
        "nodeId": "n",
        "promptSpec": PROMPT,
        "webhookUrl": "https://example.com/kept",
        "mode": "kept",
        "mine": {"deep": {"er": [1, None]}},
        "idempotencyKey": "k",
        "fallback": ["google:a"],
    }


async def test_metadata_is_merged_at_the_top_level_only(db: Db) -> None:
    asked = request(uuid4(), metadata={"promptSpec": {"basePrompt": "forged", "seed": 7}})
    async with signed_in(db):
        record = await db.fetchval("select start_image_job($1)", asked)
    assert record["metadata"]["promptSpec"] == PROMPT


async def test_start_image_job_takes_null_for_nothing(db: Db) -> None:
    asked = request(uuid4(), metadata=None, webhookUrl=None, idempotencyKey=None)
    async with signed_in(db):
        record = await db.fetchval("select start_image_job($1)", asked)
    assert record["metadata"] == {"nodeId": "n", "promptSpec": PROMPT}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodeId": None}, "nodeId is missing."),
        ({"nodeId": ""}, "nodeId is missing."),
        ({"provider": None}, "provider and model are missing."),
        ({"model": ""}, "provider and model are missing."),
        ({"workflowId": None}, "workflowId must be a uuid."),
        ({"workflowId": "mine"}, "workflowId must be a uuid."),
        ({"metadata": []}, "metadata must be an object."),
        ({"promptSpec": None}, "metadata.promptSpec is missing."),
        ({"promptSpec": {"basePrompt": ""}}, "promptSpec.basePrompt must be a text of 1 to 32,000 characters."),
        ({"provider": "Open AI"}, "processor must name a provider and a model."),
    ],
)
async def test_start_image_job_refuses_in_one_sentence(db: Db, change: dict[str, Any], message: str) -> None:
    with pytest.raises(REFUSED) as refused:
        async with signed_in(db):
            await db.fetchval("select start_image_job($1)", request(uuid4()) | change)
    assert refused.value.message == message
    assert refused.value.hint


@pytest.mark.parametrize("asked", [None, [], "text", 7])
async def test_start_image_job_takes_an_object(db: Db, asked: object) -> None:
    with pytest.raises(REFUSED, match="The request must be an object"):
        async with signed_in(db):
            await db.fetchval("select start_image_job($1)", asked)
