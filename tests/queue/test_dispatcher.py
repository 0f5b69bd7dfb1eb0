"""The dispatcher against a real database: batches, slots, refusals and outages."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from decimal import Decimal
from secrets import token_hex
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from asyncpg._testbase.fuzzer import TCPFuzzingProxy

from daemon.calls import Call
from daemon.events import Event
from daemon.queue.client import Queue, SyncResult
from daemon.queue.dispatcher import Dispatcher
from daemon.queue.listener import Listener
from daemon.run import ClaimedRun
from daemon.worker.outcomes import Completed, Parked, Released
from tests.support.postgres import connect, wait_until
from tests.support.runs import event_names, insert_run, insert_runs, run_row
from tests.support.wiring import Wiring, completed, wired

Db = asyncpg.Connection

ENDLESS = " ".join(token_hex(20) for _ in range(250))
"""A provider job id that does not fit into an index."""


class Poison(Completed):
    """An outcome that no index has room for, though its every word could be written."""

    def to_json(self) -> dict[str, Any]:
        return {**Completed.to_json(self), "provider_job_id": ENDLESS}


class Running:
    """A dispatcher under way, with the runs it claimed and the claims it lost."""

    def __init__(self, queue: Queue, wiring: Wiring, **options: Any) -> None:
        self.claimed: list[ClaimedRun] = []
        self.lost: set[int] = set()
        self.queue = queue
        self.wiring = wiring
        self.signals = wiring.signals
        self.outbox = wiring.outbox
        self.dispatcher = Dispatcher(
            queue,
            wiring.identity,
            wiring.signals,
            wiring.outbox,
            unreachable=wiring.unreachable,
            slots=wiring.slots,
            start=self.claimed.append,
            drop=self.lost.update,
            **options,
        )

    @property
    def daemon(self) -> UUID:
        return self.wiring.identity.id


@asynccontextmanager
async def running(
    dsn: str, *, slots: int = 4, mask: Callable[[str], str] = str, **options: Any
) -> AsyncIterator[Running]:
    async with Queue(dsn, mask=mask) as queue:
        it = Running(queue, await wired(queue, slots=slots), **options)
        task = asyncio.create_task(it.dispatcher.run())
        try:
            yield it
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_settled_run_frees_its_slot_for_the_next(database: str, db: Db) -> None:
    ids = await insert_runs(db, 6)
    async with running(database, slots=4) as it:
        await wait_until(lambda: len(it.claimed) == 4)
        for run in list(it.claimed):
            assert (await it.outbox.settle(run, completed())).result == "settled"
        await wait_until(lambda: len(it.claimed) == 6)
        for run in it.claimed[4:]:
            await it.outbox.settle(run, completed())
        assert it.dispatcher.idle
    assert {row["status"] for row in await db.fetch("select status from runs where id = any($1)", ids)} == {"completed"}


async def test_held_runs_never_exceed_slots(database: str, db: Db) -> None:
    await insert_runs(db, 50)
    async with running(database, slots=3) as it:
        for done in range(50):
            await wait_until(lambda done=done: len(it.claimed) > done)
            held = await db.fetchval("select count(*) from runs where claimed_by is not null")
            assert held <= 3
            await it.outbox.settle(it.claimed[done], completed())


async def test_settlement_of_a_cancelled_run_is_lost_but_keeps_cost(database: str, db: Db) -> None:
    run = await insert_run(db)
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        await db.execute("update runs set status = 'cancelled' where id = $1", run)
        late = Event("late", "too late", data={"cost": 0.04})
        assert (await it.outbox.settle(it.claimed[0], completed(cost=0.04, if_lost=late))).result == "lost"
    assert (await run_row(db, run))["status"] == "cancelled"
    assert (await event_names(db, run))[-1] == "late"
    assert float(await db.fetchval("select cost from image_jobs.run_costs")) == 0.04


async def test_confirm_returns_false_for_a_lost_claim(database: str, db: Db) -> None:
    run = await insert_run(db)
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        assert await it.outbox.confirm(it.claimed[0])
        await db.execute("update runs set status = 'pending' where id = $1", run)
        assert not await it.outbox.confirm(it.claimed[0])
        assert it.lost == {it.claimed[0].claim}


CLAIMS = """
create table public.claims_seen (number bigserial, pid int default pg_backend_pid(), claims text, name text, timeout text);
create function public.use_claims() returns trigger language plpgsql security definer as $$
begin
  insert into public.claims_seen (claims, name, timeout) values (coalesce(current_setting('request.jwt.claims', true), ''),
    current_setting('application_name'), current_setting('idle_in_transaction_session_timeout'));
  perform set_config('request.jwt.claims', '{"role": "somebody"}', false);
  return null;
