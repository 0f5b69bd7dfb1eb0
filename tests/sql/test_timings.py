"""Times of completed runs: from the database's instants, for every way a run can go. They add up to all of it."""

from typing import Any

import pytest

from tests.support.protocol import IMAGE, Daemon, Db, move_clock, new_daemon
from tests.support.runs import in_milliseconds, insert_run, insert_runs, run_row

pytestmark = pytest.mark.one_postgres

NEAR = 25
"""Seconds that the statements between two moves of the clock may take. A call of 300 s is read within them, as one of 3 s
would be within 250 ms on a machine that has nothing else to do."""


class Clock:
    """The database's clock, which moves only as it is told to (and with the statements between)."""

    def __init__(self, db: Db) -> None:
        self._db = db
        self._seconds = 0.0

    async def forward(self, seconds: float) -> None:
        """Let so many seconds pass."""
        self._seconds += seconds
        await move_clock(self._db, f"{self._seconds} s")


async def send(daemon: Daemon, claim: dict[str, Any], ago: float = 0) -> None:
    """Write down that the request went out, so many seconds ago."""
    await daemon.record(claim, calls=[{"id": claim["call"], "sent_ago": ago}])


async def complete(daemon: Daemon, claim: dict[str, Any], *, image_ago: float, stored_ago: float) -> None:
    """Settle a run whose picture came and was stored so many seconds ago."""
    call = {"id": claim["call"], "state": "charged", "cost": 0.04, "image": True, "image_ago": image_ago}
    payload = {"imageUrl": IMAGE, "cost": 0.04}
    assert await daemon.settle(claim, "completed", payload=payload, stored_ago=stored_ago, calls=[call]) == "settled"


async def timings(db: Db, run: str, *, since: str = "created_at") -> list[int]:
    """Read the four times; they have to add up to all the time there was since the insert, or the requeue."""
    row = await run_row(db, run)
    times: dict[str, int] = row["payload"]["timings"]
    assert all(value >= 0 for value in times.values()), times
    assert sum(times.values()) == in_milliseconds(row["finished_at"] - row[since])
    return [times[name] for name in ("queuedMs", "generateMs", "storeMs", "settleMs")]


def assert_near(times: list[int], *seconds: float) -> None:
    """Assert that each time is what the clock was moved by."""
    for value, wanted in zip(times, seconds, strict=True):
        assert abs(value / 1000 - wanted) < NEAR, (times, seconds)


async def test_times_are_those_between_the_instants(db: Db, daemon: Daemon) -> None:
    clock = Clock(db)
    run = await insert_run(db)
    await clock.forward(500)
    claim = await daemon.claim_one()
    await clock.forward(200)  # waits for a permit, and for the picture to refine
    await send(daemon, claim)
    await clock.forward(300 + 400 + 100)
    await complete(daemon, claim, image_ago=500, stored_ago=100)
    assert_near(await timings(db, run), 700, 300, 400, 100)


async def test_late_writes_are_timed_when_they_happened(db: Db, daemon: Daemon) -> None:
    clock = Clock(db)
    run = await insert_run(db)
    claim = await daemon.claim_one()
    await clock.forward(6000)  # the database was away
    await send(daemon, claim, ago=5900)
    await send(daemon, claim, ago=2000)  # the same call again: it left once
    await complete(daemon, claim, image_ago=5000, stored_ago=4800)
    assert_near(await timings(db, run), 100, 900, 200, 4800)


async def test_parked_run_says_how_long_it_took(db: Db, daemon: Daemon) -> None:
    clock = Clock(db)
    run = await insert_run(db)
    claim = await daemon.claim_one()
    await send(daemon, claim)
    await daemon.park(claim, due_in=5)
    for _ in range(3):
        await clock.forward(100)
        claim = await daemon.claim_one()
        await daemon.park(claim, due_in=5)
    await clock.forward(100)
    claim = await daemon.claim_one()
    await complete(daemon, claim, image_ago=0, stored_ago=0)
    assert_near(await timings(db, run), 0, 400, 0, 0)


async def test_take_over_of_a_parked_run_keeps_its_submission(db: Db, daemon: Daemon) -> None:
    clock = Clock(db)
    run = await insert_run(db)
    claim = await daemon.claim_one()
    await send(daemon, claim)
    await daemon.park(claim, due_in=0)
    await daemon.claim_one()  # and falls silent, with the picture in hand or not
    other = await new_daemon(db)
    for _ in range(40):
        await clock.forward(10)
        await other.beat()
    assert await other.take_over() == 1
    claim = await other.claim_one()
    await clock.forward(200)
    await complete(other, claim, image_ago=200, stored_ago=100)
    assert_near(await timings(db, run), 0, 400, 100, 100)


