"""The page does what the recipes do: it counts first, then changes that many, a slice at a time."""

import asyncio
from typing import Any

import asyncpg
import httpx
import pytest

from daemon.pages.dashboard import operations
from tests.support.postgres import connect, wait_until
from tests.support.protocol import Daemon, move_clock, new_daemon, run_in
from tests.support.runs import insert_run, insert_runs, run_row

Db = asyncpg.Connection


@pytest.fixture
async def daemon(db: Db) -> Daemon:
    return await new_daemon(db)


class Page:
    """Asks for a count, confirms it, and goes on until nothing is left."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def count(self, **operation: Any) -> dict[str, Any]:
        response = await self.client.post("/dashboard/api/preview", json={"operation": operation})
        assert response.status_code == 200, response.text
        return response.json()

    async def act(self, bounds: dict[str, Any], **operation: Any) -> dict[str, Any]:
        response = await self.client.post("/dashboard/api/act", json={"operation": operation, "bounds": bounds})
        assert response.status_code == 200, response.text
        return response.json()

    async def do(self, **operation: Any) -> tuple[int, int]:
        """Return how many runs were counted, and how many were changed."""
        counted = await self.count(**operation)
        done, left = 0, 1
        while left:
            slice_ = await self.act(counted["bounds"], **operation)
            done, left = done + slice_["done"], slice_["left"]
        return counted["runs"], done


@pytest.fixture
def page(client: httpx.AsyncClient) -> Page:
    return Page(client)


async def fail(db: Db, daemon: Daemon, code: str, count: int) -> list[str]:
    runs = await insert_runs(db, count)
    for claimed in await daemon.claim(count):
        await daemon.fail(claimed, code)
    return runs


async def statuses(db: Db) -> dict[str, int]:
    return dict(await db.fetch("select status, count(*) from runs group by 1"))


async def test_failed_runs_of_a_code_are_requeued_in_slices(db, daemon, page, monkeypatch):
    monkeypatch.setattr(operations, "SLICE", 2)
    await fail(db, daemon, "timeout", 5)
    await fail(db, daemon, "refused", 1)
    operation = {"kind": "requeue", "code": "timeout", "period": "1h"}
    counted = await page.count(**operation)
    assert counted["runs"] == 5
    for done, left in ((2, 3), (2, 1), (1, 0)):
        assert await page.act(counted["bounds"], **operation) == {"done": done, "left": left}
    assert await statuses(db) == {"pending": 5, "failed": 1}
    assert await page.do(kind="requeue", code="timeout", period="1h") == (0, 0)


async def test_runs_that_failed_before_the_period_stay(db, daemon, page):
    await move_clock(db, "-2 hours")
    daemon = await new_daemon(db)
    await fail(db, daemon, "timeout", 1)
    await move_clock(db, "0")
    assert (await page.count(kind="requeue", code="timeout", period="1h"))["runs"] == 0
    assert await page.do(kind="requeue", code="timeout", period="24h") == (1, 1)


async def test_later_failures_are_left_alone(db, daemon, page):
    await fail(db, daemon, "timeout", 1)
    operation = {"kind": "requeue", "code": "timeout", "period": "1h"}
    counted = await page.count(**operation)
    assert counted["runs"] == 1
    (later,) = await fail(db, daemon, "timeout", 1)
    assert await page.act(counted["bounds"], **operation) == {"done": 1, "left": 0}
    assert (await run_row(db, later))["status"] == "failed"


async def test_waiting_runs_of_a_provider_are_cancelled(db, daemon, page):
    running = await run_in(db, daemon, "running")
    await insert_runs(db, 3, processor="openai:gpt-image-1")
    await insert_run(db, processor="google:imagen-4.0-generate-001")
    await db.execute("update runs set due_at = now() + interval '1 day' where id = $1", await insert_run(db))
    assert await page.do(kind="cancel", state="pending", provider="openai") == (3, 3)
    assert await page.do(kind="cancel", state="pending", provider="demo") == (1, 1)
    assert (await run_row(db, running))["status"] == "running"
    assert await statuses(db) == {"cancelled": 4, "pending": 1, "running": 1}
    assert await page.do(kind="cancel", state="running", provider="demo") == (1, 1)


async def test_later_runs_still_wait(db, page):
    await insert_runs(db, 2)
    operation = {"kind": "cancel", "state": "pending", "provider": "demo"}
    counted = await page.count(**operation)
    later = await insert_run(db)
    assert await page.act(counted["bounds"], **operation) == {"done": 2, "left": 0}
    assert (await run_row(db, later))["status"] == "pending"


async def test_runs_that_start_later_are_not_cancelled(db, daemon, page, monkeypatch):
    monkeypatch.setattr(operations, "SLICE", 1)
    older = await insert_runs(db, 2)
    await db.execute("update runs set priority = 1 where id = any ($1)", await insert_runs(db, 2))
    await daemon.claim(2)
    operation = {"kind": "cancel", "state": "running", "provider": "demo"}
    counted = await page.count(**operation)
    assert counted["runs"] == 2
    for left in (1, 0):
        assert await page.act(counted["bounds"], **operation) == {"done": 1, "left": left}
        await daemon.claim(1)  # in the room that a slice has made
    assert await statuses(db) == {"cancelled": 2, "running": 2}
    assert [(await run_row(db, run))["status"] for run in older] == ["running", "running"]


async def test_runs_that_come_back_to_wait_are_not_cancelled(db, daemon, page):
    await insert_runs(db, 2)
    retried, released = await daemon.claim(2)
    waiting = await insert_run(db)
    operation = {"kind": "cancel", "state": "pending", "provider": "demo"}
    counted = await page.count(**operation)
    assert counted["runs"] == 1
    await daemon.settle(retried, "retry", payload={"error": "No.", "code": "overloaded"}, due_in=600)
    await daemon.settle(released, "released")
    assert await page.act(counted["bounds"], **operation) == {"done": 1, "left": 0}
    assert (await run_row(db, waiting))["status"] == "cancelled"
    assert await statuses(db) == {"cancelled": 1, "pending": 2}
    assert await page.do(**operation) == (2, 2)


async def test_waiting_runs_of_a_model_are_cancelled(db, page):
    await insert_run(db, processor="openai:gpt-image-1")
    await insert_run(db, processor="openai:gpt-image-1-mini")
    operation = {"kind": "cancel", "state": "pending", "provider": "openai", "model": "gpt-image-1"}
    assert await page.do(**operation) == (1, 1)


async def test_invented_providers_are_cancelled_as_one(db, page):
    await insert_run(db, processor="invented:a")
    await insert_run(db, processor="made-up:b")
    await insert_run(db)
    assert await page.do(kind="cancel", state="pending", provider="?") == (2, 2)


async def test_retries_after_a_code_are_cancelled(db, daemon, page):
    await insert_run(db)
    claimed = await daemon.claim_one()
    await daemon.settle(claimed, "retry", payload={"error": "No.", "code": "overloaded"}, due_in=600)
    await insert_run(db)
    assert await page.do(kind="cancel", state="pending", code="overloaded") == (1, 1)
    assert await statuses(db) == {"cancelled": 1, "pending": 1}


async def test_one_run_is_requeued(db, daemon, page):
    run = await run_in(db, daemon, "failed")
    assert await page.do(kind="requeue_run", run=run) == (1, 1)
    assert (await run_row(db, run))["status"] == "pending"
    assert await page.do(kind="requeue_run", run="nothing") == (0, 0)


async def test_a_run_that_somebody_else_requeued_stays(db, daemon, page):
    run = await run_in(db, daemon, "failed")
    operation = {"kind": "requeue_run", "run": run}
    counted = await page.count(**operation)
    await db.execute("update runs set status = 'pending' where id = $1", run)
    for settle, status in ((daemon.fail, "failed"), (daemon.complete, "completed")):
        await settle(await daemon.claim_one())
        assert await page.act(counted["bounds"], **operation) == {"done": 0, "left": 0}
        assert (await run_row(db, run))["status"] == status
        await db.execute("update runs set status = 'pending' where id = $1 and status = 'failed'", run)
    assert (await page.count(**operation))["runs"] == 0


async def test_a_provider_is_paused_and_opened(db, page):
    await insert_runs(db, 2, processor="openai:gpt-image-1")
    counted = await page.count(kind="pause", provider="openai")
    assert counted["runs"] == 2
    paused = "select paused from image_jobs.provider_limits where provider = $1 and model is null"
    assert not await db.fetchval(paused, "openai")  # a count changes nothing
    await page.do(kind="pause", provider="openai")
    await page.do(kind="pause", provider="stability")  # which has no row yet
    assert await db.fetchval(paused, "openai")
    assert await db.fetchval(paused, "stability")
    await db.execute("select image_jobs.block_provider('openai', 'gpt-image-1', interval '1 hour', 'Pay your bill.')")
    await page.do(kind="open", provider="openai")
    states = "select state from image_provider_status where provider = 'openai' and state in ('paused', 'blocked')"
    assert await db.fetch(states) == []


async def test_a_limit_is_changed_and_lifted(db, page):
    counted = await page.count(kind="limit", provider="openai")
    assert (counted["per_minute"], counted["max_running"]) == (50, None)
    await page.do(kind="limit", provider="openai", per_minute=100, max_running=20)
    await page.do(kind="limit", provider="openai", model="gpt-image-2", per_minute=5)
    await page.do(kind="limit", provider="google")
    rows = await db.fetch(
        "select provider, model, per_minute, max_running from image_jobs.provider_limits order by 1, 2"
    )
    assert [tuple(row) for row in rows] == [
        ("google", None, None, None),
        ("openai", "gpt-image-2", 5, None),
        ("openai", None, 100, 20),
    ]


async def test_a_refusal_of_the_database_is_one_sentence(db, daemon, page):
    run = await run_in(db, daemon, "failed")
    await db.execute(
        "create function no() returns trigger language plpgsql as $$ begin raise exception 'not on sundays'; end $$;"
        "create trigger no before update on runs for each row execute function no();"
    )
    operation = {"kind": "requeue_run", "run": run}
    bounds = (await page.count(**operation))["bounds"]
    response = await page.client.post("/dashboard/api/act", json={"operation": operation, "bounds": bounds})
    assert (response.status_code, response.json()) == (503, {"message": "Not on sundays.", "hint": ""})


async def test_nothing_is_done_that_was_not_counted(page):
    response = await page.client.post("/dashboard/api/act", json={"operation": {"kind": "pause", "provider": "demo"}})
    assert (response.status_code, response.json()["message"]) == (
        400,
        "bounds is missing: what /api/preview has returned.",
    )


async def test_a_locked_run_is_waited_for(db, database, daemon, page):
    run = await run_in(db, daemon, "failed")
    other = await connect(database)
    transaction = other.transaction()
    await transaction.start()
    await other.execute("update runs set priority = 3 where id = $1", run)
    doing = asyncio.create_task(page.do(kind="requeue", code="refused", period="1h"))
    waits = (
        "select exists (select from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database())"
    )
    await wait_until(lambda: db.fetchval(waits))
    await transaction.commit()
    assert await doing == (1, 1)
    await other.close()
