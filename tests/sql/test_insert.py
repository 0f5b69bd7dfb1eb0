"""What an insert may say, what it gets by itself, and in which words it is refused."""

import asyncio
import re
import time
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.postgres import Cluster, connect, signed_in, wait_until
from tests.runs import WORKFLOW, event_names, insert_run, run_row
from tests.sql.protocol import Db, move_clock, new_daemon

REFUSED = asyncpg.InvalidParameterValueError
PROMPT: dict[str, Any] = {"basePrompt": "a red fox"}


async def insert(db: Db, **columns: Any) -> "asyncpg.Record":
    """Inserts a run of which every column can be chosen; answers the row."""
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


async def refusal(db: Db, **columns: Any) -> str:
    """Inserts what must be refused with 22023, a sentence and a hint; answers the sentence."""
    with pytest.raises(REFUSED) as refused:
        await insert(db, **columns)
    assert refused.value.hint
    assert refused.value.hint.endswith((".", "}."))
    return refused.value.message


def prompt(**spec: Any) -> dict[str, Any]:
    return {"promptSpec": {**PROMPT, **spec}}


# defaults


async def test_a_run_gets_an_id_that_says_when_it_was_made(db: Db) -> None:
    before = time.time_ns() // 1_000_000
    first, second = await insert(db), await insert(db)
    made = re.fullmatch(r"job_([0-9]{13})_([0-9a-f]{12})", first["id"])
    assert made
    assert before - 1000 <= int(made[1]) <= time.time_ns() // 1_000_000 + 1000
    assert first["id"] != second["id"]


async def test_a_run_starts_with_nothing_done(db: Db) -> None:
    row = await insert(db)
    assert (row["progress"], row["priority"], row["attempt"], row["max_attempts"]) == (0, 0, 0, 3)
    assert row["due_at"] == row["created_at"] == row["started_at"] == row["updated_at"]
    for column in ("finished_at", "payload", "claimed_by", "provider_job_id", "message", "preview_url"):
        assert row[column] is None


async def test_the_status_may_be_left_out(db: Db) -> None:
    row = await insert(db, status=None)
    assert row["status"] == "pending"


async def test_metadata_is_stored_as_it_was_given(db: Db) -> None:
    metadata = {
        "nodeId": "n",
        "webhookUrl": "https://example.com/hook",
        "mode": "now",
        "fallback": ["a:b"],
        "mine": None,
    }
    row = await insert(db, metadata={**metadata, "promptSpec": PROMPT})
    assert row["metadata"] == {**metadata, "promptSpec": PROMPT}


async def test_an_operator_sets_priority_attempts_and_whose_it_is(db: Db) -> None:
    user = uuid4()
    row = await insert(db, priority=7, max_attempts=5, created_by=user)
    assert (row["priority"], row["max_attempts"], row["created_by"]) == (7, 5, user)


async def test_a_client_may_choose_when(db: Db) -> None:
    due = await db.fetchval("select now() + interval '1 hour'")
    async with signed_in(db):
        run = (await insert(db, subject_id=uuid4(), due_at=due))["id"]
    daemon = await new_daemon(db)
    assert await daemon.claim(10) == []
    await move_clock(db, "61 min")
    assert (await daemon.claim_one())["id"] == run


async def test_an_event_says_that_it_was_created(db: Db) -> None:
    row = await insert(db)
    event = await db.fetchrow("select kind, payload from run_events where run_id = $1", row["id"])
    assert (event["kind"], event["payload"]["event"]) == ("log", "created")
    assert event["payload"]["data"]["processor"] == "demo:painter"


# ids


@pytest.mark.parametrize("name", ["a", "job_1731283200000_n-1", "A" * 200, "-_-"])
async def test_a_caller_may_choose_the_id(db: Db, name: str) -> None:
    assert (await insert(db, id=name))["id"] == name


@pytest.mark.parametrize("name", ["", "A" * 201, "a/b", "a.b", "a b", "../etc", "ä", "a\n", "a%2f"])
async def test_an_id_that_is_no_path_is_refused(db: Db, name: str) -> None:
    assert await refusal(db, id=name) == "id must be 1 to 200 characters of A-Z, a-z, 0-9, _ and -."


