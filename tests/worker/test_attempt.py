"""The cost of an attempt that breaks: money from the first byte on, and an attempt only then."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import asyncpg
import pytest

from daemon.errors import OutcomeUnknown, Retryable
from daemon.providers import Generated, Reporter, Request
from tests.support.postgres import wait_until
from tests.support.runs import insert_run, insert_runs
from tests.support.shop import ESTIMATE, Painter, Shop, open_shop, ready, red_fox

Db = asyncpg.Connection
SHORT = timedelta(seconds=0.3)
PAID = ("charged", ESTIMATE, ESTIMATE)
LOST = ("unknown", None, ESTIMATE)
FREE = ("free", None, None)
BREAKS: list[Exception] = [
    KeyError("data"),
    RecursionError(),
    AssertionError(),
    OSError("no errno"),
    OSError(28, "No space left on device"),
    ConnectionResetError(104, "Connection reset by peer"),
]
"""Bugs of ours, and errors that no provider's code has translated."""
TROUBLE: list[Exception] = [
    OSError(28, "No space left on device"),
    TimeoutError(),
    Retryable("Not now.", code="unreachable", hint="", accepted=False),
    Retryable("Not now.", code="server_error", hint=""),
    OutcomeUnknown("It broke.", code="outcome_unknown", hint=""),
]


class Breaks:
    """Raises each of `errors` once, in the first attempt of as many runs."""

    def __init__(self, errors: list[Exception]) -> None:
        self._errors = errors
        self.met: dict[str, Exception] = {}

    def raise_one(self, run: str) -> None:
        if run not in self.met:
            self.met[run] = self._errors[len(self.met)]
            raise self.met[run]


async def test_bug_after_sending_is_an_unknown_outcome(shop: Shop) -> None:
    breaks = Breaks(BREAKS)

    async def draw(request: Request, report: Reporter) -> Generated:
        breaks.raise_one(request.run_id)
        return await red_fox(request, report)

    shop.painter.draw = draw
    for run in await insert_runs(shop.db, len(BREAKS)):
        code, row = await shop.tried(run), await shop.ended(run)
        error = breaks.met[run]
        assert code != "internal", error
        assert (await shop.events(run, "unknown_outcome"))[0]["data"]["possibleCost"] == ESTIMATE
        assert (row["status"], row["attempt"]) == ("completed", 2), error
        assert await shop.calls(run) == [LOST, PAID], error
        assert (row["payload"]["cost"], row["payload"]["possibleCost"]) == (ESTIMATE, ESTIMATE)


async def test_bug_before_sending_costs_no_attempt(shop: Shop) -> None:
    breaks = Breaks([KeyError("size")])

    async def prepare(request: Request, _: Reporter) -> None:
        breaks.raise_one(request.run_id)

    shop.painter.prepare = prepare
    run = await insert_run(shop.db)
    assert await shop.tried(run) == "internal"
    row = await shop.ended(run)
    assert (row["status"], row["attempt"], shop.painter.sent) == ("completed", 1, 1)
    assert await shop.calls(run) == [FREE, PAID]
    assert not await shop.events(run, "unknown_outcome")


async def has_tries(shop: Shop, run: str, tries: int) -> bool:
    return len(await shop.events(run, "retry")) == tries


async def test_bug_before_sending_that_stays_ends_the_run(shop: Shop) -> None:
    async def breaks(_: Request, __: Reporter) -> None:
        raise KeyError("size")

    shop.painter.prepare = breaks
    run = await insert_run(shop.db)
    for tries in (1, 2, 3):  # of which the first came back
        await wait_until(lambda tries=tries: has_tries(shop, run, tries))
        async with shop.db.transaction():
            await shop.db.execute("select set_config('image_jobs.writer', 'daemon', true)")
            await shop.db.execute("update runs set due_at = now(), refused_since = now() - interval '61 s'")
    row = await shop.ended(run)
    assert (row["status"], row["payload"]["code"], shop.painter.sent) == ("failed", "internal", 0)
    assert {call[0] for call in await shop.calls(run)} == {"free"}
    assert not {"cost", "possibleCost"} & set(row["payload"])


async def test_trouble_before_sending_costs_no_attempt(shop: Shop) -> None:
    trouble = Breaks(TROUBLE)

    async def prepare(request: Request, _: Reporter) -> None:
        trouble.raise_one(request.run_id)

    shop.painter.prepare = prepare
    for run in await insert_runs(shop.db, len(TROUBLE)):
        await shop.tried(run)
        row, error = await shop.ended(run), trouble.met[run]
        assert (row["status"], row["attempt"]) == ("completed", 1), error
        assert await shop.calls(run) == [FREE, PAID], error
        assert "possibleCost" not in row["payload"]
    assert shop.painter.sent == len(TROUBLE)


