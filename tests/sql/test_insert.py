"""Inserts of runs: what a caller may set, what is filled in, and in which words an insert is refused."""

import re
import time
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from tests.support.postgres import signed_in
from tests.support.protocol import Db, move_clock, new_daemon
from tests.support.runs import WORKFLOW

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


async def refusal(db: Db, **columns: Any) -> str:
    """Insert a run that must be refused with 22023, a sentence and a hint; return the sentence."""
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


async def test_an_operator_sets_priority_attempts_and_creator(db: Db) -> None:
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


async def test_a_client_has_not_waited_before_its_insert(db: Db) -> None:
    past = datetime(1971, 1, 1, tzinfo=UTC)
    async with signed_in(db):
        row = await insert(db, subject_id=uuid4(), due_at=past)
    assert row["due_at"] == row["created_at"]
    assert (await insert(db, due_at=past))["due_at"] == past  # by an operator


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
async def test_a_processor_may_be_unknown(db: Db, processor: str) -> None:
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
async def test_an_unreadable_prompt_is_refused(db: Db, spec: dict[str, Any], message: str) -> None:
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


@pytest.mark.parametrize(
    "fallback",
    [
        "google:x",
        {},
        7,
        [],
        ["google"],
        ["google:"],
        ["Google:x"],
        ["google:x", 7],
        [None],
        ["a:b"] * 6,
        ["a:" + "b" * 201],
    ],
)
async def test_a_fallback_is_a_list_of_providers_with_their_models(db: Db, fallback: object) -> None:
    message = "metadata.fallback must be a list of 1 to 5 texts like provider:model."
    assert await refusal(db, metadata={"promptSpec": PROMPT, "fallback": fallback}) == message


@pytest.mark.parametrize("value", ["true", 1, [], {}])
async def test_fallback_on_refusal_is_true_or_false(db: Db, value: object) -> None:
    message = "metadata.fallbackOnRefusal must be true or false."
    assert await refusal(db, metadata={"promptSpec": PROMPT, "fallbackOnRefusal": value}) == message


@pytest.mark.parametrize(
    "names",
    [
        {"fallback": None, "fallbackOnRefusal": None},
        {"fallback": ["google:x"], "fallbackOnRefusal": False},
        {"fallback": [f"{'p' * 50}:{'ß' * 200}"] * 5, "fallbackOnRefusal": True},
    ],
)
async def test_a_good_fallback_is_accepted(db: Db, names: dict[str, Any]) -> None:
    metadata = {"promptSpec": PROMPT, **names}
    async with signed_in(db):
        assert (await insert(db, subject_id=uuid4(), metadata=metadata))["metadata"] == metadata


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
        ("workflow_rank", -1),
        ("routed_to", "google:gemini-3-pro-image"),
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
