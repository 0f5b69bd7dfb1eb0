"""A block closes a provider, or the model that draws, for all daemons; it moves no runs and costs claims nothing."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sql.test_limits import CLAIM, buffers_of
from tests.sql.test_models import publish
from tests.support.postgres import connect
from tests.support.protocol import Daemon, Db, move_clock, new_daemon
from tests.support.runs import insert_run, insert_runs

RETIRED = {"retired": "2026-01-01", "successor": "large"}


@pytest.fixture
async def daemon(db: Db) -> Daemon:
    """Register a daemon that serves openai, without a limit."""
    await db.execute("delete from image_jobs.provider_limits")
    return await new_daemon(db, "openai")


async def block(db: Db, model: str | None, seconds: float = 60) -> None:
    await db.execute(
        "select image_jobs.block_provider('openai', $1, make_interval(secs => $2), 'Slow down.')", model, seconds
    )


async def unblock(db: Db, model: str) -> None:
    await db.execute("delete from image_jobs.provider_blocks where model = $1", model)


def processors(claimed: list[dict[str, Any]]) -> list[str]:
    return sorted(run["processor"] for run in claimed)


async def test_a_block_holds_for_every_name_of_the_model(db: Db, daemon: Daemon) -> None:
    await publish(db, "openai", {"model": "large"}, {"model": "small"}, {"model": "old", **RETIRED})
    names = ("large", "old", "old-2025-12-24", "small", "unlisted")
    for name in names:
        await insert_run(db, processor=f"openai:{name}")
    await block(db, "large")
    assert processors(await daemon.claim(10)) == ["openai:small", "openai:unlisted"]
    await move_clock(db, "61 s")
    await daemon.beat()
    assert processors(await daemon.claim(10)) == ["openai:large", "openai:old", "openai:old-2025-12-24"]


async def test_a_block_moves_no_runs_and_makes_no_lane(db: Db, daemon: Daemon) -> None:
    await insert_runs(db, 20, processor="openai:small")
    state = "select array_agg(xmin::text || lane || rank order by id) from runs"
    before = await db.fetchval(state), await db.fetchval("select array_agg(lane order by lane) from image_jobs.lanes")
    await block(db, "small")
    assert await daemon.claim(10) == []
    await move_clock(db, "61 s")
    assert before == (
        await db.fetchval(state),
        await db.fetchval("select array_agg(lane order by lane) from image_jobs.lanes"),
    )


async def test_a_limited_model_waits_in_its_lane_for_its_block(db: Db, daemon: Daemon) -> None:
    await db.execute(
        "insert into image_jobs.provider_limits (provider, model, max_running) values ('openai', 'small', 9)"
    )
    await insert_run(db, processor="openai:small")
    await insert_run(db, processor="openai:large")
    await block(db, "small")
    assert processors(await daemon.claim(10)) == ["openai:large"]


async def test_runs_passed_over_come_first_once_the_block_ends(db: Db, daemon: Daemon) -> None:
    """Also without a full scan, of which there may be one in five seconds."""
    await insert_runs(db, 30, processor="openai:small")
    await insert_runs(db, 30, processor="openai:large")
    await block(db, "small")
    for _ in range(2):
        assert set(processors(await daemon.claim(10, full_scan=False))) == {"openai:large"}
    await unblock(db, "small")
    for _ in range(3):
        assert processors(await daemon.claim(10, full_scan=False)) == ["openai:small"] * 10
    assert processors(await daemon.claim(20, full_scan=False)) == ["openai:large"] * 10
    assert await db.fetchval("select passed_over from image_jobs.lanes where lane = 'openai'") is None


MODELS = ("large", "medium", "small")
WORKFLOWS = (UUID(int=1), UUID(int=2), UUID(int=3))
STEPS = st.one_of(
    st.tuples(st.just("insert"), st.sampled_from(MODELS), st.sampled_from(WORKFLOWS), st.integers(1, 6)),
    st.tuples(st.just("block"), st.sampled_from(MODELS)),
    st.tuples(st.just("unblock"), st.sampled_from(MODELS)),
    st.tuples(st.just("claim"), st.integers(1, 8), st.booleans()),
)


@dataclass
class Waiting:
    """A run that waits, in the order of claims."""

    rank: int
    ticket: int
    id: str
    model: str


@pytest.mark.one_postgres
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEPS, min_size=5, max_size=30))
async def test_claims_take_the_first_runs_of_open_models(db: Db, daemon: Daemon, steps: list[tuple[Any, ...]]) -> None:
    """Up to 30 inserts, blocks, openings and claims, with full scans and without, of three models and three workflows."""
    await db.execute("truncate runs, run_events, image_jobs.provider_blocks; delete from image_jobs.watermarks")
    blocked: set[str] = set()
    for what, *arguments in [*steps, *(("unblock", model) for model in MODELS), ("claim", 200, False)]:
        match what:
            case "insert":
                model, workflow, count = arguments
                await insert_runs(db, count, processor=f"openai:{model}", workflow=workflow)
            case "block":
                await block(db, *arguments)
                blocked.add(arguments[0])
            case "unblock":
                await unblock(db, *arguments)
                blocked -= set(arguments)
            case _:
                slots, full_scan = arguments
                rows = await db.fetch(
                    "select rank, ticket, id, split_part(processor, ':', 2) from runs where status = 'pending'"
                )
                waiting = sorted((Waiting(*row) for row in rows), key=lambda run: (run.rank, run.ticket))
                wanted = [run.id for run in waiting if run.model not in blocked][:slots]
                claimed = [run["id"] for run in await daemon.claim(slots, full_scan=full_scan)]
                assert sorted(claimed) == sorted(wanted)
    assert await db.fetchval("select count(*) from runs where status = 'pending'") == 0


async def fill(db: Db, count: int, processor: str) -> None:
    """Insert very many runs in front, without the triggers, which would take a minute; `%` in the name becomes a number."""
    await db.execute("alter table runs disable trigger user")
    await db.execute(
        """insert into runs (id, kind, subject_id, status, processor, metadata, progress, priority, due_at, attempt,
            max_attempts, claim, ticket, lane, rank, queue_state)
        select 'many-' || n, 'image_gen', md5((n % 100)::text)::uuid, 'pending', replace($1, '%', n::text), '{}', 0, 0,
            image_jobs.now(), 0, 3, n, n, 'openai', 0, 'pending'
        from generate_series(1, $2) n""",
        processor,
        count,
    )
    await db.execute("alter table runs enable trigger user")
    await db.execute("analyze runs")


async def test_20_000_runs_of_a_blocked_model_cost_claims_nothing(db: Db, daemon: Daemon) -> None:
    await insert_runs(db, 50, processor="openai:large")
    await daemon.claim(5)
    await block(db, "small", 600)
    await buffers_of(db, CLAIM, daemon.id, True)
    before = await buffers_of(db, CLAIM, daemon.id, True)
    await fill(db, 20_000, "openai:small")
    await buffers_of(db, CLAIM, daemon.id, True)  # reads the catalogue anew, which is not what is measured
    for full_scan in (False, True):
        assert await buffers_of(db, CLAIM, daemon.id, full_scan) < before + 250
    assert await db.fetchval("select count(*) from runs where status = 'running'") == 30


async def test_invented_names_of_a_blocked_model_cost_little(db: Db, daemon: Daemon) -> None:
    """Snapshots that nobody ever made: as many as are looked at in one claim."""
    await publish(db, "openai", {"model": "large"}, {"model": "old", **RETIRED})
    await insert_runs(db, 50, processor="openai:large")
    await block(db, "small", 600)
    before = await buffers_of(db, CLAIM, daemon.id, True)
    await fill(db, 5_000, "openai:%")
    assert await buffers_of(db, CLAIM, daemon.id, True) < before + 5_000
    assert await daemon.claim(5)


@pytest.fixture
async def crowd(database: str) -> AsyncIterator[list[Daemon]]:
    connections = [await connect(database) for _ in range(6)]
    yield [await new_daemon(connection, "openai") for connection in connections]
    for connection in connections:
        await connection.close()


async def test_many_daemons_claim_each_open_run_once_beside_a_block(db: Db, crowd: list[Daemon]) -> None:
    await db.execute("delete from image_jobs.provider_limits")
    await insert_runs(db, 50, processor="openai:small")
    await insert_runs(db, 120, processor="openai:large")
    await block(db, "small", 600)

    async def work(daemon: Daemon) -> list[str]:
        return [run["id"] for _ in range(12) for run in await daemon.claim(4, full_scan=False)]

    claimed = [run for each in await asyncio.gather(*map(work, crowd)) for run in each]
    assert len(claimed) == len(set(claimed)) == 120
    await unblock(db, "small")
    assert len(await crowd[0].claim(100, full_scan=False)) == 50
