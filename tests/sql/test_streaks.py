"""A streak of server errors closes a provider for all daemons, for seconds; then one call goes first."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from random import Random
from typing import Any

import pytest

from tests.support.postgres import connect
from tests.support.protocol import Daemon, Db, move_clock, new_daemon
from tests.support.runs import insert_run, insert_runs, run_row

OPENAI = "openai:gpt-image-2"
DOWN = {"error": "No workers for org-secret: a red fox.", "code": "provider_unavailable", "hint": "Wait."}
DAEMONS = 4


@pytest.fixture
async def daemons(db: Db, database: str) -> AsyncIterator[list[Daemon]]:
    """Register daemons with a connection each, and put sixty runs in line without a limit."""
    await db.execute("delete from image_jobs.provider_limits")
    connections = [await connect(database) for _ in range(DAEMONS)]
    yield [await new_daemon(connection, "openai", "google") for connection in connections]
    for connection in connections:
        await connection.close()


async def at(daemons: Iterable[Daemon], seconds: float) -> None:
    """Move all daemons' clocks; each beats."""
    for daemon in daemons:
        await move_clock(daemon.connection, f"{seconds} s")
        await daemon.beat()


async def respond(daemon: Daemon, run: dict[str, Any], status: int | None = 503, **more: Any) -> str:
    """Settle a run as its provider has answered; by a server error, the attempt comes back."""
    if status == 200:
        return await daemon.settle(run, "completed", payload={"imageUrl": "https://x.io/1.png"}, http_status=200)
    more = {"payload": DOWN, "due_in": 0, "refund": True, "refund_for": 300, **more}
    return await daemon.settle(run, "retry", **more, **({} if status is None else {"http_status": status}))


async def closed_for(db: Db) -> float | None:
    """Return for how many seconds openai was closed last; None if it never was."""
    return await db.fetchval(
        "select extract(epoch from closed_until - closed_at)::float8 from image_jobs.provider_streaks where provider = 'openai'"
    )


async def claimable(daemons: Iterable[Daemon], slots: int = 5) -> int:
    return sum([len(await daemon.claim(slots)) for daemon in daemons])


async def break_down(daemons: list[Daemon], calls: int = 3) -> None:
    """Let several daemons each have a call answered with 503."""
    claimed = [(daemon, *await daemon.claim(1)) for daemon in daemons[:calls]]
    for daemon, run in claimed:
        await respond(daemon, run)


async def test_three_server_errors_in_a_row_close_a_provider(db: Db, daemons: list[Daemon]) -> None:
    await insert_run(db, processor="google:imagen")
    claimed = [(daemons[-1], *await daemons[-1].claim(1))]
    await insert_runs(db, 60, processor=OPENAI)
    claimed += [(daemon, *await daemon.claim(1)) for daemon in daemons[:-1]]
    assert sorted(run["processor"] for _, run in claimed) == ["google:imagen", *[OPENAI] * 3]
    calls = [(daemon, run) for daemon, run in claimed if run["processor"] == OPENAI]
    for daemon, run in calls[:2]:
        await respond(daemon, run)
    assert await db.fetchval("select count(*) from image_jobs.provider_blocks") == 0
    await respond(*calls[2])
    assert await claimable(daemons) == 0
    row = await db.fetchrow("select provider, model, reason from image_jobs.provider_blocks where until > now()")
    # Every signed-in user reads it: never the words of the provider, which may be another user's prompt.
    assert tuple(row) == ("openai", None, "OpenAI has a problem at the moment.")
    assert await closed_for(db) == pytest.approx(4, abs=0.1)
    queue = await db.fetchrow(
        "select blocked_until > now() as blocked from image_jobs.queue_stats where provider = 'openai'"
    )
    assert queue["blocked"]


@pytest.mark.parametrize("status", [200, 400, 429])
async def test_any_other_response_ends_the_streak(db: Db, daemons: list[Daemon], status: int) -> None:
    await insert_runs(db, 60, processor=OPENAI)
    runs = await daemons[0].claim(5)
    for run, each in zip(runs, (503, 500, status, 502, 503), strict=True):
        await respond(daemons[0], run, each)
    assert await db.fetchval("select count(*) from image_jobs.provider_blocks") == 0
    assert await claimable(daemons) == 20


async def test_no_response_neither_makes_nor_ends_a_streak(db: Db, daemons: list[Daemon]) -> None:
    await insert_runs(db, 60, processor=OPENAI)
    runs = await daemons[0].claim(9)
    for run in runs[:4]:
        await respond(daemons[0], run, None)
    assert not await db.fetchval("select image_jobs.has_streaks()")
    for run, status in zip(runs[4:], (503, None, 503, None, 503), strict=True):
        await respond(daemons[0], run, status)
    assert await closed_for(db) == pytest.approx(4, abs=0.1)


