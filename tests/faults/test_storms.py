"""Kills, cancellations and requeues by the dozen: at the end each run has ended, once."""

from contextlib import AsyncExitStack

import pytest

from tests.support.fault_harness import FaultHarness, kill
from tests.support.postgres import wait_until

TINY = {"basePrompt": "a", "size": "64x64"}


@pytest.mark.timeout(100)
async def test_two_hundred_runs_survive_repeated_kills(harness: FaultHarness) -> None:
    environment = {"IMAGE_JOBS_CONCURRENCY": "4", "IMAGE_JOBS_LEASE": "1"}
    async with AsyncExitStack() as stack:
        living = [await stack.enter_async_context(harness.run_daemon(**environment)) for _ in range(2)]
        for it in living:
            await it.started()
        await harness.insert_runs(200, "demo:painter", demo={"noop": True})
        for killed in range(1, 4):

            async def advanced(killed: int = killed) -> bool:
                return (
                    await harness.db.fetchval("select count(*) from runs where finished_at is not null") >= 50 * killed
                )

            await wait_until(advanced, timeout=30)
            victim = living.pop(0)
            await kill(victim)
            living.append(await stack.enter_async_context(harness.run_daemon(**environment)))
        await harness.assert_all_end_once(timeout=50)
        await harness.wait_until_idle()
    rows = await harness.db.fetch("select status, payload ->> 'code' as code, count(*) from runs group by 1, 2")
    assert {(row["status"], row["code"]) for row in rows} <= {("completed", None), ("failed", "outcome_unknown")}
    submissions = await harness.db.fetch(
        "select count(*) as times from run_events where payload ->> 'event' = 'submitted' group by run_id"
    )
    assert max(row["times"] for row in submissions) <= 3


async def test_hundred_cancellations_and_requeues_leave_no_leak(harness: FaultHarness) -> None:
    async with harness.run_daemon(IMAGE_JOBS_CONCURRENCY="6") as it:
        await it.started()
        for demo in ({"hang": True}, {"slow": 1}, {"noop": True}, {"submit": 0.2}, {"throttle": 0.2}):
            await harness.insert_runs(4, "demo:painter", demo=demo, prompt=TINY)
        for number in range(100):
            await harness.db.execute(
                """update runs set status = case when random() < 0.3 then 'cancelled' else 'pending' end
                where id in (select id from runs where status in ('running', 'pending') order by random() limit 5)"""
            )
            if number % 10 == 0:
                await harness.db.execute("update runs set status = 'pending' where status = 'cancelled'")

            async def working() -> bool:
                return await harness.db.fetchval("select count(*) from runs where claimed_by is not null") > 0

            await wait_until(working)
        await harness.db.execute(
            """update runs set status = 'cancelled' where status in ('running', 'pending')
            and metadata -> 'demo' ?| array['hang', 'throttle']"""
        )
        await harness.assert_all_end_once(timeout=40)
        await harness.wait_until_idle()
        # All six slots are there, still.
        await harness.insert_runs(6, "demo:painter", demo={"hang": True})

        async def full() -> bool:
            return await harness.db.fetchval("select count(*) from runs where claimed_by is not null") == 6

        await wait_until(full)
        await harness.db.execute("update runs set status = 'cancelled' where status = 'running'")
        await harness.assert_all_end_once()
        await harness.wait_until_idle()
        assert not it.logged("run.crashed")


async def test_limits_hold_while_daemons_die(harness: FaultHarness) -> None:
    await harness.db.execute(
        "insert into image_jobs.provider_limits (provider, max_running, per_minute) values ('demo', 3, 12)"
        " on conflict (provider, model) do update set max_running = 3, per_minute = 12"
    )
    most = 0

    async def started() -> int:
        nonlocal most
        most = max(most, await harness.db.fetchval("select count(*) from runs where status = 'running'"))
        claims: int = await harness.db.fetchval("select count(*) from run_events where payload ->> 'event' = 'claimed'")
        return claims

    environment = {"IMAGE_JOBS_CONCURRENCY": "8", "IMAGE_JOBS_LEASE": "1"}
    async with AsyncExitStack() as stack:
        living = [await stack.enter_async_context(harness.run_daemon(**environment)) for _ in range(2)]
        for it in living:
            await it.started()
        await harness.insert_runs(20, "demo:painter", demo={"slow": 0.3}, prompt=TINY)

        async def reached() -> bool:
            return await started() >= 5

        await wait_until(reached, timeout=20)
        await kill(living[0])

        async def stopped_at_twelve() -> bool:
            running = await harness.db.fetchval("select count(*) from runs where claimed_by is not null")
            return await started() == 12 and running == 0

        await wait_until(stopped_at_twelve, timeout=20)
        assert most == 3
        await harness.db.execute("update image_jobs.provider_limits set per_minute = null where provider = 'demo'")

        async def all_ended() -> bool:
            await started()
            return await harness.db.fetchval("select bool_and(finished_at is not null) from runs")

        await wait_until(all_ended, timeout=30)
        await harness.assert_all_end_once()
        assert most == 3
