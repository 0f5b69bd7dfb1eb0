"""events, cancel, requeue."""

import pytest

from tests.support.commands import fail_run, insert_run


async def test_events_lists_the_events_of_a_run(image_jobs, database, db):
    run_id = await insert_run(db, "job_a")
    await fail_run(db, run_id, "No red left.")
    done = await image_jobs("events", run_id, DATABASE_URL=database)
    assert done.code == 0
    assert [line.split()[1] for line in done.out.splitlines()] == ["created", "claimed", "failed"]
    assert "No red left." in done.out
    listed = (await image_jobs("events", run_id, "--json", DATABASE_URL=database)).json
    assert [event["payload"]["event"] for event in listed] == ["created", "claimed", "failed"]
    assert [event["seq"] for event in listed] == sorted(event["seq"] for event in listed)


async def test_cancel_and_requeue_change_a_run(image_jobs, database, db):
    run_id = await insert_run(db, "job_b")
    assert (await image_jobs("cancel", run_id, DATABASE_URL=database)).out == "job_b is cancelled.\n"
    done = await image_jobs("requeue", run_id, "--json", DATABASE_URL=database)
    assert (done.json["jobId"], done.json["status"]) == (run_id, "pending")
    assert await db.fetchval("select status from public.runs") == "pending"


async def test_cancelling_an_ended_run_prints_its_status(image_jobs, database, db):
    run_id = await insert_run(db, "job_c")
    await fail_run(db, run_id, "No red left.")
    done = await image_jobs("cancel", run_id, DATABASE_URL=database)
    assert (done.code, done.out) == (0, "job_c is failed.\n")


@pytest.mark.parametrize("command", ["events", "cancel", "requeue"])
async def test_an_unknown_run_is_exit_code_1(image_jobs, database, command):
    done = await image_jobs(command, "job_unknown", DATABASE_URL=database)
    assert (done.code, done.out) == (1, "")
    assert "There is no" in done.err