async def test_lapsed_lease_keeps_the_request_from_leaving(shop: Shop) -> None:
    async def lapses(_: Request, __: Reporter) -> None:
        shop.painter.prepare = ready
        shop.lease.lapse()

    shop.painter.prepare = lapses
    run = await insert_run(shop.db)
    assert (await shop.tried(run), shop.painter.sent) == ("lease_lapsed", 0)
    assert not await shop.events(run, "submitted")
    shop.lease.renew(time.monotonic())
    assert (await shop.ended(run))["attempt"] == 1
    assert await shop.calls(run) == [FREE, PAID]
    assert shop.painter.sent == 1


async def hangs(_: Request, __: Reporter) -> None:
    """Never come back."""
    await asyncio.Event().wait()


@pytest.mark.parametrize("sent", [False, True], ids=["before sending", "after sending"])
async def test_timeout_costs_only_what_was_sent(database: str, db: Db, sent: bool) -> None:
    async def hangs_once(request: Request, report: Reporter) -> None:
        shop.painter.draw = red_fox
        shop.painter.prepare = ready
        await hangs(request, report)

    async def hanging(request: Request, report: Reporter) -> Generated:
        shop.painter.draw = red_fox
        await hangs(request, report)
        raise AssertionError

    async with open_shop(database, db, run_timeout=SHORT) as shop:
        if sent:
            shop.painter.draw = hanging
        else:
            shop.painter.prepare = hangs_once
        run = await insert_run(db)
        assert await shop.tried(run) == "timeout"
        row = await shop.ended(run)
        assert (row["status"], row["attempt"]) == ("completed", 1 + sent)
        assert await shop.calls(run) == [LOST if sent else FREE, PAID]
        assert ("possibleCost" in row["payload"]) == sent


@dataclass
class Doorman(Painter):
    """A provider that asks for a permit."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    door: asyncio.Event = field(default_factory=asyncio.Event)
    inside: int = 0

    @asynccontextmanager
    async def permit(self, _: Request) -> AsyncGenerator[None]:
        self.asked.set()
        await self.door.wait()
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


@pytest.mark.one_postgres
async def test_claim_for_a_check_submits_nothing(shop: Shop) -> None:
    async with shop.db.transaction():
        run = await insert_run(shop.db)
        await shop.db.execute("select set_config('image_jobs.writer', 'daemon', true)")  # nobody else may remove the id
        await shop.db.execute(
            """
            with parked as (
              update runs set status = 'running', attempt = 1, claim = nextval('image_jobs.claims'),
                call = currval('image_jobs.claims'), submitted_at = now(), due_at = now() where id = $1 returning *
            )
            insert into image_jobs.calls (id, run_id, provider, model, requested_model, estimate, opened_at, ticket)
            select call, id, 'demo', 'painter', 'painter', $2, now(), ticket from parked
            """,
            run,
            ESTIMATE,
        )
    row = await shop.ended(run)

    assert (row["status"], row["payload"]["code"], shop.painter.sent) == ("failed", "invalid_request", 0)
    assert await shop.calls(run) == [LOST]
    assert "was removed from the run" in row["payload"]["error"]


async def test_waiting_for_a_permit_is_not_the_providers_time(database: str, db: Db) -> None:
    doorman = Doorman()
    async with open_shop(database, db, painter=doorman, run_timeout=SHORT) as shop:
        run = await insert_run(db)
        await doorman.asked.wait()
        await asyncio.sleep(2 * SHORT.total_seconds())  # longer than a provider may take
        assert (await shop.calls(run), doorman.sent) == ([("open", None, None)], 0)
        doorman.door.set()
        row = await shop.ended(run)
        assert (row["status"], row["attempt"], doorman.inside) == ("completed", 1, 0)
        assert await shop.calls(run) == [PAID]


async def test_lease_that_lapses_before_a_permit_is_waited_for(database: str, db: Db) -> None:
    doorman = Doorman()
    async with open_shop(database, db, painter=doorman) as shop:
        run = await insert_run(db)
        await doorman.asked.wait()
        shop.lease.lapse()
        doorman.door.set()
        await wait_until(lambda: doorman.inside == 1)
        assert (doorman.calls, doorman.sent) == (0, 0)
        shop.lease.renew(time.monotonic())
        assert (await shop.ended(run))["status"] == "completed"
        assert await shop.calls(run) == [PAID]


async def test_charged_call_dropped_in_a_block_is_not_free(shop: Shop, database: str) -> None:
    async def draw(request: Request, report: Reporter) -> Generated:
        raise Retryable("Busy.", code="busy", hint="", retry_in=timedelta(hours=1), blocks="provider", charged=True)

    shop.painter.draw = draw
    other = await asyncpg.connect(database)
    async with other.transaction():
        await other.execute("lock table image_jobs.provider_blocks in exclusive mode")
        run = await insert_run(shop.db)
        await wait_until(lambda: shop.painter.sent == 1)
        await shop.db.execute("update runs set status = 'cancelled' where id = $1", run)
        assert await wait_until(lambda: shop.events(run, "unknown_outcome"), timeout=10)
    await other.close()
    assert await shop.calls(run) == [LOST]
