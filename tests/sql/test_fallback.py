"""metadata.fallback: which providers a run goes on to, when, and what it leaves as it was."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from daemon.fallback import LONGEST_RATE_LIMIT
from tests.postgres import connect, signed_in
from tests.runs import WORKFLOW, event_names, insert_run, insert_runs, run_row
from tests.sql.protocol import Daemon, Db, events, insert_node, move_clock, new_daemon, node_data

OPENAI, GOOGLE, STABILITY = "openai:gpt-image-2", "google:gemini-3-pro-image", "stability:core"
DOWN = {"error": "OpenAI had a problem.", "code": "provider_unavailable", "hint": "Wait."}


@pytest.fixture
async def daemon(db: Db) -> Daemon:
    """A daemon that serves all three."""
    return await new_daemon(db, "openai", "google", "stability")


async def order(db: Db, *fallback: str, processor: str = OPENAI, **metadata: Any) -> str:
    """Inserts a run with a fallback."""
    return await insert_run(db, processor=processor, fallback=list(fallback), **metadata)


async def fail_elsewhere(daemon: Daemon, claimed: dict[str, Any]) -> str:
    return await daemon.settle(claimed, "failed", payload=DOWN, elsewhere=True)


async def via(db: Db, run: str) -> tuple[str, str | None]:
    row = await run_row(db, run)
    return row["status"], row["via"]


async def fallbacks(db: Db, run: str) -> list[tuple[str, str, str]]:
    """From whom, to whom and why it went on."""
    return [
        (event["data"]["from"], event["data"]["to"], event["data"]["code"])
        for event in await events(db, run)
        if event["event"] == "fallback"
    ]


async def close(db: Db, processor: str, how: str = "paused = true") -> None:
    """Closes a provider, or one model of it; `how` may also open it, or limit it."""
    provider, _, model = processor.partition(":")
    await db.execute(
        "insert into provider_limits (provider, model) values ($1, $2) on conflict do nothing", provider, model or None
    )
    await db.execute(
        f"update provider_limits set {how} where provider = $1 and model is not distinct from $2",
        provider,
        model or None,
    )


# one step after the other


@pytest.mark.parametrize("outcome", ["failed", "retry"])
async def test_a_run_goes_through_its_list_in_order_and_then_fails(db: Db, daemon: Daemon, outcome: str) -> None:
    run = await order(db, GOOGLE, STABILITY)
    for processor in (OPENAI, GOOGLE, STABILITY):
        claimed = await daemon.claim_one()
        assert (claimed["processor"], claimed["requested"], claimed["attempt"]) == (processor, OPENAI, 1)
        last = processor == STABILITY
        assert await daemon.settle(claimed, "failed" if last else outcome, payload=DOWN, elsewhere=True) == "settled"
    row = await run_row(db, run)
    assert (row["status"], row["processor"], row["via"]) == ("failed", OPENAI, STABILITY)
    assert row["payload"] == {**DOWN, "attempts": 1}
    assert await fallbacks(db, run) == [
        (OPENAI, GOOGLE, "provider_unavailable"),
        (GOOGLE, STABILITY, "provider_unavailable"),
    ]
    assert await event_names(db, run) == ["created", *("claimed", "fallback") * 2, "claimed", "failed"]


async def test_a_step_is_due_at_once_and_the_event_and_the_node_say_what_happened(db: Db, daemon: Daemon) -> None:
    await insert_node(db, "n", WORKFLOW)
    run = await order(db, GOOGLE, nodeId="n")
    claimed = await daemon.claim_one()
    await daemon.settle(claimed, "retry", payload=DOWN, due_in=600, refund=True, message="Wait.", elsewhere=True)
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
    run = await order(db, GOOGLE)
    for _ in range(2):
        await daemon.settle(await daemon.claim_one(), "retry", payload=DOWN)
    await fail_elsewhere(daemon, await daemon.claim_one())
    for attempt in (1, 2, 3):
        claimed = await daemon.claim_one()
        assert (claimed["attempt"], claimed["processor"]) == (attempt, GOOGLE)
        await daemon.settle(claimed, "retry", payload=DOWN)
    assert await via(db, run) == ("failed", GOOGLE)


async def test_the_hour_of_refusals_begins_anew_with_each_step(db: Db, daemon: Daemon) -> None:
    run = await order(db, GOOGLE)
    await daemon.settle(await daemon.claim_one(), "retry", payload=DOWN, refund=True)
    await move_clock(db, "61 min")
    await daemon.settle(await daemon.claim_one(), "retry", payload=DOWN, refund=True, elsewhere=True)
    assert (await run_row(db, run))["refused_since"] is None
    await daemon.settle(await daemon.claim_one(), "retry", payload=DOWN, refund=True)
    assert (await run_row(db, run))["attempt"] == 0


async def test_what_only_this_run_did_wrong_is_wrong_everywhere(db: Db, daemon: Daemon) -> None:
    run = await order(db, GOOGLE)
    await daemon.fail(await daemon.claim_one())
    assert await via(db, run) == ("failed", None)


@pytest.mark.parametrize(("outcome", "status"), [("failed", "failed"), ("retry", "pending")])
async def test_a_run_without_a_fallback_does_not_change(db: Db, daemon: Daemon, outcome: str, status: str) -> None:
    run = await insert_run(db, processor=OPENAI)
    await daemon.settle(await daemon.claim_one(), outcome, payload=DOWN, due_in=60, elsewhere=True)
    assert await via(db, run) == (status, None)
    assert await fallbacks(db, run) == []


async def test_an_order_that_never_came_is_left_to_the_trail(db: Db, daemon: Daemon) -> None:
    run = await order(db, GOOGLE)
    await daemon.park(await daemon.claim_one(), "order-7", due_in=0)
    await fail_elsewhere(daemon, await daemon.claim_one())
    row = await run_row(db, run)
    assert (row["status"], row["provider_job_id"], row["submitted_at"]) == ("pending", None, None)
    assert (await events(db, run))[-1]["data"]["providerJobId"] == "order-7"


async def test_a_settlement_that_comes_again_takes_no_second_step(db: Db, daemon: Daemon) -> None:
    run = await order(db, GOOGLE, STABILITY)
    claimed = await daemon.claim_one()
    assert await fail_elsewhere(daemon, claimed) == "settled"
    assert await fail_elsewhere(daemon, claimed) == "already"
    assert await via(db, run) == ("pending", GOOGLE)


async def test_a_daemon_that_goes_silent_in_a_step_costs_an_attempt_of_that_step(db: Db, daemon: Daemon) -> None:
    run = await order(db, GOOGLE)
    await fail_elsewhere(daemon, await daemon.claim_one())
    await daemon.claim_one()
    await db.execute("select private.abandon_runs($1)", daemon.id)
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
    assert await db.fetchval("select private.steps_left($1, $2, $3)", metadata, OPENAI, taken) == left


# outside hands


async def test_a_requeue_starts_again_at_the_first(db: Db, daemon: Daemon) -> None:
    run = await order(db, GOOGLE)
    await fail_elsewhere(daemon, await daemon.claim_one())
    await daemon.fail(await daemon.claim_one())
    await db.execute("select requeue_run($1)", run)
    assert await via(db, run) == ("pending", None)
    assert (await daemon.claim_one())["processor"] == OPENAI
    assert len(await fallbacks(db, run)) == 1


async def test_an_order_that_is_asked_for_again_is_asked_for_where_it_was_made(db: Db, daemon: Daemon) -> None:
    run = await order(db, GOOGLE)
    await fail_elsewhere(daemon, await daemon.claim_one())
    await daemon.park(await daemon.claim_one(), "order-7", due_in=0)
    await daemon.fail(await daemon.claim_one(), code="polling_timeout")
    await db.execute("select requeue_run($1)", run)
    claimed = await daemon.claim_one()
    assert (claimed["processor"], claimed["provider_job_id"]) == (GOOGLE, "order-7")


async def test_nobody_outside_says_where_a_run_goes(db: Db, daemon: Daemon) -> None:
    run = await order(db, GOOGLE)
    await db.execute("update runs set via = $1, priority = 1", STABILITY)
    assert await via(db, run) == ("pending", None)
    await fail_elsewhere(daemon, await daemon.claim_one())
    await db.execute("update runs set via = null, priority = 2")
    assert await via(db, run) == ("pending", GOOGLE)
    assert (await run_row(db, run))["lane"] == "google"


async def test_an_operator_inserts_runs_that_begin_at_the_first(db: Db) -> None:
    await db.execute(
        "insert into runs (kind, subject_id, status, processor, metadata, via) values ('image_gen', $1, 'pending', $2, $3, $4)",
        WORKFLOW,
        OPENAI,
        {"promptSpec": {"basePrompt": "a red fox"}, "fallback": [GOOGLE]},
        GOOGLE,
    )
    assert await db.fetchval("select via from runs") is None


async def test_a_member_starts_a_job_with_a_fallback_and_sees_what_was_asked_for(
    db: Db, daemon: Daemon, member: UUID
) -> None:
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
    await fail_elsewhere(daemon, await daemon.claim_one())
    async with signed_in(db, str(member)):
        shown = await db.fetchrow('select provider, model from image_jobs where "jobId" = $1', record["jobId"])
    assert tuple(shown) == ("openai", "gpt-image-2")


# limits


async def test_a_step_stands_in_its_own_line_and_counts_in_its_own_limit(db: Db, daemon: Daemon) -> None:
    await close(db, "openai", "per_minute = 5, max_running = null")
    await close(db, "google", "per_minute = 3")
    await insert_runs(db, 20, processor=OPENAI, fallback=[GOOGLE])
    first = await daemon.claim(100)
    assert [claimed["processor"] for claimed in first] == [OPENAI] * 5
    for claimed in first:
        await fail_elsewhere(daemon, claimed)
    assert [claimed["processor"] for claimed in await daemon.claim(100)] == [GOOGLE] * 3
    await move_clock(db, "62 s")
    processors = [claimed["processor"] for claimed in await daemon.claim(100)]
    assert (processors.count(OPENAI), processors.count(GOOGLE)) == (5, 2)


async def test_what_runs_counts_for_who_is_at_work(db: Db, daemon: Daemon) -> None:
    await close(db, OPENAI, "max_running = 1")
    await close(db, GOOGLE, "max_running = 2")
    await insert_runs(db, 6, processor=OPENAI, fallback=[GOOGLE])
    for number in range(1, 4):
        mine = [claimed for claimed in await daemon.claim(100) if claimed["processor"] == OPENAI]
        assert len(mine) == 1
        await fail_elsewhere(daemon, mine[0])
        at_work = await db.fetchval("select count(*) from runs where status = 'running' and via = $1", GOOGLE)
        assert at_work == min(number - 1, 2)
    assert [claimed["processor"] for claimed in await daemon.claim(100)] == [OPENAI]


async def test_those_who_come_from_elsewhere_do_not_make_others_wait(db: Db, daemon: Daemon) -> None:
    crowd = await insert_runs(db, 20, processor=OPENAI, fallback=[GOOGLE])
    for claimed in await daemon.claim(10):
        await fail_elsewhere(daemon, claimed)
    await close(db, "openai")
    await daemon.turn()
    one = await insert_run(db, processor=GOOGLE, workflow=UUID(int=7))
    first = {claimed["id"] for claimed in await daemon.claim(4)}
    assert one in first
    assert len(first & set(crowd)) == 3


async def test_a_limit_for_the_step_that_a_run_waits_for_gives_it_that_line(db: Db, daemon: Daemon) -> None:
    run = await order(db, GOOGLE)
    await fail_elsewhere(daemon, await daemon.claim_one())
    await close(db, GOOGLE, "max_running = 0")
    assert (await run_row(db, run))["lane"] == GOOGLE
    await db.execute("update provider_limits set max_running = 1 where model is not null")
    assert (await daemon.claim_one())["id"] == run


@pytest.fixture
async def crowd(database: str) -> AsyncIterator[list[Daemon]]:
    connections = [await connect(database) for _ in range(6)]
    yield [await new_daemon(connection, "openai", "google") for connection in connections]
    for connection in connections:
        await connection.close()


async def test_many_daemons_at_once_start_exactly_as_many_of_each_step_as_allowed(db: Db, crowd: list[Daemon]) -> None:
    await close(db, "openai", "per_minute = 20")
    await close(db, "google", "per_minute = 7")
    await insert_runs(db, 60, processor=OPENAI, fallback=[GOOGLE])
    started: list[str] = []

    async def work(daemon: Daemon) -> None:
        for _ in range(6):
            for claimed in await daemon.claim(4):
                started.append(claimed["processor"])
                if claimed["processor"] == OPENAI:
                    while await fail_elsewhere(daemon, claimed) == "busy":
                        pass

    await asyncio.gather(*map(work, crowd))
    assert (started.count(OPENAI), started.count(GOOGLE)) == (20, 7)


# a provider that is closed

CLOSED = {
    "paused": "paused = true",
    "blocked": "blocked_until = now() + interval '10 min', blocked_reason = 'Out of credit.'",
}


@pytest.mark.parametrize("processor", ["openai", OPENAI])
@pytest.mark.parametrize("how", ["paused", "blocked"])
async def test_a_waiting_run_leaves_a_provider_or_model_that_is_closed(
    db: Db, daemon: Daemon, how: str, processor: str
) -> None:
    stays = await insert_run(db, processor=OPENAI)
    run = await order(db, GOOGLE)
    due = (await run_row(db, run))["due_at"]
    await close(db, processor, CLOSED[how])
    await daemon.turn()
    assert await via(db, run) == ("pending", GOOGLE)
    assert await fallbacks(db, run) == [(OPENAI, GOOGLE, how)]
    why = {"paused": f"{processor} is paused.", "blocked": "Out of credit."}[how]
    assert (await run_row(db, run))["message"] == f"{why} Going on with {GOOGLE}."
    assert (await run_row(db, run))["due_at"] == due, "it has waited since then"
    claimed = await daemon.claim_one()
    assert (claimed["id"], claimed["processor"], claimed["attempt"]) == (run, GOOGLE, 1)
    assert await via(db, stays) == ("pending", None)
    assert await event_names(db, stays) == ["created"]


@pytest.mark.parametrize("limit", ["per_minute = 0", "max_running = 0"])
async def test_a_limit_of_nothing_is_a_pause(db: Db, daemon: Daemon, limit: str) -> None:
    run = await order(db, GOOGLE)
    await close(db, "openai", limit)
    await daemon.turn()
    assert await fallbacks(db, run) == [(OPENAI, GOOGLE, "paused")]


@pytest.mark.parametrize("limit", ["per_minute = 1", "max_running = 1", "blocked_until = now() + interval '9 s'"])
async def test_what_will_soon_go_on_is_waited_for(db: Db, daemon: Daemon, limit: str) -> None:
    await close(db, "openai", limit)
    runs = [await order(db, GOOGLE) for _ in range(2)]
    await daemon.claim(10)
    await daemon.turn()
    assert [await fallbacks(db, run) for run in runs] == [[], []]


async def test_the_database_and_the_daemons_wait_equally_long_for_a_rate_limit(db: Db, daemon: Daemon) -> None:
    for more, why in ((0, None), (1, "blocked")):
        await close(db, "openai", f"blocked_until = private.now() + interval '{LONGEST_RATE_LIMIT + more} s'")
        closed = await db.fetchval("select private.why_closed($1)", OPENAI)
        assert (closed and closed["code"]) == why


async def test_a_run_that_is_not_due_waits_where_it_is(db: Db, daemon: Daemon) -> None:
    run = await order(db, GOOGLE)
    await db.execute("update runs set due_at = now() + interval '1 hour'")
    await close(db, "openai")
    await daemon.turn()
    assert await via(db, run) == ("pending", None)
    await move_clock(db, "61 min")
    await daemon.beat()
    await daemon.turn()
    assert await via(db, run) == ("pending", GOOGLE)


async def test_a_provider_that_no_living_daemon_serves_is_left_once_its_daemons_lease_is_over(db: Db) -> None:
    run = await order(db, GOOGLE)
    having, other = await new_daemon(db, "openai"), await new_daemon(db, "google")
    await db.execute("select private.leave($1)", having.id)
    await other.turn(5)
    assert await via(db, run) == ("pending", None), "it may be a deploy"
    await move_clock(db, "31 s")
    await other.beat()
    await other.turn(5)
    assert await fallbacks(db, run) == [(OPENAI, GOOGLE, "not_served")]
    assert (await other.claim_one())["processor"] == GOOGLE


async def test_a_step_that_is_closed_is_passed_over(db: Db, daemon: Daemon) -> None:
    run = await order(db, GOOGLE, "midjourney:v7", STABILITY)
    await close(db, "openai")
    await close(db, GOOGLE)
    await daemon.turn()
    assert await fallbacks(db, run) == [(OPENAI, STABILITY, "paused")]


async def test_where_every_step_is_closed_a_run_waits_and_goes_with_the_first_that_opens(
    db: Db, daemon: Daemon
) -> None:
    first, second = await order(db, GOOGLE, STABILITY), await order(db, GOOGLE, STABILITY)
    for provider in ("openai", "google", "stability"):
        await close(db, provider)
    assert await daemon.claim(10) == []
    assert await via(db, first) == ("pending", None)

    await close(db, "stability", "paused = false")
    await db.execute("update runs set due_at = now() + interval '1 min' where id = $1", second)
    await daemon.turn()
    assert await via(db, first) == ("pending", STABILITY)
    await close(db, "openai", "paused = false")
    await move_clock(db, "61 s")
    await daemon.beat()
    assert {claimed["processor"] for claimed in await daemon.claim(10)} == {OPENAI, STABILITY}


async def test_a_last_step_waits_as_a_run_without_a_fallback_does(db: Db, daemon: Daemon) -> None:
    run = await order(db, GOOGLE)
    await close(db, "openai")
    await close(db, "google")
    await daemon.turn()
    await close(db, "google", "paused = false")
    await daemon.turn()
    await close(db, "google")
    await close(db, "openai", "paused = false")
    await daemon.turn(10)
    assert await via(db, run) == ("pending", GOOGLE)
    await close(db, "google", "paused = false")
    assert (await daemon.claim_one())["processor"] == GOOGLE


async def test_hundreds_that_cannot_go_on_keep_nobody_from_going(db: Db, daemon: Daemon) -> None:
    await insert_runs(db, 250, processor=OPENAI, fallback=[GOOGLE])
    run = await order(db, STABILITY)
    await close(db, "openai")
    await close(db, "google")
    await daemon.turn()
    assert await via(db, run) == ("pending", STABILITY)
    assert await db.fetchval("select count(*) from runs where via is not null") == 1


async def test_whoever_is_free_hears_of_runs_that_have_gone_on(db: Db, daemon: Daemon, database: str) -> None:
    await order(db, GOOGLE)
    await close(db, "openai")
    heard = asyncio.Event()
    listener = await connect(database)
    await listener.add_listener("image_jobs_wake", lambda *_: heard.set())
    await daemon.turn()
    await asyncio.wait_for(heard.wait(), 10)
    await listener.close()


async def test_daemons_that_look_at_once_pass_a_run_on_once(db: Db, crowd: list[Daemon]) -> None:
    runs = await insert_runs(db, 50, processor=OPENAI, fallback=[GOOGLE])
    await close(db, "openai")
    await asyncio.gather(*(daemon.turn() for daemon in crowd))
    assert await db.fetchval("select count(*) from run_events where payload ->> 'event' = 'fallback'") == len(runs)


async def test_rows_of_other_kinds_stay_where_they_are(db: Db, daemon: Daemon) -> None:
    await db.execute(
        "insert into runs (id, kind, subject_id, status, processor, metadata) values ('r', 'research', $1, 'pending', $2, $3)",
        WORKFLOW,
        OPENAI,
        {"fallback": [GOOGLE]},
    )
    before = await db.fetchval("select to_jsonb(r) from runs r")
    await close(db, "openai")
    await daemon.turn(10)
    assert await db.fetchval("select to_jsonb(r) from runs r") == before


# what operators see


async def test_costs_and_counts_are_of_those_who_worked(db: Db, daemon: Daemon) -> None:
    await order(db, GOOGLE)
    claimed = await daemon.claim_one()
    charged = {"payload": {"event": "charged", "message": "Charged.", "data": {"cost": 0.08, "processor": OPENAI}}}
    await daemon.settle(claimed, "failed", payload=DOWN, elsewhere=True, events=[charged])
    made = {"payload": {"event": "generated", "message": "Made.", "data": {"cost": 0.03, "processor": GOOGLE}}}
    claimed = await daemon.claim_one()
    await daemon.record(claimed, events=[made])
    await daemon.complete(claimed, timings={"queuedMs": 5})
    rows = await db.fetch("select provider, model, images, cost from run_costs order by provider")
    assert [(row["provider"], row["model"], row["images"], float(row["cost"])) for row in rows] == [
        ("google", "gemini-3-pro-image", 1, 0.03),
        ("openai", "gpt-image-2", 0, 0.08),
    ]
    assert await db.fetchval("select provider from run_timings") == "google"
    counts = await db.fetch("select provider, completed from queue_stats")
    assert [tuple(row) for row in counts] == [("google", 1)]
