"""Starvation: neither runs that cannot move nor checks of one provider keep others waiting."""

from uuid import uuid4

import pytest

from tests.support.protocol import Daemon, Db, move_clock, new_daemon
from tests.support.runs import insert_run, insert_runs, run_row

pytestmark = pytest.mark.one_postgres


async def pause(db: Db, *providers: str) -> None:
    for provider in providers:
        await db.execute(
            """insert into image_jobs.provider_limits (provider, paused) values ($1, true)
            on conflict (provider, model) do update set paused = true""",
            provider,
        )


@pytest.fixture
async def all_providers(db: Db) -> Daemon:
    return await new_daemon(db, "openai", "google", "stability", "demo")


async def test_runs_that_cannot_move_hold_up_no_fallback(db: Db, all_providers: Daemon) -> None:
    await pause(db, "openai", "google")
    await insert_runs(db, 250, processor="openai:gpt-image-2", fallback=["google:gemini-3-pro-image"])
    steps = ["google:gemini-3-pro-image", "stability:core"]
    run = await insert_run(db, processor="openai:gpt-image-2", fallback=steps)
    await all_providers.claim(0)
    assert (await run_row(db, run))["routed_to"] == "stability:core"


async def test_invented_routes_hold_up_no_fallback(db: Db, all_providers: Daemon) -> None:
    """More routes that lead nowhere than one scan looks at: each scan begins with another."""
    await pause(db, "openai", "google")
    await db.execute(
        """insert into runs (kind, subject_id, processor, metadata)
        select 'image_gen', $1, 'openai:gpt-image-2', jsonb_build_object(
            'promptSpec', '{"basePrompt": "a red fox"}'::jsonb, 'fallback', array['google:invented-' || n])
        from generate_series(1, 300) n""",
        uuid4(),
    )
    runs = [
        await insert_run(db, processor="openai:gpt-image-2", fallback=["stability:core", f"google:another-{number}"])
        for number in range(8)
    ]
    for _ in range(30):
        await all_providers.claim(0)
    assert [(await run_row(db, run))["routed_to"] for run in runs] == 8 * ["stability:core"]


async def park(db: Db, daemon: Daemon, processor: str, count: int, due_in: float = 0) -> list[str]:
    """Insert runs and park them."""
    runs = await insert_runs(db, count, processor=processor, workflow=uuid4())
    claims = await daemon.claim(count)
    settlements = [
        {
            "id": claim["id"],
            "claim": claim["claim"],
            "outcome": "parked",
            "provider_job_id": claim["id"],
            "due_in": due_in,
        }
        for claim in claims
    ]
    await daemon.sync(settlements=settlements)
    return runs


async def test_checks_come_in_the_sequence_they_fell_due(db: Db, all_providers: Daemon) -> None:
    second = await park(db, all_providers, "demo:painter", 20, due_in=20)
    first = await park(db, all_providers, "stability:core", 3, due_in=10)
    await move_clock(db, "30 s")
    assert {claim["id"] for claim in await all_providers.claim(3)} == set(first)
    assert {claim["id"] for claim in await all_providers.claim(3)} <= set(second)


async def test_due_checks_leave_half_the_slots_to_starts(db: Db, all_providers: Daemon) -> None:
    parked = await park(db, all_providers, "demo:painter", 20)
    await insert_runs(db, 20, processor="stability:core")
    claimed = {claim["id"] for claim in await all_providers.claim(8)}
    assert len(claimed & set(parked)) == 4
    assert len(claimed) == 8


async def test_a_daemon_with_one_slot_starts_beside_checks(db: Db, all_providers: Daemon) -> None:
    parked = await park(db, all_providers, "demo:painter", 40)
    await insert_runs(db, 40, processor="stability:core")
    claimed = [(await all_providers.claim(1, full_scan=False))[0]["id"] for _ in range(40)]
    assert 0 < len(set(claimed) & set(parked)) < 40


@pytest.mark.parametrize("parked_first", [True, False])
async def test_a_higher_priority_comes_before_all_checks(db: Db, all_providers: Daemon, parked_first: bool) -> None:
    parked = await park(db, all_providers, "demo:painter", 20)
    pending = await insert_run(db, processor="stability:core")
    first = parked[7] if parked_first else pending
    await db.execute("update runs set priority = 100 where id = $1", first)
    assert [claim["id"] for claim in await all_providers.claim(1)] == [first]


async def test_slots_that_starts_leave_go_to_checks(db: Db, all_providers: Daemon) -> None:
    await park(db, all_providers, "demo:painter", 20)
    await insert_run(db, processor="stability:core")
    assert len(await all_providers.claim(8)) == 8
