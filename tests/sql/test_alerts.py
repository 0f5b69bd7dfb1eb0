"""Each alert opens when something is wrong, says what and how to mend it, and closes when that is over."""

from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest

from tests.support.postgres import signed_in
from tests.support.protocol import NOON, Daemon, Db, move_clock, move_clock_to, new_daemon, run_in
from tests.support.runs import insert_run, insert_runs

pytestmark = pytest.mark.one_postgres

Step = Callable[[Db, Daemon], Awaitable[object]]


async def alerts(db: Db) -> dict[tuple[str, str], dict[str, Any]]:
    """Fetch what is wrong: by name and subject."""
    rows = await db.fetch("select * from image_jobs.alerts")
    return {(row["name"], row["subject"]): dict(row) for row in rows}


async def fail(db: Db, daemon: Daemon, *codes: str, processor: str = "demo:painter") -> None:
    for code in codes:
        await insert_run(db, processor=processor)
        await daemon.fail(await daemon.claim_one(), code)


async def complete(db: Db, daemon: Daemon, count: int) -> None:
    await insert_runs(db, count)
    for claimed in await daemon.claim(count):
        await daemon.complete(claimed)


async def report(db: Db, daemon: Daemon, event: str, **data: Any) -> None:
    """Have the daemon write an event of a run of its own."""
    await run_in(db, daemon, "completed")
    await insert_run(db)
    payload = {"event": event, "message": "So it is.", "data": data}
    await daemon.record(await daemon.claim_one(), events=[{"kind": "error", "payload": payload}])


async def block(db: Db, _: Daemon) -> None:
    await db.execute("select image_jobs.block_provider('demo', 'painter', interval '90 s', 'Slow down.')")


async def deliver(db: Db, _: Daemon) -> None:
    await db.execute(
        "insert into image_jobs.webhook_deliveries (provider, delivery_id, received_at) values ('demo', 'd', clock_timestamp())"
    )


async def count_server_errors(db: Db, _: Daemon) -> None:
    await db.execute("insert into image_jobs.provider_streaks (provider, closings) values ('demo', 5)")