async def test_an_id_is_used_once(db: Db) -> None:
    await insert(db, id="one")
    with pytest.raises(asyncpg.UniqueViolationError):
        await insert(db, id="one")


# what is refused


@pytest.mark.parametrize("status", ["running", "completed", "failed", "cancelled", "done", ""])
async def test_a_new_run_is_pending(db: Db, status: str) -> None:
    assert await refusal(db, status=status) == "A new run must be pending."


@pytest.mark.parametrize(
    "processor",
    [None, "", "demo", "demo:", ":painter", "Demo:painter", "demo painter", "demo: painter", "a:" + "b" * 201, "a\n:b"],
)
async def test_a_processor_names_a_provider_and_a_model(db: Db, processor: str | None) -> None:
    assert await refusal(db, processor=processor) == "processor must name a provider and a model."


@pytest.mark.parametrize("processor", ["openai:gpt-image-2", "midjourney:v7", "a:b:c", "stability:sd3.5/large"])
async def test_a_processor_may_be_one_that_nobody_knows(db: Db, processor: str) -> None:
    assert (await insert(db, processor=processor))["processor"] == processor


@pytest.mark.parametrize("metadata", [None, [], "text", 7])
async def test_metadata_is_an_object(db: Db, metadata: object) -> None:
    assert await refusal(db, metadata=metadata) == "metadata must be an object with a promptSpec."


@pytest.mark.parametrize("spec", [None, [], "a red fox", 7])
async def test_a_prompt_spec_is_an_object(db: Db, spec: object) -> None:
    assert await refusal(db, metadata={"promptSpec": spec}) == "metadata.promptSpec is missing."


@pytest.mark.parametrize("text", [None, "", 7, [], "fox " * 8_001])
async def test_a_base_prompt_has_1_to_32000_characters(db: Db, text: object) -> None:
    message = "promptSpec.basePrompt must be a text of 1 to 32,000 characters."
    assert await refusal(db, metadata={"promptSpec": {"basePrompt": text}}) == message


@pytest.mark.parametrize("text", ["x", "狐 " * 16_000, "🦊" * 32_000])
async def test_a_base_prompt_may_be_as_long_as_that(db: Db, text: str) -> None:
    assert (await insert(db, metadata=prompt(basePrompt=text)))["metadata"]["promptSpec"]["basePrompt"] == text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"size": "large"}, "promptSpec.size cannot be read."),
        ({"size": "1024X1024"}, "promptSpec.size cannot be read."),
        ({"size": "0x1024"}, "promptSpec.size cannot be read."),
        ({"size": 1024}, "promptSpec.size cannot be read."),
        ({"aspectRatio": "16/9"}, "promptSpec.aspectRatio cannot be read."),
        ({"aspectRatio": "0:1"}, "promptSpec.aspectRatio cannot be read."),
        ({"quality": "best"}, "promptSpec.quality is unknown."),
        ({"seed": -1}, "promptSpec.seed must be a whole number from 0 up."),
        ({"seed": 1.5}, "promptSpec.seed must be a whole number from 0 up."),
        ({"seed": "7"}, "promptSpec.seed must be a whole number from 0 up."),
        ({"styleModifiers": "soft"}, "promptSpec.styleModifiers must be a list of texts."),
        ({"styleModifiers": ["soft", 7]}, "promptSpec.styleModifiers must be a list of texts."),
        ({"styleModifiers": [None]}, "promptSpec.styleModifiers must be a list of texts."),
        ({"negativePrompt": ["fog"]}, "promptSpec.negativePrompt must be a text."),
        ({"previousImage": "ftp://example.com/a.png"}, "promptSpec.previousImage must be the URL of an image."),
        ({"previousImage": "iVBORw0KGgo="}, "promptSpec.previousImage must be the URL of an image."),
        ({"previousImage": {"url": "https://example.com"}}, "promptSpec.previousImage must be a text."),
    ],
)
async def test_a_prompt_that_no_provider_could_read_is_refused(db: Db, spec: dict[str, Any], message: str) -> None:
    assert await refusal(db, metadata=prompt(**spec)) == message


