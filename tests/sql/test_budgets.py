"""Budgets of `usage_limits`: images and dollars, of a day and a month, exact however many insert at once."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.sql.test_models import publish
from tests.support.postgres import connect, signed_in
from tests.support.protocol import NOON, Daemon, Db, as_operator, move_clock_to

pytestmark = pytest.mark.one_postgres

USER = UUID("aaaaaaaa-0000-4000-8000-00000000000a")
OTHER = UUID("bbbbbbbb-0000-4000-8000-00000000000b")
MIDNIGHT = datetime(2031, 6, 16, tzinfo=UTC)
PROMPT: dict[str, Any] = {"promptSpec": {"basePrompt": "a red fox"}}
INSERT = """insert into runs (kind, subject_id, processor, metadata)
select 'image_gen', $1, 'demo:painter', $2 from generate_series(1, $3)"""

Refusal = asyncpg.PostgresError


@pytest.fixture
async def db(db: Db) -> Db:
    """Publish a model of 4 cents, at noon of a day in the middle of a month."""
    await move_clock_to(db, NOON)
    await publish(db, "demo", {"model": "painter", "price": 0.04})
    return db


@pytest.fixture
async def crowd(database: str, db: Db) -> AsyncIterator[list[Db]]:
    connections = [await connect(database) for _ in range(20)]
    for connection in connections:
        await move_clock_to(connection, NOON)
    yield connections
    for connection in connections:
        await connection.close()


async def limit(db: Db, applies_to: str = "each user", user: Any = None, workflow: Any = None, **limits: Any) -> None:
    await db.execute(
        "delete from image_jobs.usage_limits where applies_to = $1 and num_nonnulls(user_id, workflow_id) = 0",
        applies_to,
    )
    await db.execute(
        """insert into image_jobs.usage_limits
        (applies_to, user_id, workflow_id, images_per_day, usd_per_day, usd_per_month) values ($1, $2, $3, $4, $5, $6)""",
        applies_to,
        user,
        workflow,
        *(limits.get(name) for name in ("images_per_day", "usd_per_day", "usd_per_month")),
    )


async def insert_as(db: Db, user: UUID, count: int = 1, workflow: UUID | None = None) -> None:
    async with signed_in(db, user):
        await db.execute(INSERT, workflow or uuid4(), PROMPT, count)


async def insert_with(db: Db, processor: str, *fallback: str) -> None:
    async with signed_in(db, USER):
        await db.execute(
            "insert into runs (kind, subject_id, processor, metadata) values ('image_gen', $1, $2, $3)",
            uuid4(),
            processor,
            PROMPT | {"fallback": list(fallback)},
        )


async def refused(attempt: Awaitable[Any]) -> dict[str, str]:
    """Return the error of what a limit refuses."""
    with pytest.raises(Refusal) as error:
        await attempt
    assert error.value.sqlstate == "PT429"
    assert str(error.value).isascii()
    return error.value.as_dict()


async def usage(db: Db, user: UUID = USER) -> list[asyncpg.Record]:
    async with signed_in(db, user):
        return await db.fetch("select * from image_usage order by scope, period, workflow_id")


async def test_a_run_counts_as_the_dearest_it_may_become(db: Db) -> None:
    """A provider without a known price, that may be closed, is no way around a budget."""
    await limit(db, usd_per_day=0.1)
    for _ in range(2):
        await insert_with(db, "demo:unpriced", "demo:cheap", "demo:painter")
    await refused(insert_with(db, "demo:unpriced", "demo:painter"))
    await insert_with(db, "demo:unpriced", "demo:cheap")
    await db.execute("update runs set status = 'cancelled'")
    await limit(db, usd_per_day=0.03)
    run = await db.fetchval("select id from runs where metadata -> 'fallback' ? 'demo:painter' limit 1")
    await db.execute(
        "insert into workflow_members (workflow_id, user_id) select subject_id, $1 from runs on conflict do nothing",
        USER,
    )
    async with signed_in(db, USER):
        await refused(db.fetchval("select requeue_run($1)", run))


BUDGETS = [
    {"images_per_day": 10},
    {"usd_per_day": Decimal("0.40")},
    {"usd_per_month": Decimal("0.43")},
]


async def attempts(connections: list[Db], each: int, count: int, workflow: UUID) -> int:
    """Insert `count` rows in each of so many statements a connection, all at once. Return how many were accepted."""

    async def several(connection: Db) -> int:
        accepted = 0
        for _ in range(each):
            try:
                await insert_as(connection, USER, count, workflow)
            except Refusal as error:
                assert error.sqlstate == "PT429"
            else:
                accepted += count
        return accepted

    return sum(await asyncio.gather(*map(several, connections)))


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
async def test_a_hundred_inserts_against_ten_are_ten(db: Db, crowd: list[Db], budget: dict[str, Any]) -> None:
    await limit(db, **budget)
    assert await attempts(crowd, 5, 1, uuid4()) == 10
    assert await db.fetchval("select count(*) from runs") == 10


async def test_of_statements_of_three_rows_three_pass(db: Db, crowd: list[Db]) -> None:
    await limit(db, images_per_day=10)
    assert await attempts(crowd, 2, 3, uuid4()) == 9


async def test_requeues_meet_the_budget_like_inserts(db: Db, crowd: list[Db]) -> None:
    workflow = uuid4()
    await insert_as(db, USER, 40, workflow)
    runs = [row["id"] for row in await db.fetch("update runs set status = 'cancelled' returning id")]
    await limit(db, images_per_day=10)

    async def requeue(connection: Db, mine: list[str]) -> int:
        accepted = 0
        for run in mine:
            try:
                async with signed_in(connection, USER):
                    await connection.fetchval("select requeue_run($1)", run)
            except Refusal as error:
                assert error.sqlstate == "PT429"
            else:
                accepted += 1
        return accepted

    half = len(crowd) // 2
    requeued, inserted = await asyncio.gather(
        asyncio.gather(*(requeue(one, runs[number::half]) for number, one in enumerate(crowd[:half]))),
        attempts(crowd[half:], 4, 1, workflow),
    )
    assert sum(requeued) + inserted == 10
    assert await db.fetchval("select count(*) from runs where status = 'pending'") == 10


async def test_a_repeat_of_a_key_is_never_refused(db: Db, crowd: list[Db]) -> None:
    await limit(db, images_per_day=1)
    request = {"nodeId": "n", "workflowId": str(uuid4()), "provider": "demo", "model": "painter", **PROMPT}

    async def start(connection: Db) -> str:
        async with signed_in(connection, USER):
            return (await connection.fetchval("select start_image_job($1)", {**request, "idempotencyKey": "k"}))[
                "jobId"
            ]

    await start(db)
    assert len(set(await asyncio.gather(*map(start, crowd)))) == 1


async def test_a_budget_closes_before_midnight_and_opens_then(db: Db) -> None:
    await limit(db, images_per_day=2)
    await move_clock_to(db, MIDNIGHT - timedelta(seconds=60))
    await insert_as(db, USER, 2)
    await db.execute("update runs set status = 'cancelled'")
    await insert_as(db, USER, 2)
    error = await refused(insert_as(db, USER))
    assert error["message"] == "One user may make 2 images a day, and this would be more."
    assert error["hint"] == f"It opens again at {MIDNIGHT:%Y-%m-%dT%H:%M:%SZ}."
    await insert_as(db, OTHER)


async def test_calls_of_yesterday_do_not_count(db: Db, daemon: Daemon) -> None:
    await limit(db, usd_per_day=Decimal("0.08"))
    await move_clock_to(db, MIDNIGHT - timedelta(seconds=60))
    await daemon.beat()
    await insert_as(db, USER, 2)
    for claimed in await daemon.claim(2):
        await daemon.complete(claimed, cost=0.04)
    error = await refused(insert_as(db, USER))
    assert error["message"] == "One user may spend 0.08 USD a day, and this would be more."
    await move_clock_to(db, MIDNIGHT + timedelta(seconds=1))
    await insert_as(db, USER, 2)
    await refused(insert_as(db, USER))


async def test_the_month_has_its_own_end(db: Db) -> None:
    await limit(db, usd_per_month=Decimal("0.04"))
    await move_clock_to(db, datetime(2031, 12, 31, 23, 59, tzinfo=UTC))
    await insert_as(db, USER)
    error = await refused(insert_as(db, USER))
    assert error["message"] == "One user may spend 0.04 USD a month, and this would be more."
    assert error["hint"] == "It opens again at 2032-01-01T00:00:00Z."


async def test_a_budget_of_nothing_promises_nothing(db: Db) -> None:
    await limit(db, usd_per_day=0)
    assert (await refused(insert_as(db, USER)))["hint"] == "Ask an operator for a larger limit."


async def charge(daemon: Daemon, state: str, cost: float | None, *, image: bool) -> None:
    """Let a call of a run end so, and the run with it."""
    claimed = await daemon.claim_one()
    call = {"id": claimed["call"], "state": state, "image": image, **({"cost": cost} if cost else {})}
    outcome, payload = ("completed", {"imageUrl": "https://x.example/y.png"}) if image else ("failed", {"error": "No."})
    assert await daemon.settle(claimed, outcome, payload=payload, calls=[call]) == "settled"


@pytest.mark.parametrize(
    ("fate", "counts"),
    [
        (("charged", 0.5, True), (1, Decimal("0.5"))),
        (("charged", None, True), (1, Decimal("0.04"))),
        (("charged", 0.5, False), (0, Decimal("0.5"))),
        (("unknown", None, False), (1, Decimal("0.04"))),
        (("free", None, False), (0, Decimal(0))),
    ],
)
async def test_a_call_counts_by_its_fate(
    db: Db, daemon: Daemon, fate: tuple[str, float | None, bool], counts: tuple[int, Decimal]
) -> None:
    state, cost, image = fate
    await insert_as(db, USER)
    await charge(daemon, state, cost, image=image)
    (row,) = await usage(db)
    assert (row["used_images"], row["used_usd"]) == counts


async def test_a_run_counts_once_from_insert_to_retry(db: Db, daemon: Daemon) -> None:
    used: list[tuple[int, Decimal, int]] = []

    async def look() -> None:
        (row,) = await usage(db)
        used.append((row["used_images"], row["used_usd"], row["waiting"]))

    await insert_as(db, USER)
    await look()
    claimed = await daemon.claim_one()
    await look()
    payload = {"error": "Slow down.", "code": "rate_limited"}
    await daemon.settle(
        claimed, "retry", payload=payload, refund=True, due_in=0, calls=[{"id": claimed["call"], "state": "free"}]
    )
    await look()
    claimed = await daemon.claim_one()
    await daemon.settle(
        claimed, "retry", payload=payload, due_in=0, calls=[{"id": claimed["call"], "state": "unknown"}]
    )
    await look()
    once = Decimal("0.04")
    assert used == [(1, once, 1), (1, once, 0), (1, once, 1), (1, once, 1)]


@pytest.mark.parametrize("role", ["postgres", "service_role"])
async def test_runs_that_operators_insert_for_a_user_count(db: Db, role: str) -> None:
    await limit(db, images_per_day=1)
    for _ in range(2):
        await as_operator(
            db,
            role,
            """insert into runs (kind, subject_id, processor, metadata, created_by)
            values ('image_gen', $1, 'demo:painter', $2, $3)""",
            uuid4(),
            PROMPT,
            USER,
        )
    await refused(insert_as(db, USER))
    await insert_as(db, OTHER)


async def test_a_workflow_has_a_budget_of_all_its_members(db: Db) -> None:
    workflow = uuid4()
    await db.execute("insert into image_jobs.workflows (id) values ($1)", workflow)
    await db.execute(
        "insert into workflow_members (workflow_id, user_id) values ($1, $2), ($1, $3)", workflow, USER, OTHER
    )
    await limit(db, "workflow", workflow=workflow, usd_per_day=Decimal("0.08"))
    await insert_as(db, USER, 1, workflow)
    await insert_as(db, OTHER, 1, workflow)
    error = await refused(insert_as(db, USER, 1, workflow))
    assert error["message"] == "This workflow may spend 0.08 USD a day, and this would be more."
    row = (await usage(db))[-1]
    assert (row["scope"], row["workflow_id"], row["used_usd"], row["max_usd"], row["waiting"]) == (
        "workflow",
        workflow,
        Decimal("0.08"),
        Decimal("0.08"),
        2,
    )


async def test_the_caller_reads_what_may_be_used(db: Db) -> None:
    await db.execute(
        "update image_jobs.usage_limits set images_per_day = 20, usd_per_day = 1, usd_per_month = 9 where applies_to = 'each user'"
    )
    await insert_as(db, USER, 3)
    await insert_as(db, OTHER, 1)
    day, month = await usage(db)
    assert dict(day) == {
        "scope": "user",
        "used_images": 3,
        "max_images": 20,
        "used_usd": Decimal("0.12"),
        "max_usd": Decimal(1),
        "waiting": 3,
        "max_waiting": 500,
        "resets_at": MIDNIGHT,
        "period": "day",
        "workflow_id": None,
    }
    assert (month["period"], month["used_usd"], month["max_usd"]) == ("month", Decimal("0.12"), Decimal(9))
    async with signed_in(db, role="service_role"):
        assert await db.fetch("select * from image_usage") == []


# All together, at claim.


async def test_claims_stop_where_the_budget_ends(db: Db, daemon: Daemon) -> None:
    """Operators insert past it; what starts is one image more than it has, at most."""
    await limit(db, "all together", usd_per_day=Decimal("0.10"))
    await db.execute(INSERT, uuid4(), PROMPT, 8)
    assert len(await daemon.claim(8)) == 3
    assert await daemon.claim(8) == []
    row = await db.fetchrow("select * from image_provider_status where provider = 'demo'")
    assert row is not None
    assert (row["state"], row["until"]) == ("budget", MIDNIGHT)
    await move_clock_to(db, MIDNIGHT + timedelta(seconds=1))
    await daemon.beat()
    assert await db.fetchval("select state from image_provider_status where provider = 'demo'") == "open"
    assert len(await daemon.claim(8)) == 3


async def test_runs_that_wait_spend_nothing_of_all_together(db: Db, daemon: Daemon) -> None:
    await limit(db, "all together", usd_per_day=Decimal("0.12"))
    await insert_as(db, USER, 8)
    assert len(await daemon.claim(8)) == 3
    error = await refused(insert_as(db, OTHER))
    assert error["message"] == "All together may spend 0.12 USD a day, and this would be more."
    assert error["hint"] == f"It opens again at {MIDNIGHT:%Y-%m-%dT%H:%M:%SZ}."


async def test_dollars_of_all_together_queue_no_inserts(db: Db, crowd: list[Db]) -> None:
    await limit(db, "all together", usd_per_day=1, usd_per_month=1)
    await crowd[1].execute("set lock_timeout = '2 s'")
    async with crowd[0].transaction():
        await insert_as(crowd[0], USER)
        await insert_as(crowd[1], OTHER)


async def test_images_of_all_together_are_exact(db: Db, daemon: Daemon, crowd: list[Db]) -> None:
    await limit(db, "all together", images_per_day=6)
    await insert_as(db, OTHER, 2)
    await daemon.claim(1)
    assert await attempts(crowd, 1, 1, uuid4()) == 4


async def test_concurrent_claims_share_the_budget(db: Db, daemon: Daemon, crowd: list[Db]) -> None:
    await limit(db, "all together", usd_per_day=Decimal("0.40"))
    await db.execute(INSERT, uuid4(), PROMPT, 60)
    claims = [Daemon(connection, daemon.id).claim(4) for connection in crowd]
    assert sum(map(len, await asyncio.gather(*claims))) == 10


async def test_a_larger_budget_opens_at_once(db: Db, daemon: Daemon) -> None:
    await limit(db, "all together", usd_per_day=0)
    await db.execute(INSERT, uuid4(), PROMPT, 1)
    assert await daemon.claim(1) == []
    await db.execute("update image_jobs.usage_limits set usd_per_day = 1 where applies_to = 'all together'")
    assert await db.fetchval("select state from image_provider_status where provider = 'demo'") == "open"
    assert len(await daemon.claim(1)) == 1


async def test_hours_that_were_added_up_count_as_before(db: Db, daemon: Daemon) -> None:
    await db.execute(INSERT, uuid4(), PROMPT, 4)
    claimed = await daemon.claim(4)
    await daemon.settle(
        claimed[0], "completed", payload={"imageUrl": "https://x.example/y.png", "cost": 0.5},
        calls=[{"id": claimed[0]["call"], "state": "charged", "cost": 0.5, "image": True}],
    )  # fmt: skip
    await daemon.fail(claimed[1])
    total = "select images, usd from image_jobs.used_together(image_jobs.period_start('month'))"
    before = await db.fetchrow(total)
    await move_clock_to(db, NOON + timedelta(hours=2))
    await daemon.beat()
    await db.execute("select image_jobs.add_up_hours()")
    assert await db.fetchval("select sum(images) from image_jobs.used_hours") == 1
    assert await db.fetchrow(total) == before
    await daemon.settle(
        claimed[2], "failed", payload={"error": "No."}, calls=[{"id": claimed[2]["call"], "state": "free"}]
    )
    after = await db.fetchrow(total)
    assert before is not None
    assert after is not None
    assert (after["images"], after["usd"]) == (before["images"] - 1, before["usd"] - Decimal("0.04"))


@pytest.mark.parametrize("column", ["usd_per_day", "usd_per_month"])
@pytest.mark.parametrize("amount", ["NaN", "Infinity", "-1"])
async def test_a_budget_that_is_no_amount_is_refused(db: Db, column: str, amount: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError, match="usage_limits_in_usd_are_amounts"):
        await db.execute(f"update image_jobs.usage_limits set {column} = '{amount}'")