async def succeed(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    (claimed,) = await daemon.claim(1)
    await daemon.settle(
        claimed, "failed", http_status=400, payload={"error": "No.", "code": "content_policy", "hint": "."}
    )


async def report_trouble(db: Db, daemon: Daemon, *, storage: bool = False, unreachable: tuple[str, ...] = ()) -> None:
    """Have the daemon say for a minute what keeps it from claiming."""
    report = "select image_jobs.report_daemon($1, $2, $3)"
    await db.execute(report, daemon.id, storage, list(unreachable))
    await move_clock(db, "61 s")
    await daemon.beat()
    await db.execute(report, daemon.id, storage, list(unreachable))


async def spend(db: Db, daemon: Daemon, budget: str) -> None:
    """Spend four cents of a budget for a day, at noon."""
    await move_clock_to(db, NOON)
    await daemon.beat()
    await db.execute(
        "insert into image_jobs.usage_limits (applies_to, usd_per_day) values ('all together', $1::text::numeric)",
        budget,
    )
    await insert_run(db)
    claimed = await daemon.claim_one()
    call = {"id": claimed["call"], "state": "charged", "cost": 0.04}
    await daemon.settle(claimed, "completed", payload={"imageUrl": "https://example.com/i.png"}, calls=[call])


async def raise_budget(db: Db, _: Daemon) -> None:
    await db.execute("update image_jobs.usage_limits set usd_per_day = 1 where applies_to = 'all together'")


async def wait_long(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    await move_clock(db, "11 min")
    await daemon.beat()


def after(clock: str) -> Step:
    """Return a step: so much later the daemon still lives."""

    async def step(db: Db, daemon: Daemon) -> None:
        await move_clock(db, clock)
        await daemon.beat()

    return step


def at(*steps: Step) -> Step:
    async def step(db: Db, daemon: Daemon) -> None:
        for each in steps:
            await each(db, daemon)

    return step


KINDS: dict[tuple[str, str], tuple[Step, Step, str]] = {
    ("no_daemon", ""): (
        lambda db, daemon: db.execute("select image_jobs.leave($1)", daemon.id),
        lambda db, daemon: new_daemon(db),
        "No daemon is running.",
    ),
    ("provider_unserved", "openai"): (
        lambda db, daemon: insert_run(db, processor="openai:gpt-image-1"),
        lambda db, daemon: new_daemon(db, "openai"),
        "Runs for openai are waiting, and no daemon serves it.",
    ),
    ("provider_blocked", "demo:painter"): (block, after("91 s"), "demo:painter is closed to all daemons until "),
    ("provider_unreachable", "demo"): (
        lambda db, daemon: report_trouble(db, daemon, unreachable=("demo",)),
        report_trouble,
        "No daemon can connect to demo.",
    ),
    ("provider_down", "demo"): (
        count_server_errors,
        succeed,
        "demo has answered with server errors only for more than",
    ),
    ("polling_timeouts", "demo"): (
        lambda db, daemon: fail(db, daemon, "polling_timeout"),
        after("61 min"),
        '1 run of demo ended with "Polling timeout exceeded" in the last hour.',
    ),
    ("failure_rate", "demo"): (
        at(lambda db, daemon: complete(db, daemon, 10), lambda db, daemon: fail(db, daemon, *["timeout"] * 5)),
        lambda db, daemon: complete(db, daemon, 15),
        "5 of 15 runs of demo failed in the last 15 minutes, most of them with timeout.",
    ),
    ("storage_failing", ""): (
        lambda db, daemon: fail(db, daemon, "storage_unavailable"),
        lambda db, daemon: complete(db, daemon, 1),
        "1 picture could not be stored in the last 15 minutes, the last with storage_unavailable.",
    ),
    ("base64_refused", ""): (
        lambda db, daemon: report(db, daemon, "warning", fields=["message"], base64=True),
        after("61 min"),
        "1 time in the last hour, base64 was kept out of the database.",
    ),
    ("webhook_late", "demo"): (
        lambda db, daemon: report(db, daemon, "incident", webhook="late"),
        deliver,
        "1 webhook of demo did not come in time in the last hour, and none has come since.",
    ),
    ("budget_nearly_spent", "day"): (
        lambda db, daemon: spend(db, daemon, "0.05"),
        raise_budget,
        "Of this day's budget of $0.05 for all together, $0.04 are used.",
    ),
    ("oldest_wait", "demo"): (
        wait_long,
        lambda db, daemon: daemon.claim_one(),
        "A run for demo has been waiting for 11 minutes.",
    ),
}


@pytest.mark.parametrize("alert", KINDS, ids=lambda alert: alert[0])
async def test_each_alert_opens_and_closes(db: Db, daemon: Daemon, alert: tuple[str, str]) -> None:
    open_it, close_it, sentence = KINDS[alert]
    assert await alerts(db) == {}
    await open_it(db, daemon)
    found = await alerts(db)
    assert list(found) == [alert]
    assert found[alert]["sentence"].startswith(sentence)
    assert found[alert]["cure"].endswith(".")
    assert found[alert]["since"] <= await db.fetchval("select image_jobs.now()")
    await close_it(db, daemon)
    assert alert not in await alerts(db)


QUIET: dict[str, Step] = {
    "faults of users": lambda db, daemon: fail(db, daemon, *["content_policy"] * 10),
    "few failures": lambda db, daemon: fail(db, daemon, *["timeout"] * 4),
    "a small share": at(
        lambda db, daemon: complete(db, daemon, 21), lambda db, daemon: fail(db, daemon, *["timeout"] * 5)
    ),
    "webhooks": at(deliver, lambda db, daemon: complete(db, daemon, 1)),
    "a run that waits": lambda db, daemon: insert_run(db),
    "closed for seconds": lambda db, daemon: db.execute(
        "select image_jobs.block_provider('demo', null, interval '20 s', 'Slow down.')"
    ),
    "paused": lambda db, daemon: db.execute(
        "insert into image_jobs.provider_limits (provider, paused) values ('demo', true)"
    ),
}


@pytest.mark.parametrize("trouble", QUIET)
async def test_trouble_that_passes_is_no_alert(db: Db, daemon: Daemon, trouble: str) -> None:
    await QUIET[trouble](db, daemon)
    assert await alerts(db) == {}


async def test_storage_that_daemons_find_closed_is_an_alert(db: Db, daemon: Daemon) -> None:
    await report_trouble(db, daemon, storage=True)
    (alert,) = (await alerts(db)).values()
    assert (alert["name"], alert["sentence"]) == (
        "storage_failing",
        "Storage takes no uploads, so no run is started.",
    )
    await report_trouble(db, daemon)
    assert await alerts(db) == {}


async def test_a_spent_budget_is_critical(db: Db, daemon: Daemon) -> None:
    await spend(db, daemon, "0.04")
    assert [(name, alert["severity"]) for (name, _), alert in (await alerts(db)).items()] == [
        ("budget_spent", "critical"),
    ]
    await raise_budget(db, daemon)
    assert await alerts(db) == {}


async def test_a_paused_provider_may_keep_runs_waiting(db: Db, daemon: Daemon) -> None:
    await db.execute("insert into image_jobs.provider_limits (provider, paused) values ('demo', true)")
    await wait_long(db, daemon)
    assert await alerts(db) == {}


async def test_a_long_wait_for_something_known_is_no_other_alert(db: Db, daemon: Daemon) -> None:
    await wait_long(db, daemon)
    assert list(await alerts(db)) == [("oldest_wait", "demo")]
    await db.execute("select image_jobs.block_provider('demo', null, interval '1 hour', 'Pay your bill.')")
    assert list(await alerts(db)) == [("provider_blocked", "demo")]
    await db.execute("delete from image_jobs.provider_blocks")
    await db.execute("insert into image_jobs.usage_limits (applies_to, usd_per_day) values ('all together', 0)")
    assert [name for name, _ in await alerts(db)] == ["budget_spent"]


async def test_the_worst_alerts_come_first(db: Db, daemon: Daemon) -> None:
    await fail(db, daemon, "polling_timeout")
    await insert_run(db, processor="openai:gpt-image-1")
    assert [alert["severity"] for alert in (await alerts(db)).values()] == ["critical", "warning"]


async def test_runs_that_wait_make_a_missing_daemon_critical(db: Db) -> None:
    assert await alerts(db) == {}  # freshly installed
    await insert_run(db)
    assert (await alerts(db))["no_daemon", ""]["severity"] == "critical"


async def test_only_operators_see_alerts(db: Db, daemon: Daemon) -> None:
    async with signed_in(db, role="service_role"):
        assert await db.fetch("select * from image_jobs.alerts") == []
        assert (await db.fetchval("select image_jobs.dashboard()"))["alerts"] == []
    for role in ("anon", "authenticated"):
        for query in ("select * from image_jobs.alerts", "select image_jobs.dashboard()"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with signed_in(db, role=role):
                    await db.fetch(query)