@pytest.mark.parametrize(
    "spec",
    [
        {"size": "1024x1024"},
        {"size": "1792x1024", "quality": "hd"},
        {"aspectRatio": "16:9", "quality": "standard"},
        {"seed": 0},
        {"seed": 4_294_967_295},
        {"styleModifiers": []},
        {"styleModifiers": ["soft light", "ink"]},
        {"negativePrompt": "fog"},
        {"previousImage": "https://example.com/a.png?v=1"},
        dict.fromkeys(["size", "aspectRatio", "quality", "seed", "styleModifiers", "negativePrompt", "previousImage"]),
        {"somethingNew": [1]},
    ],
)
async def test_a_good_prompt_is_accepted(db: Db, spec: dict[str, Any]) -> None:
    assert (await insert(db, metadata=prompt(**spec)))["metadata"] == prompt(**spec)


@pytest.mark.parametrize("key", ["nodeId", "idempotencyKey", "webhookUrl"])
@pytest.mark.parametrize("value", [7, "", [], {}, "fox " * 513])
async def test_names_in_the_metadata_are_texts(db: Db, key: str, value: object) -> None:
    metadata = {"promptSpec": PROMPT, key: value}
    assert await refusal(db, metadata=metadata) == f"metadata.{key} must be a text of 1 to 2,048 bytes."


async def test_metadata_of_more_than_a_mebibyte_is_refused(db: Db) -> None:
    metadata = {"promptSpec": PROMPT, "notes": ["soft light "] * 100_000}
    assert await refusal(db, metadata=metadata) == "metadata is larger than 1 MiB."


async def test_a_run_belongs_to_a_workflow(db: Db) -> None:
    assert await refusal(db, subject_id=None) == "subject_id is missing."


@pytest.mark.parametrize("due", ["infinity", "-infinity"])
async def test_due_at_is_a_point_in_time(db: Db, due: str) -> None:
    with pytest.raises(REFUSED, match="due_at must be a point in time"):
        await db.execute(
            "insert into runs (kind, subject_id, status, processor, metadata, due_at) "
            f"values ('image_gen', gen_random_uuid(), 'pending', 'demo:painter', $1, '{due}')",
            prompt(),
        )


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("payload", {"imageUrl": "https://example.com/forged.png"}),
        ("progress", 50),
        ("priority", 1),
        ("attempt", 1),
        ("max_attempts", 100),
        ("claim", 1),
        ("ticket", 2**60),
        ("claimed_by", uuid4()),
        ("provider_job_id", "somebody's"),
        ("created_by", uuid4()),
        ("message", "forged"),
        ("preview_url", "https://example.com"),
        ("lane", "openai"),
        ("rank", -1),
    ],
)
async def test_a_client_sets_no_column_of_ours(db: Db, column: str, value: object) -> None:
    with pytest.raises(REFUSED) as refused:
        async with signed_in(db):
            await insert(db, subject_id=uuid4(), **{column: value})
    assert refused.value.message == "This insert sets a column that belongs to the orchestrator."
    assert "metadata" in refused.value.hint


async def test_one_bad_row_refuses_the_whole_insert(db: Db) -> None:
    with pytest.raises(REFUSED):
        await db.execute(
            "insert into runs (kind, subject_id, status, processor, metadata) "
            "select 'image_gen', $1, 'pending', case n when 3 then 'bad' else 'demo:painter' end, $2 "
            "from generate_series(1, 3) n",
            WORKFLOW,
            prompt(),
        )
    assert await db.fetchval("select count(*) from runs") == 0
    assert await db.fetchval("select count(*) from run_events") == 0


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


async def test_a_second_insert_of_an_operator_with_the_same_key_is_a_duplicate(db: Db) -> None:
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
async def test_of_two_calls_at_once_the_second_gets_the_run_of_the_first(database: str, db: Db, signed: bool) -> None:
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
    """Waits until somebody in this database waits for a lock."""
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


