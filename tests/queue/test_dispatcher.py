"""Turns against a real database: batches, slots, and what happens when the database says no, or nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from secrets import token_hex
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from asyncpg._testbase.fuzzer import TCPFuzzingProxy

from daemon.listener import Listener
from daemon.queue import Claimed, Queue
from daemon.reporter import event
from daemon.turns import Turns
from tests.postgres import connect, wait_until
from tests.runs import completed, event_names, insert_run, insert_runs, register, run_row

Db = asyncpg.Connection


class Running:
    """Turns under way, and what they claimed and lost."""

    def __init__(self, queue: Queue, daemon: UUID, slots: int) -> None:
        self.daemon = daemon
        self.claimed: list[Claimed] = []
        self.lost: set[int] = set()
        self.fenced: list[UUID] = []
        self.queue = queue
        self.turns = Turns(
            queue,
            daemon=lambda: self.daemon,
            slots=slots,
            start=self.claimed.append,
            lost=self.lost.update,
            fenced=self._rejoin,
        )

    async def _rejoin(self, former: UUID) -> None:
        self.fenced.append(former)
        self.daemon = await register(self.queue)


@asynccontextmanager
async def running(dsn: str, *, slots: int = 4) -> AsyncIterator[Running]:
    async with Queue(dsn) as queue:
        it = Running(queue, await register(queue, slots=slots), slots)
        task = asyncio.create_task(it.turns.run())
        try:
            yield it
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_free_slot_is_filled_and_a_settled_run_frees_its_slot(database: str, db: Db) -> None:
    ids = await insert_runs(db, 6)
    async with running(database, slots=4) as it:
        await wait_until(lambda: len(it.claimed) == 4)
        for run in list(it.claimed):
            assert await it.turns.settle(run, completed()) == "settled"
        await wait_until(lambda: len(it.claimed) == 6)
        for run in it.claimed[4:]:
            await it.turns.settle(run, completed())
        assert it.turns.idle
    assert {row["status"] for row in await db.fetch("select status from runs where id = any($1)", ids)} == {"completed"}


async def test_never_more_runs_are_held_than_there_are_slots(database: str, db: Db) -> None:
    await insert_runs(db, 50)
    async with running(database, slots=3) as it:
        for done in range(50):
            await wait_until(lambda done=done: len(it.claimed) > done)
            held = await db.fetchval("select count(*) from runs where claimed_by is not null")
            assert held <= 3
            await it.turns.settle(it.claimed[done], completed())


async def test_a_settlement_whose_run_was_cancelled_meanwhile_answers_lost_and_notes_its_cost(
    database: str, db: Db
) -> None:
    run = await insert_run(db)
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        await db.execute("update runs set status = 'cancelled' where id = $1", run)
        late = {"kind": "log", "payload": {"event": "late", "message": "too late", "data": {"cost": 0.04}}}
        assert await it.turns.settle(it.claimed[0], {**completed(), "if_lost": late}) == "lost"
    assert (await run_row(db, run))["status"] == "cancelled"
    assert (await event_names(db, run))[-1] == "late"
    assert float(await db.fetchval("select cost from run_costs")) == 0.04


async def test_confirm_knows_whether_a_run_is_still_ours(database: str, db: Db) -> None:
    run = await insert_run(db)
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        assert await it.turns.confirm(it.claimed[0])
        await db.execute("update runs set status = 'pending' where id = $1", run)
        assert not await it.turns.confirm(it.claimed[0])
        assert it.lost == {it.claimed[0].claim}


async def test_a_row_that_somebody_has_locked_does_not_hold_up_the_others(database: str, db: Db) -> None:
    await insert_runs(db, 2)
    async with running(database) as it:
        await wait_until(lambda: len(it.claimed) == 2)
        first, second = it.claimed
        locker = await connect(database)
        try:
            async with locker.transaction():
                await locker.execute("select from runs where id = $1 for update", first.id)
                waiting = asyncio.create_task(it.turns.settle(first, completed()))
                assert await it.turns.settle(second, completed()) == "settled"
                assert not waiting.done()
            assert await waiting == "settled"
        finally:
            await locker.close()


@pytest.mark.parametrize("count", [1, 2, 7])
async def test_one_settlement_that_the_database_refuses_does_not_sink_the_others(
    database: str, db: Db, count: int
) -> None:
    await insert_runs(db, count)
    poison: dict[str, Any] = completed("https://example.supabase.co/kept.png")
    poison["payload"]["preview"] = "data:image/png;base64,AAAA"
    async with running(database, slots=8) as it:
        await wait_until(lambda: len(it.claimed) == count)
        bodies = [poison, *(completed() for _ in range(count - 1))]
        results = await asyncio.gather(
            *(it.turns.settle(run, body) for run, body in zip(it.claimed, bodies, strict=True))
        )
        assert results == ["settled"] * count
        culprit = await run_row(db, it.claimed[0].id)
        assert culprit["status"] == "failed"
        assert culprit["payload"]["code"] == "internal"
        assert culprit["payload"]["imageUrl"] == "https://example.supabase.co/kept.png"
        assert await db.fetchval("select count(*) from runs where status = 'completed'") == count - 1


async def test_what_no_index_can_hold_ends_its_run_and_not_the_daemon(database: str, db: Db) -> None:
    await insert_runs(db, 2)
    endless = " ".join(token_hex(20) for _ in range(250))
    async with running(database) as it:
        await wait_until(lambda: len(it.claimed) == 2)
        first, second = it.claimed
        parked = {"outcome": "parked", "provider_job_id": endless, "due_in": 60}
        results = await asyncio.gather(it.turns.settle(first, parked), it.turns.settle(second, completed()))
        assert results == ["settled"] * 2
        assert (await run_row(db, first.id))["status"] == "failed"
        assert (await run_row(db, second.id))["status"] == "completed"


async def test_nul_and_lone_surrogates_do_not_reach_the_database(database: str, db: Db) -> None:
    await insert_run(db)
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        body = completed()
        body["payload"]["revisedPrompt"] = "a\x00b\ud800c \\u0000 and é"
        assert await it.turns.settle(it.claimed[0], body) == "settled"
        assert (await run_row(db, it.claimed[0].id))["payload"]["revisedPrompt"] == "ab?c \\u0000 and é"


async def test_a_claim_whose_reply_was_lost_is_given_back_and_costs_no_attempt(database: str, db: Db) -> None:
    run = await insert_run(db)
    async with running(database) as it:
        it.turns.accepting = False
        # The reply of this turn reaches nobody.
        lost = await it.queue.turn(it.daemon, slots=1, thorough=True)
        assert [claimed.id for claimed in lost.claimed] == [run]
        it.turns.accepting = True
        it.turns.look_closely()
        await wait_until(lambda: it.claimed)
        assert it.claimed[0].id == run
        assert it.claimed[0].attempt == 1
        assert it.claimed[0].claim > lost.claimed[0].claim


async def test_an_outage_of_the_database_loses_neither_settlement_nor_slot(database: str, db: Db) -> None:
    await insert_runs(db, 3)
    host, port = "127.0.0.1", int(database.rsplit(":", 1)[1].split("/", 1)[0])
    proxy = TCPFuzzingProxy(backend_host=host, backend_port=port)
    proxy.start()
    try:
        through = database.replace(f":{port}/", f":{proxy.listening_port}/")
        async with running(through) as it:
            await wait_until(lambda: len(it.claimed) == 3)
            proxy.close_all_connections()
            results = await asyncio.gather(*(it.turns.settle(run, completed()) for run in it.claimed))
            assert set(results) <= {"settled", "already"}
            assert it.turns.idle
    finally:
        proxy.stop()
    assert await db.fetchval("select count(*) from runs where status = 'completed'") == 3


async def test_a_settlement_whose_acknowledgement_was_lost_answers_already(database: str, db: Db) -> None:
    await insert_run(db)
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        run = it.claimed[0]
        entry = {**completed(), "id": run.id, "claim": run.claim}
        await it.queue.turn(it.daemon, slots=0, settlements=[entry])
        assert await it.turns.settle(run, completed()) == "already"
        assert (await event_names(db, run.id)).count("completed") == 1


async def test_a_fenced_daemon_registers_anew_and_goes_on_claiming(database: str, db: Db) -> None:
    async with running(database) as it:
        former = it.daemon
        await db.execute("update private.daemons set ended_at = now(), ended = 'taken over' where id = $1", former)
        run = await insert_run(db)
        it.turns.wake()
        await wait_until(lambda: it.claimed)
        assert it.fenced == [former]
        assert it.claimed[0].daemon == it.daemon != former
        assert (await run_row(db, run))["claimed_by"] == it.daemon


async def test_many_inserts_a_second_are_claimed_without_a_notification_each(database: str, db: Db) -> None:
    async with running(database, slots=1000) as it:
        listener = Listener(
            database, daemon=lambda: it.daemon, wake=it.turns.wake, connected=it.turns.look_closely, drop=it.lost.update
        )
        listening = asyncio.create_task(listener.run())
        await wait_until(lambda: listener.hears)
        heard: list[object] = []
        ears = await connect(database)
        await ears.add_listener("image_jobs_wake", lambda *args: heard.append(args))
        for _ in range(500):
            await insert_run(db)
        await wait_until(lambda: len(it.claimed) == 500)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await ears.close()
        assert len(heard) < 250


async def test_a_delayed_run_is_not_claimed_before_it_is_due(database: str, db: Db) -> None:
    run = await insert_run(db, processor="demo:painter")
    await db.execute("update runs set due_at = now() + interval '1 hour' where id = $1", run)
    other = await insert_run(db, workflow=uuid4())
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        assert [claimed.id for claimed in it.claimed] == [other]
        await db.execute("update runs set due_at = now() where id = $1", run)
        await wait_until(lambda: len(it.claimed) == 2)


async def test_an_event_whose_acknowledgement_was_lost_is_written_once(database: str, db: Db) -> None:
    run = await insert_run(db)
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        generated = event("generated", "The provider made the image.", cost=0.04)
        entry = {"id": run, "claim": it.claimed[0].claim, "events": [generated]}
        await it.queue.turn(it.daemon, slots=0, progress=[entry])
        it.turns.record(it.claimed[0], events=[generated])
        await it.turns.settle(it.claimed[0], {**completed(), "events": [generated]})
    assert (await event_names(db, run)).count("generated") == 1
    assert float(await db.fetchval("select cost from run_costs")) == 0.04


async def test_a_claim_that_was_lost_without_a_notification_is_noticed_when_claims_are_compared(
    database: str, db: Db
) -> None:
    cancelled, kept, _ = await insert_runs(db, 3)
    async with running(database) as it:
        await wait_until(lambda: len(it.claimed) == 3)
        claims = {run.id: run.claim for run in it.claimed}
        await db.execute("update runs set status = 'cancelled' where id = $1", cancelled)
        it.turns.look_closely()
        await wait_until(lambda: it.lost)
        assert it.lost == {claims[cancelled]}
        assert (await run_row(db, kept))["claim"] == claims[kept]


async def test_an_answer_nested_without_end_does_not_break_the_turn(database: str, db: Db) -> None:
    run = await insert_run(db)
    nested: list[Any] = []
    for _ in range(2000):
        nested = [nested]
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        body = completed()
        body["payload"]["usage"] = nested
        assert await it.turns.settle(it.claimed[0], body) == "settled"
    assert (await run_row(db, run))["status"] == "completed"