end $$;
create trigger zz_of_the_application after update on public.runs for each row execute function public.use_claims();
"""


async def test_session_settings_of_triggers_are_undone(database: str, db: Db, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.queue.dispatcher.RECONCILE", 0.0)
    await db.execute(CLAIMS)
    async with running(database, slots=100) as it:
        for count in range(1, 4):
            await insert_run(db)
            it.signals.wake()
            await wait_until(lambda count=count: len(it.claimed) == count)
    seen = await db.fetch("select pid, claims, name, timeout from claims_seen order by number")
    assert len({row["pid"] for row in seen}) == 1
    assert {tuple(row)[1:] for row in seen} == {("", "image-jobs", "1min")}


async def test_locked_row_does_not_delay_other_settlements(database: str, db: Db) -> None:
    await insert_runs(db, 2)
    async with running(database) as it:
        await wait_until(lambda: len(it.claimed) == 2)
        first, second = it.claimed
        locker = await connect(database)
        try:
            async with locker.transaction():
                await locker.execute("select from runs where id = $1 for update", first.id)
                waiting = asyncio.create_task(it.outbox.settle(first, completed()))
                assert (await it.outbox.settle(second, completed())).result == "settled"
                assert not waiting.done()
            assert (await waiting).result == "settled"
        finally:
            await locker.close()


async def test_success_of_a_locked_row_ends_streaks_once(database: str, db: Db) -> None:
    await insert_run(db)
    streaks = "select count(*) from image_jobs.provider_streaks where failed <> '{}'"
    begin = "insert into image_jobs.provider_streaks (provider, failed) values ('demo', '{1}')"
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        locker = await connect(database)
        try:
            async with locker.transaction():
                await locker.execute("select from runs for update")
                await db.execute(begin)
                waiting = asyncio.create_task(it.outbox.settle(it.claimed[0], replace(completed(), http_status=200)))
                await wait_until(lambda: db.fetchval(f"select ({streaks}) = 0"))
                await db.execute(begin)
            assert (await waiting).result == "settled"
        finally:
            await locker.close()
    assert await db.fetchval(streaks) == 1


async def test_calls_that_wait_are_written_beside_a_settlement(database: str, db: Db) -> None:
    await insert_run(db)
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        (run,) = it.claimed
        it.outbox.record(run, Event("submitted", "Sent."), calls=[Call(id=run.call, model="drawn", sent_at=0)])
        held = asyncio.create_task(it.outbox.confirm(run, calls=[Call(id=run.call, state="charged", cost=0.04)]))
        await asyncio.sleep(0)
        assert (await it.outbox.settle(run, Released("Handed back."))).result == "settled"
        await held
    row = await db.fetchrow(
        "select state, cost, model, sent_at is not null from image_jobs.calls where id = $1", run.call
    )
    assert tuple(row) == ("charged", Decimal("0.04"), "drawn", True)


@pytest.mark.parametrize("count", [1, 2, 7])
async def test_refused_settlement_does_not_sink_its_batch(database: str, db: Db, count: int) -> None:
    await insert_runs(db, count)
    good = completed("https://example.supabase.co/kept.png")
    poison = Poison(**{each.name: getattr(good, each.name) for each in fields(good)})
    async with running(database, slots=8) as it:
        await wait_until(lambda: len(it.claimed) == count)
        outcomes = [poison, *(completed() for _ in range(count - 1))]
        results = await asyncio.gather(*map(it.outbox.settle, it.claimed, outcomes))
        assert [each.result for each in results] == ["settled"] * count
        culprit = await run_row(db, it.claimed[0].id)
        assert culprit["status"] == "failed"
        assert culprit["payload"]["code"] == "internal"
        assert culprit["payload"]["imageUrl"] == "https://example.supabase.co/kept.png"
        assert await db.fetchval("select count(*) from runs where status = 'completed'") == count - 1


async def test_unindexable_job_id_fails_its_run_alone(database: str, db: Db) -> None:
    await insert_runs(db, 2)
    async with running(database) as it:
        await wait_until(lambda: len(it.claimed) == 2)
        first, second = it.claimed
        parked = Parked(ENDLESS, 60, "The provider is at work.")
        results = await asyncio.gather(it.outbox.settle(first, parked), it.outbox.settle(second, completed()))
        assert [each.result for each in results] == ["settled"] * 2
        assert (await run_row(db, first.id))["status"] == "failed"
        assert (await run_row(db, second.id))["status"] == "completed"


async def test_nul_and_lone_surrogates_are_sanitized(database: str, db: Db) -> None:
    await insert_run(db)
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        outcome = completed(revised_prompt="a\x00b\ud800c \\u0000 and é")
        assert (await it.outbox.settle(it.claimed[0], outcome)).result == "settled"
        assert (await run_row(db, it.claimed[0].id))["payload"]["revisedPrompt"] == "ab?c \\u0000 and é"


async def test_claim_with_a_lost_reply_is_released_and_refunded(database: str, db: Db) -> None:
    run = await insert_run(db)
    async with running(database) as it:
        it.dispatcher.accepting = False
        # The reply of this sync is lost.
        lost = await it.queue.sync(it.daemon, slots=1, full_scan=True)
        assert [claimed.id for claimed in lost.claimed] == [run]
        it.dispatcher.accepting = True
        it.signals.resync()
        await wait_until(lambda: it.claimed)
        assert it.claimed[0].id == run
        assert it.claimed[0].attempt == 1
        assert it.claimed[0].claim > lost.claimed[0].claim


class Remembering(Queue):
    """A queue that remembers its first comparison of claims, so that it can be delivered once more."""

    first: dict[str, Any] | None = None

    async def sync(self, daemon: UUID, **options: Any) -> SyncResult:
        if self.first is None and options.get("held") is not None:
            self.first = options
        return await super().sync(daemon, **options)


async def test_sync_that_is_done_late_takes_no_newer_claim_away(database: str, db: Db) -> None:
    async with Remembering(database) as queue:
        it = Running(queue, await wired(queue, slots=4))
        task = asyncio.create_task(it.dispatcher.run())
        try:
            await wait_until(lambda: queue.first is not None and it.dispatcher.idle)
            await insert_run(db)
            it.signals.wake()
            await wait_until(lambda: it.claimed)
            assert queue.first is not None
            await Queue.sync(queue, it.daemon, **{**queue.first, "slots": 0})
            (run,) = it.claimed
            paid = Call(id=run.call, state="charged", cost=0.04, sent_at=0)
            assert (await it.outbox.settle(run, replace(completed(), calls=[paid]))).result == "settled"
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    assert await db.fetchval("select cost from image_jobs.calls where id = $1", run.call) == Decimal("0.04")


async def test_outage_loses_neither_settlement_nor_slot(database: str, db: Db) -> None:
    await insert_runs(db, 3)
    host, port = "127.0.0.1", int(database.rsplit(":", 1)[1].split("/", 1)[0])
    proxy = TCPFuzzingProxy(backend_host=host, backend_port=port)
    proxy.start()
    try:
        through = database.replace(f":{port}/", f":{proxy.listening_port}/")
        async with running(through) as it:
            await wait_until(lambda: len(it.claimed) == 3)
            proxy.close_all_connections()
            results = await asyncio.gather(*(it.outbox.settle(run, completed()) for run in it.claimed))
            assert {each.result for each in results} <= {"settled", "already"}
            assert it.dispatcher.idle
    finally:
        proxy.stop()
    assert await db.fetchval("select count(*) from runs where status = 'completed'") == 3


async def test_repeated_settlement_returns_already(database: str, db: Db) -> None:
    await insert_run(db)
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        run = it.claimed[0]
        entry = {**completed().to_json(), "id": run.id, "claim": run.claim}
        await it.queue.sync(it.daemon, slots=0, settlements=[entry])
        assert (await it.outbox.settle(run, completed())).result == "already"
        assert (await event_names(db, run.id)).count("completed") == 1


async def test_fenced_daemon_rejoins_and_claims_on(database: str, db: Db) -> None:
    async with running(database) as it:
        former = it.daemon
        await db.execute("update image_jobs.daemons set ended_at = now(), ended = 'taken over' where id = $1", former)
        run = await insert_run(db)
        it.signals.wake()
        await wait_until(lambda: it.claimed)
        assert it.wiring.registered == [former, it.daemon]
        assert it.claimed[0].daemon == it.daemon != former
        assert (await run_row(db, run))["claimed_by"] == it.daemon


async def test_busy_daemon_needs_no_notification_per_insert(database: str, db: Db) -> None:
    # Busy after 10 claims, however long they take; once busy, it claims again within the second for which it says so.
    async with running(database, slots=1000, awake_claims=(10, 3600.0)) as it:
        listener = Listener(database, it.wiring.identity, it.signals, drop=it.lost.update)
        listening = asyncio.create_task(listener.run())
        await wait_until(lambda: listener.hears)
        heard: list[object] = []
        ears = await connect(database)
        await ears.add_listener("image_jobs_wake", lambda *args: heard.append(args))
        for number in range(100):
            await insert_run(db)
            await wait_until(lambda number=number: len(it.claimed) > number)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await ears.close()
        assert len(heard) < 50


async def test_delayed_run_is_not_claimed_before_it_is_due(database: str, db: Db) -> None:
    run = await insert_run(db, processor="demo:painter")
    await db.execute("update runs set due_at = now() + interval '1 hour' where id = $1", run)
    other = await insert_run(db, workflow=uuid4())
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        assert [claimed.id for claimed in it.claimed] == [other]
        await db.execute("update runs set due_at = now() where id = $1", run)
        await wait_until(lambda: len(it.claimed) == 2)


async def test_repeated_event_is_written_once(database: str, db: Db) -> None:
    run = await insert_run(db)
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        generated = Event("generated", "The provider made the image.", data={"cost": 0.04})
        entry = {"id": run, "claim": it.claimed[0].claim, "events": [generated.to_json()]}
        await it.queue.sync(it.daemon, slots=0, progress=[entry])
        it.outbox.record(it.claimed[0], generated)
        await it.outbox.settle(it.claimed[0], completed(cost=0.04, events=[generated]))
    assert (await event_names(db, run)).count("generated") == 1
    assert float(await db.fetchval("select cost from image_jobs.run_costs")) == 0.04


async def test_resync_drops_claims_lost_without_notification(database: str, db: Db) -> None:
    cancelled, kept, _ = await insert_runs(db, 3)
    async with running(database) as it:
        await wait_until(lambda: len(it.claimed) == 3)
        claims = {run.id: run.claim for run in it.claimed}
        await db.execute("update runs set status = 'cancelled' where id = $1", cancelled)
        it.signals.resync()
        await wait_until(lambda: it.lost)
        assert it.lost == {claims[cancelled]}
        assert (await run_row(db, kept))["claim"] == claims[kept]


async def test_endless_nesting_does_not_break_the_sync(database: str, db: Db) -> None:
    run = await insert_run(db)
    nested: list[Any] = []
    for _ in range(2000):
        nested = [nested]
    async with running(database) as it:
        await wait_until(lambda: it.claimed)
        generated = Event("generated", "The provider made the image.", data={"usage": nested})
        assert (await it.outbox.settle(it.claimed[0], completed(cost=0.04, events=[generated]))).result == "settled"
    assert (await run_row(db, run))["status"] == "completed"


async def test_dispatcher_with_a_sync_under_way_is_not_idle(database: str, db: Db) -> None:
    async with running(database) as it:
        await wait_until(lambda: it.dispatcher.idle)
        locker = await connect(database)
        try:
            async with locker.transaction():
                await locker.execute("select from image_jobs.claimants for update")
                run = await insert_run(db)
                it.signals.wake()
                await wait_until(lambda: not it.dispatcher.idle)
                it.dispatcher.accepting = False  # the daemon drains, and this claim is on its way already
                draining = asyncio.create_task(it.dispatcher.wait_idle())
                await asyncio.sleep(0.2)
                assert not draining.done()
        finally:
            await locker.close()
        await wait_until(lambda: it.claimed)
        assert not draining.done()
        await it.outbox.settle(it.claimed[0], completed())
        await draining
    assert (await run_row(db, run))["status"] == "completed"
