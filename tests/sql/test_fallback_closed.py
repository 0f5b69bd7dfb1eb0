"""metadata.fallback and closed providers: when a waiting run leaves one, and when it waits."""

import asyncio

import pytest

from daemon.worker.retries import LONGEST_RATE_LIMIT
from tests.sql.test_fallback import GOOGLE, OPENAI, STABILITY, close, fallbacks, insert_with_fallback, routed_to
from tests.sql.test_fallback import crowd as crowd  # noqa: PLC0414 - a fixture
from tests.sql.test_fallback import daemon as daemon  # noqa: PLC0414 - a fixture
from tests.support.postgres import connect
from tests.support.protocol import Daemon, Db, move_clock, new_daemon
from tests.support.runs import WORKFLOW, event_names, insert_run, insert_runs, run_row


async def block(db: Db, processor: str, seconds: float) -> None:
    """Block a provider, or one model of it."""
    provider, _, model = processor.partition(":")
    await db.execute(
        "select image_jobs.block_provider($1, $2, make_interval(secs => $3), 'Out of credit.')",
        provider,
        model or None,
        seconds,
    )


@pytest.mark.parametrize("processor", ["openai", OPENAI])
@pytest.mark.parametrize("how", ["paused", "blocked"])
async def test_a_waiting_run_leaves_a_provider_or_model_that_is_closed(
    db: Db, daemon: Daemon, how: str, processor: str
) -> None:
    stays = await insert_run(db, processor=OPENAI)
    run = await insert_with_fallback(db, GOOGLE)
    due = (await run_row(db, run))["due_at"]
    await (block(db, processor, 600) if how == "blocked" else close(db, processor))
    await daemon.sync()
    assert await routed_to(db, run) == ("pending", GOOGLE)
    assert await fallbacks(db, run) == [(OPENAI, GOOGLE, how)]
    why = {"paused": f"{processor} is paused.", "blocked": "Out of credit."}[how]
    assert (await run_row(db, run))["message"] == f"{why} Going on with {GOOGLE}."
    assert (await run_row(db, run))["due_at"] == due, "it has waited since then"
    claimed = await daemon.claim_one()
    assert (claimed["id"], claimed["processor"], claimed["attempt"]) == (run, GOOGLE, 1)
    assert await routed_to(db, stays) == ("pending", None)
    assert await event_names(db, stays) == ["created"]


@pytest.mark.parametrize("limit", ["per_minute = 0", "max_running = 0"])
async def test_a_limit_of_nothing_is_a_pause(db: Db, daemon: Daemon, limit: str) -> None:
    run = await insert_with_fallback(db, GOOGLE)
    await close(db, "openai", limit)
    await daemon.sync()
    assert await fallbacks(db, run) == [(OPENAI, GOOGLE, "paused")]


@pytest.mark.parametrize("limit", ["per_minute = 1", "max_running = 1", None])
async def test_short_blocks_and_restarts_are_waited_for(db: Db, daemon: Daemon, limit: str | None) -> None:
    await (close(db, "openai", limit) if limit else block(db, "openai", 29))
    runs = [await insert_with_fallback(db, GOOGLE) for _ in range(2)]
    await daemon.claim(10)
    await daemon.sync()
    assert [await fallbacks(db, run) for run in runs] == [[], []]


async def test_sql_and_daemon_wait_equally_long_for_a_rate_limit(db: Db, daemon: Daemon) -> None:
    for more, why in ((0, None), (1, "blocked")):
        await block(db, "openai", LONGEST_RATE_LIMIT + more)
        closed = await db.fetchval("select image_jobs.closed_reason($1)", OPENAI)
        assert (closed and closed["code"]) == why


async def test_a_run_that_is_not_due_waits_where_it_is(db: Db, daemon: Daemon) -> None:
    run = await insert_with_fallback(db, GOOGLE)
    await db.execute("update runs set due_at = now() + interval '1 hour'")
    await close(db, "openai")
    await daemon.sync()
    assert await routed_to(db, run) == ("pending", None)
    await move_clock(db, "61 min")
    await daemon.beat()
    await daemon.sync()
    assert await routed_to(db, run) == ("pending", GOOGLE)


