"""The door to the database: no settlement is refused, words are masked, structure never."""

import json
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.events import Event
from daemon.log import masker
from daemon.queue.client import Queue
from daemon.queue.sanitize import sanitize_charge, sanitize_progress, sanitize_settlement, sanitize_text
from daemon.worker.outcomes import Failed, Failure, Parked, Retry
from tests.queue.test_base64_rule import TEXTS, token
from tests.queue.test_dispatcher import running
from tests.support.postgres import Cluster, connect, wait_until
from tests.support.runs import WORKFLOW, insert_run, run_row
from tests.support.wiring import completed

Db = asyncpg.Connection

FILE = f"data:image/png;base64,{token(5_000)}"
URL = "https://example.supabase.co/storage/v1/object/public/images/w/r.png?v=0a1b2c3d"
HARD_TEXTS = st.one_of(
    TEXTS,
    st.just(FILE),
    st.text(max_size=20),
    st.sampled_from(["\x00", "\ud800", "a\x00\udfff" * 5, "\x01" * 3_000, "word " * 1_000, "狐" * 2_000]),
)
NUMBERS = st.one_of(
    st.floats(), st.integers(), st.sampled_from([1e308, 5e-324, 10**60, 10**399, 10**400, 10**4_000, float("inf")])
)


def nested(depth: int) -> Any:
    value: Any = "deep"
    for _ in range(depth):
        value = [value]
    return value


