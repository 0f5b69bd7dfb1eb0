"""status: the queue, the daemons, the latest failures."""

import json
import signal

from tests.support.commands import fail_run, insert_run
from tests.support.protocol import move_clock


async def test_status_counts_runs_and_shows_failures_verbatim(image_jobs, database, db):
    await fail_run(db, await insert_run(db, "job_d"), "[bold]No red left.[/bold]")
    await insert_run(db, "job_e")
    await db.execute("insert into image_jobs.provider_blocks (provider, until) values ('demo', 'infinity')")
    done = await image_jobs("status", DATABASE_URL=database)
    assert done.code == 0
    assert "closed to all daemons until it is opened" in " ".join(done.out.split())
    assert "[bold]No red left.[/bold]" in done.out
    assert "job_d" in done.out
    seen = (await image_jobs("status", "--json", DATABASE_URL=database)).json
    (queue,) = seen["queue"]
    assert (queue["provider"], queue["pending"], queue["failed"]) == ("demo", 1, 1)
    assert isinstance(queue["oldest_wait"], float)
    assert [failure["id"] for failure in seen["failures"]] == ["job_d"]
    assert [daemon["name"] for daemon in seen["daemons"]] == ["test"]


async def test_an_empty_database_has_a_status_too(image_jobs, database):
    done = await image_jobs("status", DATABASE_URL=database)
    assert done.code == 0
    assert "No runs in the last hour." in done.out
    assert "image-jobs run" in done.out


async def test_runs_before_the_last_hour_are_not_denied(image_jobs, database, db):
    await move_clock(db, "-2 hours")
    await insert_run(db, "job_g")
    await db.execute("update runs set status = 'cancelled' where id = 'job_g'")
    await move_clock(db, "0")
    done = await image_jobs("status", DATABASE_URL=database)
    assert "No runs in the last hour." in done.out
    assert "yet" not in done.out


async def test_status_watch_refreshes_until_ctrl_c(image_jobs, database, db):
    process = await image_jobs.start("status", "--watch", "--json", DATABASE_URL=database)
    assert process.stdout is not None
    assert json.loads(await process.stdout.readline())["queue"] == []
    await insert_run(db, "job_f")
    while not json.loads(await process.stdout.readline())["queue"]:
        pass
    process.send_signal(signal.SIGINT)
    assert (await image_jobs.end(process)).code == 0