async def test_earlier_attempts_lie_in_the_time_in_line(db: Db, daemon: Daemon) -> None:
    clock = Clock(db)
    run = await insert_run(db)
    claim = await daemon.claim_one()
    await send(daemon, claim)
    await clock.forward(3000)
    await daemon.settle(claim, "retry", payload={"error": "Later.", "code": "unavailable"}, due_in=800)
    await clock.forward(800)
    claim = await daemon.claim_one()
    await send(daemon, claim)
    await clock.forward(300)
    await complete(daemon, claim, image_ago=0, stored_ago=0)
    assert_near(await timings(db, run), 3800, 300, 0, 0)


async def test_adopted_picture_has_the_times_of_its_maker(db: Db, daemon: Daemon) -> None:
    clock = Clock(db)
    run = await insert_run(db)
    first = await daemon.claim_one()
    await send(daemon, first)
    await clock.forward(300)
    drawn = {"id": first["call"], "state": "charged", "cost": 0.04, "image": True}
    await daemon.record(first, calls=[{**drawn, "image_ago": 0}])
    await daemon.settle(first, "retry", payload={"error": "Stopped.", "code": "outcome_unknown"}, due_in=0)
    await clock.forward(2000)
    second = await daemon.claim_one()
    calls = [{"id": second["call"], "state": "free"}, drawn]
    await daemon.settle(second, "completed", payload={"imageUrl": IMAGE}, stored_ago=100, calls=calls)
    assert_near(await timings(db, run), 0, 300, 1900, 100)


async def test_requeue_begins_anew(db: Db, daemon: Daemon) -> None:
    clock = Clock(db)
    run = await insert_run(db)
    await daemon.fail(await daemon.claim_one())
    await clock.forward(3600)
    await db.execute("update runs set status = 'pending' where id = $1", run)
    await clock.forward(100)
    claim = await daemon.claim_one()
    await send(daemon, claim)
    await clock.forward(300)
    await complete(daemon, claim, image_ago=0, stored_ago=0)
    assert_near(await timings(db, run, since="queued_at"), 100, 300, 0, 0)


async def test_nonsense_of_a_daemon_makes_no_nonsense(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claim = await daemon.claim_one()
    await send(daemon, claim, ago=1e300)
    await complete(daemon, claim, image_ago=-5, stored_ago=99_999)
    await timings(db, run)


async def test_settlement_returns_the_times(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claim = await daemon.claim_one()
    entry = {"id": run, "claim": claim["claim"], "outcome": "completed", "payload": {"imageUrl": IMAGE}}
    (row,) = await daemon.sync(settlements=[entry])
    assert row["fate"] == {"outcome": "completed", "timings": (await run_row(db, run))["payload"]["timings"]}


async def failed(db: Db, run: str) -> dict[str, int]:
    """Read the times of a failed run; they have to add up to all the time there was."""
    row = await run_row(db, run)
    times: dict[str, int] = row["payload"]["timings"]
    assert row["status"] == "failed"
    assert sum(times.values()) == in_milliseconds(row["finished_at"] - row["created_at"])
    return times


async def test_failed_run_has_times_as_far_as_it_got(db: Db, daemon: Daemon) -> None:
    clock = Clock(db)
    runs = await insert_runs(db, 3)
    await clock.forward(500)
    claims = {claim["id"]: claim for claim in await daemon.claim(3)}
    for run in runs[1:]:
        await send(daemon, claims[run])
    await clock.forward(300)
    await daemon.record(
        claims[runs[2]], calls=[{"id": claims[runs[2]]["call"], "image": True, "state": "charged", "image_ago": 0}]
    )
    await clock.forward(100)
    reason = {"error": "No.", "code": "refused", "hint": "Ask again."}
    for run in runs[:2]:
        await daemon.settle(claims[run], "failed", payload=reason)
    await db.execute("update runs set max_attempts = 1 where id = $1", runs[2])
    await daemon.settle(claims[runs[2]], "retry", payload=reason, calls=[], due_in=0)
    times = [await failed(db, run) for run in runs]
    assert [list(each) for each in times] == [
        ["queuedMs"],
        ["queuedMs", "generateMs"],
        ["storeMs", "queuedMs", "generateMs"],
    ]
    assert_near([times[0]["queuedMs"]], 900)
    assert_near([times[1]["queuedMs"], times[1]["generateMs"]], 500, 400)
    assert_near([times[2]["queuedMs"], times[2]["generateMs"], times[2]["storeMs"]], 500, 300, 100)
    assert await db.fetchval("select count(*) from image_jobs.run_timings") == 0