HARD_VALUES = st.recursive(
    HARD_TEXTS | NUMBERS | st.none() | st.sampled_from([nested(60), nested(70), nested(300), uuid4(), b"\x00"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(HARD_TEXTS, inner, max_size=4),
    max_leaves=8,
)
PAYLOADS = st.fixed_dictionaries(
    {"imageUrl": st.just(URL), "code": st.just("refused"), "cost": st.sampled_from([0.04, None])},
    optional={
        "error": HARD_TEXTS,
        "hint": HARD_TEXTS,
        "revisedPrompt": HARD_TEXTS,
        "originalUrl": HARD_TEXTS,
        "images": st.lists(HARD_TEXTS, max_size=2),
        "details": st.dictionaries(HARD_TEXTS, HARD_VALUES, max_size=4),
    },
)
EVENTS = st.builds(Event, st.just("generated"), HARD_TEXTS, st.just("log"), st.dictionaries(HARD_TEXTS, HARD_VALUES))
TICKETS = st.fixed_dictionaries({"ticket": st.just(7), "cost": st.just(0.04), "processor": st.just("openai:x")})


@st.composite
def settlements(draw: st.DrawFn) -> dict[str, Any]:
    event = draw(EVENTS).to_json()
    event["payload"]["data"] = {**event["payload"].get("data", {}), **draw(TICKETS)}
    return {
        "id": "sk-SK-hero-image-2026-11-27",
        "claim": 3,
        "outcome": "completed",
        "payload": draw(PAYLOADS),
        "message": draw(HARD_TEXTS),
        "due_in": draw(st.floats()),
        "events": [event],
    }


async def test_no_settlement_is_refused_for_its_words(postgres: Cluster) -> None:
    """Domain: settlements whose words, names and numbers are any at all, above all those that the database refuses."""
    sanitized: list[dict[str, Any]] = []

    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(settlements())
    def collect(settlement: dict[str, Any]) -> None:
        found = sanitize_settlement(settlement, masker(["openai"]))
        for name in ("id", "claim", "outcome"):
            assert found[name] == settlement[name]
        for name in ("imageUrl", "code", "cost"):
            assert found["payload"][name] == settlement["payload"][name]
        data = found["events"][0]["payload"]["data"]
        assert (data["ticket"], data["cost"], data["processor"]) == (7, 0.04, "openai:x")
        assert found["events"][0]["id"] == settlement["events"][0]["id"]
        sanitized.append(found)

    collect()
    assert all(found["due_in"] is None or 0 <= found["due_in"] < 1e8 for found in sanitized)
    await assert_writable(postgres, sanitized)


async def assert_writable(postgres: Cluster, sanitized: list[dict[str, Any]]) -> None:
    values = [
        json.dumps(value)
        for found in sanitized
        for value in (found["payload"], *(event["payload"] for event in found["events"]))
    ]
    async with postgres.database() as dsn:
        connection = await connect(dsn)
        rows = await connection.fetch(
            "select image_jobs.has_base64(t::jsonb) as refused, octet_length(t::jsonb::text) as size, t from unnest($1::text[]) t",
            values,
        )
        await connection.close()
    assert len(rows) == len(values)
    assert [row["t"][:2_000] for row in rows if row["refused"] or row["size"] > 1_048_576] == []


@pytest.mark.parametrize("text", ["\x01" * 300_000, "word " * 300_000, "狐" * 400_000], ids=["controls", "words", "狐"])
async def test_no_settlement_is_refused_for_its_size(postgres: Cluster, text: str) -> None:
    payload = {
        "details": {"a": text, "b": [text] * 3},
        "revisedPrompt": text,
        "error": text,
        "imageUrl": URL,
        "cost": 1.5,
    }
    event = Event("generated", text, data={"usage": {text[:2_000]: text}, "cost": 1.5}).to_json()
    found = sanitize_settlement({"id": "r", "claim": 1, "payload": payload, "events": [event]}, str)
    assert (found["payload"]["imageUrl"], found["payload"]["cost"]) == (URL, 1.5)
    assert found["events"][0]["payload"]["data"]["cost"] == 1.5
    await assert_writable(postgres, [found])


def test_a_settlement_that_fits_is_unchanged() -> None:
    payload = {"imageUrl": URL, "cost": 0.04, "revisedPrompt": f"A fox\n{token(900)}", "details": {"n": [1, 2.5, None]}}
    event = Event("generated", "The provider made the image.", data={"usage": {"output_tokens": 3}}).to_json()
    settlement = {
        "id": "r",
        "claim": 1,
        "outcome": "completed",
        "payload": payload,
        "events": [event],
        "if_lost": event,
    }
    assert sanitize_settlement(settlement, masker()) == settlement


@pytest.mark.parametrize(
    ("said", "is_file"), [(FILE, True), (f"Here: {token(5_000)}.", True), ("word " * 2_000, False), (URL, False)]
)
def test_a_warning_says_whether_base64_was_kept_out(said: str, is_file: bool) -> None:
    entry = {
        "id": "job_1",
        "claim": 7,
        "outcome": "failed",
        "payload": {"error": "No.", "details": {"response": [said]}},
    }
    warnings = sanitize_settlement(entry, str).get("events", [])
    assert [each["kind"] for each in warnings if each["payload"]["data"].get("base64")] == ["error"] * is_file


def test_the_same_shortening_is_the_same_warning() -> None:
    entry = {"id": "r", "claim": 1, "message": FILE, "events": []}
    first, again = (sanitize_progress(entry, str)["events"] for _ in range(2))
    assert first == again
    assert first[0]["payload"]["data"] == {"fields": ["message"], "base64": True}


def test_structure_has_the_first_right_to_the_room() -> None:
    job = token(600)
    event = Event("parked", token(200), data={"said": token(900), "providerJobId": job}).to_json()
    found = sanitize_progress({"id": "r", "claim": 1, "events": [event]}, str)["events"][0]["payload"]
    assert found["data"]["providerJobId"] == job
    assert found["data"]["said"] == token(24) + "…"
    assert len(found["message"]) == 200


def test_a_provider_job_id_is_never_shortened() -> None:
    job = token(3_000)
    assert sanitize_settlement({"id": "r", "claim": 1, "provider_job_id": job}, str)["provider_job_id"] == job


def test_a_cost_that_is_no_number_is_not_known() -> None:
    assert sanitize_charge({"state": "charged", "cost": float("nan")}) == {"state": "charged", "cost": None}


def test_words_are_masked_and_structure_is_not() -> None:
    run = "sk-SK-hero-image-2026-11-27"
    url = URL.replace("r.png", f"{run}.png")
    payload = {
        "imageUrl": url,
        "provider": "openai",
        "model": "openai-x",
        "error": f"openai has no {run}",
        "hint": "Ask openai",
        "details": {"openai": "openai", "providerJobId": run, "code": "sk-proj-abcdefghijklmnop"},
    }
    event = Event("failed", "by openai", data={"processor": "openai:x", "said": ["openai"]}).to_json()
    entry = {
        "id": run,
        "claim": 1,
        "processor": "openai:x",
        "provider_job_id": run,
        "payload": payload,
        "events": [event],
    }
    found = sanitize_settlement(entry, masker(["openai"]))
    assert found == {
        **entry,
        "payload": {
            **payload,
            "error": "*** has no ***",
            "hint": "Ask ***",
            "details": {"openai": "***", "providerJobId": run, "code": "***"},
        },
        "events": [
            {
                **event,
                "payload": {"event": "failed", "message": "by ***", "data": {"processor": "openai:x", "said": ["***"]}},
            }
        ],
    }


def test_a_secret_behind_a_nul_or_in_a_name_is_masked() -> None:
    assert sanitize_text("a hunt\x00er22 \ud800", masker(["hunter22"])) == "a *** ?"
    event = Event("x", "x", data={"raw": {"hunter22!": 1}}).to_json()
    assert "hunter22" not in json.dumps(sanitize_progress({"events": [event]}, masker(["hunter22"])))


def test_a_megabyte_of_words_is_shortened_and_the_rest_stays() -> None:
    payload = {"details": {"body": "word " * 500_000, "status": 500}, "error": "too much " * 5_000, "code": "refused"}
    found = sanitize_settlement({"id": "r", "claim": 1, "payload": payload, "events": []}, str)
    assert found["payload"]["code"] == "refused"
    assert found["payload"]["error"].startswith("too much too much")
    assert len(found["payload"]["error"]) <= 4_000
    assert len(json.dumps(found["payload"])) <= 1_048_576
    assert found["events"][0]["payload"]["data"]["fields"] == ["error", "details"]


# With the database


async def insert_named(db: Db, run: str) -> str:
    await db.execute(
        "insert into runs (id, kind, subject_id, status, processor, metadata) "
        "values ($1, 'image_gen', $2, 'pending', 'demo:painter', $3)",
        run,
        WORKFLOW,
        {"promptSpec": {"basePrompt": "a red fox"}},
    )
    return run


async def data_of(db: Db, run: str, event: str) -> list[dict[str, Any]]:
    rows = await db.fetch(
        "select payload from run_events where run_id = $1 and payload ->> 'event' = $2 order by seq", run, event
    )
    return [row["payload"].get("data", {}) for row in rows]


@pytest.mark.parametrize("run", ["sk-SK-hero-image-2026-11-27", "demo", "eyJh-bGci", "rk-0123456789abcdef"])
async def test_a_run_named_like_a_secret_is_settled_once(database: str, db: Db, run: str) -> None:
    await insert_named(db, run)
    async with running(database, mask=masker(["demo", "painter", "completed", "eyJh-bGci"])) as it:
        await wait_until(lambda: it.claimed)
        assert await it.outbox.confirm(it.claimed[0], Event("generated", "by demo", data={"processor": "demo:painter"}))
        assert (await it.outbox.settle(it.claimed[0], completed())).result == "settled"
    row = await run_row(db, run)
    assert (row["status"], row["attempt"], row["payload"]["provider"]) == ("completed", 1, "demo")
    assert await data_of(db, run, "generated") == [{"processor": "demo:painter"}]


async def test_a_revised_prompt_with_a_picture_keeps_its_run(database: str, db: Db) -> None:
    run = await insert_run(db)
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        outcome = completed(revised_prompt=f"A fox. ![fox]({FILE}) The end.", cost=0.04)
        assert (await it.outbox.settle(it.claimed[0], outcome)).result == "settled"
    row = await run_row(db, run)
    assert row["status"] == "completed"
    assert row["payload"]["revisedPrompt"] == "A fox. ![fox](data:image/png; base64,…) The end."
    assert row["payload"]["cost"] == 0.04
    assert await data_of(db, run, "warning") == [{"fields": ["revisedPrompt"], "base64": True}]


@pytest.mark.parametrize("kind", ["failed", "retry", "parked"])
async def test_a_foreign_error_keeps_code_hint_and_details(database: str, db: Db, kind: str) -> None:
    run = await insert_run(db)
    said = f"Expected a URL or 'data:image/png;base64,'. {token(2_000)}"
    details = {"said": said, "size": float("inf"), "n": 10**5_000, "raw": nested(100)}
    failure = Failure(said, "invalid_request", "Change it.", details)
    event = Event("submitted", "The request goes out.", data={"estimate": 0.04, "request": {"prompt": FILE}})
    outcome = {
        "failed": Failed(failure),
        "retry": Retry(failure, 1e30, f"{said} Trying again."),
        "parked": Parked("job-1", 60, said),
    }[kind]
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        assert await it.outbox.confirm(it.claimed[0], event)
        assert (await it.outbox.settle(it.claimed[0], outcome)).result == "settled"
    row = await run_row(db, run)
    assert row["status"] == {"failed": "failed", "retry": "pending", "parked": "running"}[kind]
    if kind != "parked":
        hint = "Change it. It is tried again by itself." if kind == "retry" else "Change it."
        assert (row["payload"]["code"], row["payload"]["hint"]) == ("invalid_request", hint)
        assert row["payload"]["error"].startswith("Expected a URL or 'data:image/png; base64,'. ")
        assert row["payload"]["details"]["size"] is None
    (submitted,) = await data_of(db, run, "submitted")
    assert submitted["estimate"] == 0.04
    assert (await data_of(db, run, "warning"))[0]["fields"] == ["submitted: request"]


async def test_a_blocked_reason_is_masked_and_writable(database: str, db: Db) -> None:
    from datetime import timedelta

    async with Queue(database, mask=masker(["hunter22"])) as queue:
        await queue.block_provider("openai", None, timedelta(minutes=1), "slow down, hunter22\x00!")
    reason = await db.fetchval("select reason from image_jobs.provider_blocks where provider = 'openai'")
    assert reason == "slow down, ***!"