async def test_start_image_job_answers_an_image_job_record(db: Db) -> None:
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
    asked = request(uuid4(), metadata=metadata, idempotencyKey="k", fallback={"a": None})
    async with signed_in(db):
        record = await db.fetchval("select start_image_job($1)", asked)
    assert record["metadata"] == {
        "nodeId": "n",
        "promptSpec": PROMPT,
        "webhookUrl": "https://example.com/kept",
        "mode": "kept",
        "mine": {"deep": {"er": [1, None]}},
        "idempotencyKey": "k",
        "fallback": {"a": None},
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


# rows of other kinds

FILE = "data:image/png;base64," + "iVBORw0KGgo" * 500
RESEARCH = "insert into runs (id, kind, subject_id, status, processor, started_at, finished_at, payload, metadata)"


async def test_rows_of_other_kinds_are_nobodys_business_but_their_own(db: Db) -> None:
    await db.execute(
        RESEARCH + " values ('a/b c', 'research', gen_random_uuid(), 'halfway', null, null, now(), $1, $2)",
        {"file": FILE},
        FILE,
    )
    row = await run_row(db, "a/b c")
    assert (row["status"], row["started_at"], row["payload"], row["metadata"]) == (
        "halfway",
        None,
        {"file": FILE},
        FILE,
    )
    for column in ("claim", "ticket", "created_at", "updated_at", "due_at", "progress", "attempt", "lane", "rank"):
        assert row[column] is None
    for status in ("pending", "running", "completed", "pending", "cancelled", "anything"):
        await db.execute("update runs set status = $1, finished_at = null, claimed_by = gen_random_uuid()", status)
        assert (await run_row(db, "a/b c"))["status"] == status
    await db.execute("update runs set id = 'renamed', subject_id = gen_random_uuid(), processor = 'x', progress = 1000")
    daemon = await new_daemon(db)
    assert await daemon.claim(10) == []
    assert await db.fetchval("select count(*) from run_events") == 0
    await db.execute(
        "insert into run_events (run_id, kind, payload) values ('renamed', 'anything', $1)", {"file": FILE}
    )
    await db.execute("update run_events set kind = 'else', payload = $1", FILE)
    await db.execute("delete from run_events")
    await db.execute("delete from runs")


async def test_daemons_leave_rows_of_other_kinds_alone(db: Db) -> None:
    await db.execute(
        RESEARCH + " values ('r', 'research', $1, 'pending', 'demo:painter', now(), null, null, null)", WORKFLOW
    )
    before = await run_row(db, "r")
    await insert_run(db)
    daemon = await new_daemon(db)
    claimed = await daemon.claim_one()
    assert await daemon.settle({"id": "r", "claim": claimed["claim"]}, "completed", payload={"imageUrl": "x"}) == "lost"
    await daemon.complete(claimed)
    assert await run_row(db, "r") == before
    for function in ("cancel_run", "requeue_run"):
        with pytest.raises(asyncpg.PostgresError) as refused:
            await db.fetchval(f"select {function}('r')")
        assert refused.value.sqlstate == "PT404"


async def test_a_row_of_another_kind_does_not_become_ours(db: Db) -> None:
    await db.execute(
        RESEARCH + " values ('r', 'research', $1, 'pending', 'demo:painter', now(), null, null, null)", WORKFLOW
    )
    with pytest.raises(REFUSED):
        await db.execute("update runs set kind = 'image_gen'")


async def test_a_role_of_the_other_orchestrator_writes_its_rows(db: Db, postgres: Cluster, database: str) -> None:
    name = "orchestrator_" + uuid4().hex
    await postgres.sudo(f"create role {name} bypassrls; grant {name} to postgres")
    try:
        await db.execute(f"grant select, insert, update, delete on runs, run_events to {name}")
        await db.execute(f"grant execute on function private.has_base64(jsonb) to {name}")
        async with db.transaction():
            await db.execute(f"set local role {name}")
            await db.execute(
                RESEARCH + " values ('r', 'research', $1, 'odd', null, null, null, $2, null)", WORKFLOW, FILE
            )
            await db.execute("update runs set status = 'odder', payload = $1 where id = 'r'", [FILE])
            await db.execute(
                "insert into run_events (id, run_id, kind, payload) values (gen_random_uuid(), 'r', 'note', $1)", FILE
            )
            await db.execute("delete from run_events where run_id = 'r'")
            await db.execute("delete from runs where id = 'r'")
    finally:
        await postgres.sudo(f"drop owned by {name}", database.rsplit("/", 1)[1])
        await postgres.sudo(f"drop role {name}")
