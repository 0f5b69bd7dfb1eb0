"""metadata.fallback and limits: each step has a lane and counts of its own."""

import asyncio
from uuid import UUID

from tests.sql.test_fallback import GOOGLE, OPENAI, close, fail_over, insert_with_fallback
from tests.sql.test_fallback import crowd as crowd  # noqa: PLC0414 - a fixture
from tests.sql.test_fallback import daemon as daemon  # noqa: PLC0414 - a fixture
from tests.support.protocol import Daemon, Db, move_clock
from tests.support.runs import insert_run, insert_runs, run_row


async def test_a_step_has_its_own_lane_and_counts_in_its_own_limit(db: Db, daemon: Daemon) -> None:
    await close(db, "openai", "per_minute = 5, max_running = null")
    await close(db, "google", "per_minute = 3")
    await insert_runs(db, 20, processor=OPENAI, fallback=[GOOGLE])
    first = await daemon.claim(100)
    assert [claimed["processor"] for claimed in first] == [OPENAI] * 5
    for claimed in first:
        await fail_over(daemon, claimed)
    assert [claimed["processor"] for claimed in await daemon.claim(100)] == [GOOGLE] * 3
    await move_clock(db, "62 s")
    processors = [claimed["processor"] for claimed in await daemon.claim(100)]
    assert (processors.count(OPENAI), processors.count(GOOGLE)) == (5, 2)


async def test_a_running_run_counts_for_the_provider_at_work(db: Db, daemon: Daemon) -> None:
    await close(db, OPENAI, "max_running = 1")
    await close(db, GOOGLE, "max_running = 2")
    await insert_runs(db, 6, processor=OPENAI, fallback=[GOOGLE])
    for number in range(1, 4):
        mine = [claimed for claimed in await daemon.claim(100) if claimed["processor"] == OPENAI]
        assert len(mine) == 1
        await fail_over(daemon, mine[0])
        at_work = await db.fetchval("select count(*) from runs where status = 'running' and routed_to = $1", GOOGLE)
        assert at_work == min(number - 1, 2)
    assert [claimed["processor"] for claimed in await daemon.claim(100)] == [OPENAI]


async def test_rerouted_runs_do_not_delay_others(db: Db, daemon: Daemon) -> None:
    crowd = await insert_runs(db, 20, processor=OPENAI, fallback=[GOOGLE])
    for claimed in await daemon.claim(10):
        await fail_over(daemon, claimed)
    await close(db, "openai")
    await daemon.sync()
    one = await insert_run(db, processor=GOOGLE, workflow=UUID(int=7))
    first = {claimed["id"] for claimed in await daemon.claim(4)}
    assert one in first
    assert len(first & set(crowd)) == 3


async def test_a_model_limit_moves_waiting_runs_of_that_step(db: Db, daemon: Daemon) -> None:
    run = await insert_with_fallback(db, GOOGLE)
    await fail_over(daemon, await daemon.claim_one())
    await close(db, GOOGLE, "max_running = 0")
    assert (await run_row(db, run))["lane"] == GOOGLE
    await db.execute("update image_jobs.provider_limits set max_running = 1 where model is not null")
    assert (await daemon.claim_one())["id"] == run


async def test_many_daemons_start_exactly_the_limit_of_each_step(db: Db, crowd: list[Daemon]) -> None:
    await close(db, "openai", "per_minute = 20")
    await close(db, "google", "per_minute = 7")
    await insert_runs(db, 60, processor=OPENAI, fallback=[GOOGLE])
    started: list[str] = []

    async def work(daemon: Daemon) -> None:
        for _ in range(6):
            for claimed in await daemon.claim(4):
                started.append(claimed["processor"])
                if claimed["processor"] == OPENAI:
                    while await fail_over(daemon, claimed) == "busy":
                        pass

    await asyncio.gather(*map(work, crowd))
    assert (started.count(OPENAI), started.count(GOOGLE)) == (20, 7)
