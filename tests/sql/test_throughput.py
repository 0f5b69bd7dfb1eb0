"""Throughput and failures, as operators see them: of the last 24 hours."""

from tests.support.protocol import Daemon, Db, move_clock
from tests.support.runs import insert_run


async def test_each_minute_counts_what_ended_in_it(db: Db, daemon: Daemon) -> None:
    await move_clock(db, "-25 hours")
    await daemon.beat()
    await insert_run(db)
    await daemon.fail(await daemon.claim_one(), "too_old")
    await move_clock(db, "-2 hours")
    await daemon.beat()
    await insert_run(db)
    await daemon.settle(await daemon.claim_one(), "retry", payload={"error": "No.", "code": "timeout"}, due_in=0)
    await daemon.complete(await daemon.claim_one())
    await move_clock(db, "-1 hour")
    await daemon.beat()
    for number in range(2):
        await insert_run(db)
        await daemon.fail(await daemon.claim_one(), "refused", error=f"No {number}.")
    rows = await db.fetch("select done, failed, retried from image_jobs.throughput order by minute")
    assert sum(row["failed"] for row in rows) == 2
    assert tuple(rows[0]) == (1, 0, 1)
    (failure,) = await db.fetch(
        "select f.*, r.payload ->> 'error' as error from image_jobs.failures f join runs r on r.id = f.example"
    )
    assert (failure["code"], failure["count"], failure["sentence"], failure["error"]) == (
        "refused",
        2,
        "No 1.",
        "No 1.",
    )
