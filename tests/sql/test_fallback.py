"""metadata.fallback: to which providers a run is rerouted, when, and what stays as it was."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from tests.support.postgres import connect, signed_in
from tests.support.protocol import Daemon, Db, events, insert_node, move_clock, new_daemon, node_data
from tests.support.runs import WORKFLOW, event_names, insert_run, run_row

OPENAI, GOOGLE, STABILITY = "openai:gpt-image-2", "google:gemini-3-pro-image", "stability:core"
DOWN = {"error": "OpenAI had a problem.", "code": "provider_unavailable", "hint": "Wait."}


@pytest.fixture
async def daemon(db: Db) -> Daemon:
    """Register a daemon that serves all three."""
    return await new_daemon(db, "openai", "google", "stability")


@pytest.fixture
async def crowd(database: str) -> AsyncIterator[list[Daemon]]:
    """Register daemons that have a connection each."""
    connections = [await connect(database) for _ in range(6)]
    yield [await new_daemon(connection, "openai", "google") for connection in connections]
    for connection in connections:
        await connection.close()


async def insert_with_fallback(db: Db, *fallback: str, processor: str = OPENAI, **metadata: Any) -> str:
    """Insert a run with a fallback."""
    return await insert_run(db, processor=processor, fallback=list(fallback), **metadata)


async def fail_over(daemon: Daemon, claimed: dict[str, Any]) -> str:
    return await daemon.settle(claimed, "failed", payload=DOWN, fall_back=True)


async def routed_to(db: Db, run: str) -> tuple[str, str | None]:
    row = await run_row(db, run)
    return row["status"], row["routed_to"]


async def fallbacks(db: Db, run: str) -> list[tuple[str, str, str]]:
    """Fetch from where, to where and why a run was rerouted."""
    return [
        (event["data"]["from"], event["data"]["to"], event["data"]["code"])
        for event in await events(db, run)
        if event["event"] == "fallback"
    ]


async def close(db: Db, processor: str, how: str = "paused = true") -> None:
    """Close a provider, or one model of it; `how` may also open it, or limit it."""
    provider, _, model = processor.partition(":")
    await db.execute(
        "insert into image_jobs.provider_limits (provider, model) values ($1, $2) on conflict do nothing",
        provider,
        model or None,
    )
    await db.execute(
        f"update image_jobs.provider_limits set {how} where provider = $1 and model is not distinct from $2",
        provider,
        model or None,
    )


# one step after the other


@pytest.mark.parametrize("outcome", ["failed", "retry"])
async def test_a_run_takes_each_step_of_its_fallback_then_fails(db: Db, daemon: Daemon, outcome: str) -> None:
    run = await insert_with_fallback(db, GOOGLE, STABILITY)
    for processor in (OPENAI, GOOGLE, STABILITY):
        claimed = await daemon.claim_one()
        assert (claimed["processor"], claimed["requested"], claimed["attempt"]) == (processor, OPENAI, 1)
        last = processor == STABILITY
        assert await daemon.settle(claimed, "failed" if last else outcome, payload=DOWN, fall_back=True) == "settled"
    row = await run_row(db, run)
    assert (row["status"], row["processor"], row["routed_to"]) == ("failed", OPENAI, STABILITY)
    timings = row["payload"]["timings"]
    assert row["payload"] == {**DOWN, "attempts": 1, "possibleCost": None, "timings": timings}
    assert await fallbacks(db, run) == [
        (OPENAI, GOOGLE, "provider_unavailable"),
        (GOOGLE, STABILITY, "provider_unavailable"),
    ]
    assert await event_names(db, run) == ["created", *("claimed", "fallback") * 2, "claimed", "failed"]


async def test_a_step_is_due_at_once_with_an_event_and_a_node_message(db: Db, daemon: Daemon) -> None:
    await insert_node(db, "n", WORKFLOW)
    run = await insert_with_fallback(db, GOOGLE, nodeId="n")
    claimed = await daemon.claim_one()
    await daemon.settle(claimed, "retry", payload=DOWN, due_in=600, refund=True, message="Wait.", fall_back=True)
    message = f"OpenAI had a problem. Going on with {GOOGLE}."
    row = await run_row(db, run)
    assert (row["status"], row["attempt"], row["message"], row["progress"]) == ("pending", 0, message, 0)
    assert row["due_at"] <= await db.fetchval("select now()")
    event = (await events(db, run))[-1]
    assert (event["kind"], event["event"], event["message"]) == ("error", "fallback", message)
    assert event["data"] == {
        "from": OPENAI,
        "to": GOOGLE,
        "code": "provider_unavailable",
        "hint": "Wait.",
        "attempts": 1,
    }
    shown = await node_data(db, "n")
    assert (shown["status"], shown["message"]) == ("pending", message)


async def test_each_step_has_all_its_attempts(db: Db, daemon: Daemon) -> None:
    run = await insert_with_fallback(db, GOOGLE)
    for _ in range(2):
        await daemon.settle(await daemon.claim_one(), "retry", payload=DOWN)
    await fail_over(daemon, await daemon.claim_one())
    for attempt in (1, 2, 3):
        claimed = await daemon.claim_one()
        assert (claimed["attempt"], claimed["processor"]) == (attempt, GOOGLE)
        await daemon.settle(claimed, "retry", payload=DOWN)
    assert await routed_to(db, run) == ("failed", GOOGLE)


async def test_the_hour_of_refusals_begins_anew_with_each_step(db: Db, daemon: Daemon) -> None:
    run = await insert_with_fallback(db, GOOGLE)
    await daemon.settle(await daemon.claim_one(), "retry", payload=DOWN, refund=True)
    await move_clock(db, "61 min")
    await daemon.settle(await daemon.claim_one(), "retry", payload=DOWN, refund=True, fall_back=True)
    assert (await run_row(db, run))["refused_since"] is None
    await daemon.settle(await daemon.claim_one(), "retry", payload=DOWN, refund=True)
    assert (await run_row(db, run))["attempt"] == 0


async def test_an_error_of_the_run_itself_is_not_rerouted(db: Db, daemon: Daemon) -> None:
    run = await insert_with_fallback(db, GOOGLE)
    await daemon.fail(await daemon.claim_one())
    assert await routed_to(db, run) == ("failed", None)


@pytest.mark.parametrize(("outcome", "status"), [("failed", "failed"), ("retry", "pending")])
async def test_a_run_without_a_fallback_does_not_change(db: Db, daemon: Daemon, outcome: str, status: str) -> None:
    run = await insert_run(db, processor=OPENAI)
    await daemon.settle(await daemon.claim_one(), outcome, payload=DOWN, due_in=60, fall_back=True)
    assert await routed_to(db, run) == (status, None)
    assert await fallbacks(db, run) == []


async def test_a_job_without_an_image_moves_to_the_fallback_event(db: Db, daemon: Daemon) -> None:
    run = await insert_with_fallback(db, GOOGLE)
    await daemon.park(await daemon.claim_one(), "order-7", due_in=0)
    await fail_over(daemon, await daemon.claim_one())
    row = await run_row(db, run)
    assert (row["status"], row["provider_job_id"], row["submitted_at"]) == ("pending", None, None)
    assert (await events(db, run))[-1]["data"]["providerJobId"] == "order-7"


async def test_a_repeated_settlement_takes_no_second_step(db: Db, daemon: Daemon) -> None:
    run = await insert_with_fallback(db, GOOGLE, STABILITY)
    claimed = await daemon.claim_one()
    assert await fail_over(daemon, claimed) == "settled"
    assert await fail_over(daemon, claimed) == "already"
    assert await routed_to(db, run) == ("pending", GOOGLE)


async def test_a_silent_daemon_costs_an_attempt_of_the_present_step(db: Db, daemon: Daemon) -> None:
    run = await insert_with_fallback(db, GOOGLE)
    await fail_over(daemon, await daemon.claim_one())
    await daemon.claim_one()
    await db.execute("select image_jobs.abandon_runs($1)", daemon.id)
    taken = (await events(db, run))[-1]
    assert (taken["event"], taken["data"]["processor"]) == ("taken_over", GOOGLE)
    await move_clock(db, "1 min")
    claimed = await daemon.claim_one()
    assert (claimed["processor"], claimed["attempt"]) == (GOOGLE, 2)


@pytest.mark.parametrize(
    ("fallback", "taken", "left"),
    [
        ([GOOGLE, STABILITY], None, [GOOGLE, STABILITY]),
        ([GOOGLE, STABILITY], GOOGLE, [STABILITY]),
        ([GOOGLE, STABILITY], STABILITY, []),
        ([OPENAI, GOOGLE, OPENAI], None, [GOOGLE]),
        ([GOOGLE, STABILITY, GOOGLE, "a:b"], GOOGLE, [STABILITY, "a:b"]),
        ([GOOGLE, STABILITY, GOOGLE, "a:b"], STABILITY, ["a:b"]),
        ([GOOGLE], "taken:out", []),
        (["no model", 7, None, [GOOGLE], "x" * 9000, GOOGLE], None, [GOOGLE]),
        ({"0": GOOGLE}, None, []),
        (GOOGLE, None, []),
        (None, None, []),
    ],
)
async def test_every_step_is_taken_at_most_once_whatever_the_list_says(
    db: Db, fallback: object, taken: str | None, left: list[str]
) -> None:
    metadata = {"fallback": fallback}
    assert await db.fetchval("select image_jobs.remaining_fallbacks($1, $2, $3)", metadata, OPENAI, taken) == left


# outside hands


async def test_a_requeue_starts_again_at_the_first(db: Db, daemon: Daemon) -> None:
    run = await insert_with_fallback(db, GOOGLE)
    await fail_over(daemon, await daemon.claim_one())
    await daemon.fail(await daemon.claim_one())
    await db.execute("select requeue_run($1)", run)
    assert await routed_to(db, run) == ("pending", None)
    assert (await daemon.claim_one())["processor"] == OPENAI
    assert len(await fallbacks(db, run)) == 1


async def test_a_resumed_job_is_polled_at_the_provider_that_made_it(db: Db, daemon: Daemon) -> None:
    run = await insert_with_fallback(db, GOOGLE)
    await fail_over(daemon, await daemon.claim_one())
    await daemon.park(await daemon.claim_one(), "order-7", due_in=0)
    await daemon.fail(await daemon.claim_one(), code="polling_timeout")
    await db.execute("select requeue_run($1)", run)
    claimed = await daemon.claim_one()
    assert (claimed["processor"], claimed["provider_job_id"]) == (GOOGLE, "order-7")


async def test_outside_writers_cannot_set_routed_to(db: Db, daemon: Daemon) -> None:
    run = await insert_with_fallback(db, GOOGLE)
    await db.execute("update runs set routed_to = $1, priority = 1", STABILITY)
    assert await routed_to(db, run) == ("pending", None)
    await fail_over(daemon, await daemon.claim_one())
    await db.execute("update runs set routed_to = null, priority = 2")
    assert await routed_to(db, run) == ("pending", GOOGLE)
    assert (await run_row(db, run))["lane"] == "google"


async def test_an_operator_inserts_runs_that_begin_at_the_first(db: Db) -> None:
    await db.execute(
        "insert into runs (kind, subject_id, status, processor, metadata, routed_to) values ('image_gen', $1, 'pending', $2, $3, $4)",
        WORKFLOW,
        OPENAI,
        {"promptSpec": {"basePrompt": "a red fox"}, "fallback": [GOOGLE]},
        GOOGLE,
    )
    assert await db.fetchval("select routed_to from runs") is None


async def test_members_see_the_requested_processor_of_a_rerouted_run(db: Db, daemon: Daemon, member: UUID) -> None:
    request = {
        "nodeId": "n",
        "workflowId": str(WORKFLOW),
        "provider": "openai",
        "model": "gpt-image-2",
        "promptSpec": {"basePrompt": "a red fox"},
        "fallback": [GOOGLE],
        "fallbackOnRefusal": True,
    }
    async with signed_in(db, str(member)):
        record = await db.fetchval("select start_image_job($1)", request)
        assert (record["metadata"]["fallback"], record["metadata"]["fallbackOnRefusal"]) == ([GOOGLE], True)
        request = {**request, "fallback": None, "metadata": {"fallback": [STABILITY]}}
        merged = await db.fetchval("select start_image_job($1)", request)
        assert merged["metadata"]["fallback"] == [STABILITY]
    with pytest.raises(asyncpg.InvalidParameterValueError, match="must be a list of 1 to 5 texts"):
        await db.fetchval("select start_image_job($1)", {**request, "fallback": "google"})
    await db.execute("update runs set status = 'cancelled' where id = $1", merged["jobId"])
    await fail_over(daemon, await daemon.claim_one())
    async with signed_in(db, str(member)):
        shown = await db.fetchrow('select provider, model from image_jobs where "jobId" = $1', record["jobId"])
    assert tuple(shown) == ("openai", "gpt-image-2")


# what operators see


async def test_costs_and_counts_are_of_the_providers_that_worked(db: Db, daemon: Daemon) -> None:
    await insert_with_fallback(db, GOOGLE)
    claimed = await daemon.claim_one()
    charged = {"id": claimed["call"], "state": "charged", "cost": 0.08}
    await daemon.settle(claimed, "failed", payload=DOWN, fall_back=True, calls=[charged])
    claimed = await daemon.claim_one()
    await daemon.complete(claimed, cost=0.03)
    rows = await db.fetch("select provider, model, images, cost from image_jobs.run_costs order by provider")
    assert [(row["provider"], row["model"], row["images"], float(row["cost"])) for row in rows] == [
        ("google", "gemini-3-pro-image", 1, 0.03),
        ("openai", "gpt-image-2", 0, 0.08),
    ]
    assert await db.fetchval("select distinct provider from image_jobs.run_timings") == "google"
    counts = await db.fetch("select provider, completed from image_jobs.queue_stats")
    assert [tuple(row) for row in counts] == [("google", 1)]