async def test_half_open_one_call_of_all_daemons_goes_first(db: Db, daemons: list[Daemon]) -> None:
    await insert_runs(db, 60, processor=OPENAI)
    await break_down(daemons)
    await at(daemons, 3.5)
    assert await claimable(daemons) == 0
    await at(daemons, 5)
    probes = [(daemon, run) for daemon in daemons for run in await daemon.claim(5)]
    assert len(probes) == 1
    await respond(*probes[0], 200)
    assert await claimable(daemons) == 20
    assert not await db.fetchval("select image_jobs.has_streaks()")


async def test_a_failed_probe_closes_for_twice_as_long(db: Db, daemons: list[Daemon]) -> None:
    await insert_runs(db, 60, processor=OPENAI)
    await break_down(daemons)
    seconds, pauses = 0.0, [await closed_for(db)]
    for _ in range(5):
        seconds += (pauses[-1] or 0) + 0.5
        await at(daemons, seconds)
        (probe,) = await daemons[0].claim(5)
        await respond(daemons[0], probe)
        assert await claimable(daemons) == 0
        pauses.append(await closed_for(db))
    assert pauses == [pytest.approx(wanted, abs=0.1) for wanted in (4, 8, 16, 32, 60, 60)]
    rows = await db.fetch("select attempt, status from runs")
    assert {tuple(row) for row in rows} == {(0, "pending")}


async def test_calls_from_before_the_closing_do_not_count_again(db: Db, daemons: list[Daemon]) -> None:
    await insert_runs(db, 60, processor=OPENAI)
    old = await daemons[3].claim(5)
    await break_down(daemons)
    await respond(daemons[3], old[0])
    await at(daemons, 5)
    for run in old[1:4]:
        await respond(daemons[3], run)
    assert await closed_for(db) == pytest.approx(4, abs=0.1)
    assert await claimable(daemons) == 1
    await respond(daemons[3], old[4], 200)
    assert await claimable(daemons) == 20


@pytest.mark.parametrize("how", ["unanswered", "lost"])
async def test_a_probe_that_brings_no_response_is_followed_by_another(db: Db, daemons: list[Daemon], how: str) -> None:
    await insert_runs(db, 60, processor=OPENAI)
    await break_down(daemons)
    await at(daemons, 5)
    (probe,) = await daemons[0].claim(5)
    assert await claimable(daemons) == 0
    if how == "unanswered":
        await respond(daemons[0], probe, None)
    else:
        await db.execute("update runs set status = 'cancelled' where id = $1", probe["id"])
        await at(daemons, 34)
        assert await claimable(daemons) == 0
        await at(daemons, 36)
    assert await claimable(daemons) == 1


async def test_the_probe_is_a_run_that_has_lost_no_attempt(db: Db, daemons: list[Daemon]) -> None:
    """Errors of a gateway cost an attempt: those that were in flight are not tried again first."""
    await insert_runs(db, 6, processor=OPENAI)
    hit = await daemons[0].claim(3)
    for run in hit:
        await respond(daemons[0], run, 502, refund=False)
    probes = []
    for seconds in (5, 15, 35):
        await at(daemons, seconds)
        (probe,) = await daemons[1].claim(5)
        await respond(daemons[1], probe, 502, refund=False)
        probes.append(probe["id"])
    assert {run["id"] for run in hit}.isdisjoint(probes) and len(set(probes)) == 3
    await at(daemons, 70)
    (probe,) = await daemons[1].claim(5)
    await respond(daemons[1], probe, 200)
    assert await claimable(daemons) == 5
    assert await db.fetchval("select max(attempt) from runs") == 2


async def test_a_settlement_that_is_sent_again_counts_once(db: Db, daemons: list[Daemon]) -> None:
    await insert_runs(db, 60, processor=OPENAI)
    (run,) = await daemons[0].claim(1)
    assert [await respond(daemons[0], run) for _ in range(4)] == ["settled", *["already"] * 3]
    assert await db.fetchval("select failed from image_jobs.provider_streaks") == [run["claim"]]


async def test_a_server_error_of_a_locked_run_counts_once(db: Db, daemons: list[Daemon]) -> None:
    """Its settlement is sent again until the lock is gone."""
    await insert_runs(db, 60, processor=OPENAI)
    (run,) = await daemons[0].claim(1)
    async with db.transaction():
        await db.execute("select from runs where id = $1 for update", run["id"])
        assert [await respond(daemons[0], run) for _ in range(4)] == ["busy"] * 4
    assert await respond(daemons[0], run) == "settled"
    assert await claimable(daemons) == 20


