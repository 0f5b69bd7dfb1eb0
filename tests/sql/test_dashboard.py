"""The dashboard has all that an operator looks at, in one call, under the keys that the README lists."""

import re
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import pytest

from tests.support.postgres import ROOT
from tests.support.protocol import NOON, Daemon, Db, move_clock_to, new_daemon, run_in
from tests.support.runs import insert_run, insert_runs

README = (ROOT / "sql/README.md").read_text()


async def dashboard(db: Db, period: str = "1 hour") -> dict[str, Any]:
    return await db.fetchval("select image_jobs.dashboard($1::text::interval)", period)


async def busy(db: Db, daemon: Daemon) -> None:
    """Have a run in each state, one that was completed two hours ago, and one of a provider that is closed."""
    await move_clock_to(db, NOON - timedelta(hours=2))
    await run_in(db, daemon, "completed")
    await move_clock_to(db, NOON)
    await daemon.beat()
    await insert_run(db)
    claimed = await daemon.claim_one()
    call = {"id": claimed["call"], "state": "charged", "cost": 0.04, "image": True}
    payload = {"imageUrl": "https://example.com/i.png"}
    await daemon.settle(claimed, "completed", payload=payload, calls=[call])
    for code in ("storage_unavailable", "timeout", "timeout"):
        await insert_run(db)
        await daemon.fail(await daemon.claim_one(), code)
    await run_in(db, daemon, "running")
    await run_in(db, daemon, "parked")
    await run_in(db, daemon, "cancelled")
    await db.execute("select image_jobs.block_provider('openai', null, interval '1 hour', 'Pay your bill.')")
    await insert_runs(db, 2, processor="openai:gpt-image-1")


async def test_everything_is_in_one_call(db: Db, daemon: Daemon) -> None:
    await busy(db, daemon)
    await new_daemon(db, "openai")
    board = await dashboard(db)
    named = re.search(r"## The dashboard\n(.*?)\n## ", README, re.DOTALL)
    assert named is not None
    documented = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", named[1], re.MULTILINE)
    assert {key for line in documented for key in re.findall(r"\w+", line)} == board.keys()
    totals = board["totals"]
    assert {name: totals[name] for name in ("waiting", "running", "parked", "slots", "daemons")} == {
        "waiting": 2,
        "running": 1,
        "parked": 1,
        "slots": 8,
        "daemons": 2,
    }
    assert (totals["completed"], totals["failed"], totals["cancelled"]) == (1, 3, 1)
    assert (totals["usd"], totals["usd_today"]) == (0.04, 0.04)
    demo, openai = board["queue"]
    assert (demo["provider"], demo["state"], demo["pending"], demo["running"], demo["parked"]) == (
        "demo",
        "open",
        0,
        1,
        1,
    )
    assert (openai["provider"], openai["state"], openai["sentence"]) == ("openai", "blocked", "Pay your bill.")
    assert openai["pending"] == 2
    assert openai["blocked_until"] == openai["until"]
    painter, image = board["models"]
    assert (painter["model"], painter["completed"], painter["failed"], painter["failure_share"]) == (
        "painter",
        1,
        3,
        0.75,
    )
    assert painter["usd"] == 0.04
    assert painter["generate_p50_ms"] == painter["generate_p95_ms"] >= 0  # of one run
    assert (image["model"], image["waiting"], image["per_minute"], image["state"]) == ("gpt-image-1", 2, 50, "blocked")
    assert [(each["code"], each["count"]) for each in board["failures_by_code"]] == [
        ("timeout", 2),
        ("storage_unavailable", 1),
    ]
    assert (board["failures_by_code"][0]["error"], board["failures_by_code"][0]["hint"]) == ("No.", "Ask again.")
    assert board["storage"] == {"stored": 1, "failed": 1, "success_rate": 0.5}
    assert [failure["code"] for failure in board["failures"]] == ["timeout", "timeout", "storage_unavailable"]
    assert {each["state"] for each in board["daemons"]} == {"alive"}
    assert [alert["name"] for alert in board["alerts"]] == ["storage_failing", "provider_blocked"]


async def test_a_longer_period_has_what_ended_before(db: Db, daemon: Daemon) -> None:
    await busy(db, daemon)
    assert (await dashboard(db, "3 hours"))["totals"]["completed"] == 2


@pytest.mark.one_postgres
@pytest.mark.parametrize("period", ["0", "-1 hour", "32 days"])
async def test_a_period_of_nothing_or_of_years_is_refused(db: Db, period: str) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError, match="at most 31 days"):
        await dashboard(db, period)


async def test_invented_providers_share_a_row(db: Db, daemon: Daemon) -> None:
    for number in range(120):
        await insert_run(db, processor=f"invented-{number}:painter")
    await db.execute("update runs set status = 'cancelled' where processor = 'invented-0:painter'")
    await insert_run(db)
    board = await dashboard(db)
    assert [(each["provider"], each["pending"]) for each in board["queue"]] == [("?", 119), ("demo", 1)]
    assert {each["provider"] for each in board["models"]} == {"?", "demo"}
    rows = await db.fetch(
        "select g ->> 'provider' as provider from image_jobs.gauges() g where g ->> 'gauge' = 'waiting'"
    )
    assert sorted(row["provider"] for row in rows) == ["?", "demo"]
    stats = await db.fetch("select provider, pending, cancelled from image_jobs.queue_stats order by provider")
    assert [tuple(row) for row in stats] == [("?", 119, 1), ("demo", 1, 0)]


async def test_a_series_tells_when_runs_ended_and_money_went(db: Db, daemon: Daemon) -> None:
    await busy(db, daemon)
    board = await dashboard(db, "3 hours")
    assert board["step"] == 300
    steps = {datetime.fromisoformat(each["at"]): each for each in board["series"]}
    assert len(steps) == 37
    then, now = steps[NOON - timedelta(hours=2)], steps[NOON]
    assert (then["completed"], then["failed"], then["usd"]) == (1, 0, 0)
    assert (now["completed"], now["failed"], now["usd"]) == (1, 3, 0.04)
    assert now["generate_p50_ms"] == now["generate_p95_ms"] >= 0
    assert sum(each["completed"] + each["failed"] for each in steps.values()) == 5
    assert steps[NOON - timedelta(hours=1)]["generate_p50_ms"] is None


@pytest.mark.one_postgres
@pytest.mark.parametrize(
    ("period", "step"), [("15 min", 15), ("1 hour", 60), ("1 day", 900), ("7 days", 10800), ("31 days", 43200)]
)
async def test_a_period_has_a_hundred_steps_at_most(db: Db, period: str, step: int) -> None:
    board = await dashboard(db, period)
    assert board["step"] == step
    assert 56 <= len(board["series"]) <= 101