async def test_an_unserved_provider_is_left_once_the_lease_is_over(db: Db) -> None:
    run = await insert_with_fallback(db, GOOGLE)
    having, other = await new_daemon(db, "openai"), await new_daemon(db, "google")
    await db.execute("select image_jobs.leave($1)", having.id)
    await other.sync(5)
    assert await routed_to(db, run) == ("pending", None), "it may be a deploy"
    await move_clock(db, "31 s")
    await other.beat()
    await other.sync(5)
    assert await fallbacks(db, run) == [(OPENAI, GOOGLE, "not_served")]
    assert (await other.claim_one())["processor"] == GOOGLE


async def test_a_closed_step_is_skipped(db: Db, daemon: Daemon) -> None:
    run = await insert_with_fallback(db, GOOGLE, "midjourney:v7", STABILITY)
    await close(db, "openai")
    await close(db, GOOGLE)
    await daemon.sync()
    assert await fallbacks(db, run) == [(OPENAI, STABILITY, "paused")]


async def test_with_all_steps_closed_a_run_goes_with_the_first_to_open(db: Db, daemon: Daemon) -> None:
    first, second = await insert_with_fallback(db, GOOGLE, STABILITY), await insert_with_fallback(db, GOOGLE, STABILITY)
    for provider in ("openai", "google", "stability"):
        await close(db, provider)
    assert await daemon.claim(10) == []
    assert await routed_to(db, first) == ("pending", None)

    await close(db, "stability", "paused = false")
    await db.execute("update runs set due_at = now() + interval '1 min' where id = $1", second)
    await daemon.sync()
    assert await routed_to(db, first) == ("pending", STABILITY)
    await close(db, "openai", "paused = false")
    await move_clock(db, "61 s")
    await daemon.beat()
    assert {claimed["processor"] for claimed in await daemon.claim(10)} == {OPENAI, STABILITY}


async def test_a_last_step_waits_as_a_run_without_a_fallback_does(db: Db, daemon: Daemon) -> None:
    run = await insert_with_fallback(db, GOOGLE)
    await close(db, "openai")
    await close(db, "google")
    await daemon.sync()
    await close(db, "google", "paused = false")
    await daemon.sync()
    await close(db, "google")
    await close(db, "openai", "paused = false")
    await daemon.sync(10)
    assert await routed_to(db, run) == ("pending", GOOGLE)
    await close(db, "google", "paused = false")
    assert (await daemon.claim_one())["processor"] == GOOGLE


async def test_hundreds_of_stuck_runs_do_not_block_a_movable_one(db: Db, daemon: Daemon) -> None:
    await insert_runs(db, 250, processor=OPENAI, fallback=[GOOGLE])
    run = await insert_with_fallback(db, STABILITY)
    await close(db, "openai")
    await close(db, "google")
    await daemon.sync()
    assert await routed_to(db, run) == ("pending", STABILITY)
    assert await db.fetchval("select count(*) from runs where routed_to is not null") == 1


async def test_a_reroute_wakes_idle_daemons(db: Db, daemon: Daemon, database: str) -> None:
    await insert_with_fallback(db, GOOGLE)
    await close(db, "openai")
    heard = asyncio.Event()
    listener = await connect(database)
    await listener.add_listener("image_jobs_wake", lambda *_: heard.set())
    await daemon.sync()
    await asyncio.wait_for(heard.wait(), 10)
    await listener.close()


async def test_concurrent_daemons_reroute_a_run_once(db: Db, crowd: list[Daemon]) -> None:
    runs = await insert_runs(db, 50, processor=OPENAI, fallback=[GOOGLE])
    await close(db, "openai")
    await asyncio.gather(*(daemon.sync() for daemon in crowd))
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
    await daemon.sync(10)
    assert await db.fetchval("select to_jsonb(r) from runs r") == before