async def test_a_longer_block_survives_the_end_of_a_streak(db: Db, daemons: list[Daemon]) -> None:
    await insert_runs(db, 60, processor=OPENAI)
    late = await daemons[3].claim(1)
    await break_down(daemons)
    await db.execute("select image_jobs.block_provider('openai', null, '10 min', 'Out of credit.')")
    await respond(daemons[3], late[0], 200)
    assert await db.fetchval("select reason from image_jobs.provider_blocks where until > now()") == "Out of credit."
    assert await claimable(daemons) == 0


async def test_an_operator_opens_a_provider_for_a_probe(db: Db, daemons: list[Daemon]) -> None:
    await insert_runs(db, 60, processor=OPENAI)
    await break_down(daemons)
    await db.execute("delete from image_jobs.provider_blocks where provider = 'openai'")
    assert await claimable(daemons) == 1


async def test_limits_count_a_probe_as_any_start(db: Db, daemons: list[Daemon]) -> None:
    await insert_runs(db, 60, processor=OPENAI)
    await break_down(daemons)
    await db.execute("insert into image_jobs.provider_limits (provider, max_running) values ('openai', 0)")
    await at(daemons, 5)
    assert await claimable(daemons) == 0
    await db.execute("update image_jobs.provider_limits set max_running = 7")
    assert await claimable(daemons) == 1


async def test_attempts_come_back_for_as_long_as_the_refusal_says(db: Db, daemons: list[Daemon]) -> None:
    run = await insert_run(db, processor=OPENAI)
    left = []
    for seconds, within in ((0, 300), (299, 300), (301, 300), (302, None), (3599, None), (3601, None)):
        await at(daemons[:1], seconds)
        more = {"refund_for": within} if within else {}
        await daemons[0].settle(await daemons[0].claim_one(), "retry", payload=DOWN, due_in=0, refund=True, **more)
        left.append((await run_row(db, run))["attempt"])
    assert left == [0, 0, 1, 1, 1, 2]


async def test_a_daemon_claims_nothing_it_cannot_reach(db: Db, daemons: list[Daemon]) -> None:
    await insert_runs(db, 2, processor=OPENAI)
    (first, *_) = [run for run in await daemons[0].claim(3) if run["processor"] == OPENAI]
    await daemons[0].park(first, due_in=0)
    more = await insert_run(db, processor=OPENAI)
    assert await daemons[1].sync(5, unreachable=["openai"]) == []
    assert {run["id"] for run in await daemons[2].claim(5)} == {first["id"], more}


async def test_streaks_deadlock_with_nothing(db: Db, daemons: list[Daemon]) -> None:
    """Four daemons settle two providers' answers at random, in batches, while they claim, and limits and blocks change: no
    statement is refused with 40P01."""
    await db.execute(
        "insert into image_jobs.provider_limits (provider, max_running) values ('openai', 30), ('google', 30)"
    )
    for processor in (OPENAI, "google:imagen"):
        await insert_runs(db, 150, processor=processor)

    async def work(daemon: Daemon, random: Random) -> None:
        held: list[dict[str, Any]] = []
        for step in range(40):
            settlements = [
                {
                    "id": run["id"],
                    "claim": run["claim"],
                    "outcome": "retry",
                    "payload": DOWN,
                    "due_in": 0,
                    "refund": True,
                }
                | {"http_status": random.choice((503, 503, 503, 200))}
                for run in held
            ]
            random.shuffle(settlements)
            rows = await daemon.sync(6, settlements=settlements, full_scan=step % 5 == 0)
            held = [row for row in rows if row["part"] == "claimed"]
            if step % 7 == 0:
                await move_clock(daemon.connection, f"{step} s")
                await daemon.beat()

    async def operate(connection: Db, random: Random) -> None:
        for _ in range(60):
            await connection.execute(
                random.choice(
                    (
                        "select image_jobs.block_provider('openai', null, '10 ms', 'Slow down.')",
                        "select image_jobs.block_provider('google', 'imagen', '10 ms', 'Slow down.')",
                        "update image_jobs.provider_limits set max_running = 20",
                        "delete from image_jobs.provider_blocks",
                    )
                )
            )

    workers = [work(daemon, Random(number)) for number, daemon in enumerate(daemons)]
    await asyncio.gather(*workers, operate(db, Random(9)))
