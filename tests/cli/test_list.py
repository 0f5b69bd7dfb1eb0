"""list: the newest runs, and its filters."""

import pytest

from tests.support.commands import fail_run, insert_run
from tests.support.protocol import move_clock


@pytest.fixture
async def runs(db):
    """Insert a failed, a cancelled and a pending run, the last one of another provider; a minute apart."""
    await move_clock(db, "-3 minutes")
    await fail_run(db, await insert_run(db, "job_failed"), "No red left.")
    await move_clock(db, "-2 minutes")
    await insert_run(db, "job_cancelled")
    await db.execute("update runs set status = 'cancelled' where id = 'job_cancelled'")
    await move_clock(db, "-1 minute")
    await insert_run(db, "job_pending", "openai:gpt-image-2")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (("--limit", "2"), ["job_pending", "job_cancelled"]),
        (("--status", "cancelled"), ["job_cancelled"]),
        (("--provider", "demo"), ["job_cancelled", "job_failed"]),
        (("--provider", "openai"), ["job_pending"]),
        (("--code", "test"), ["job_failed"]),
        (("--code", "test", "--status", "completed"), []),
    ],
)
async def test_list_filters_runs_and_begins_with_the_newest(image_jobs, database, runs, options, found):
    done = await image_jobs("list", *options, "--json", DATABASE_URL=database)
    assert (done.code, [run["id"] for run in done.json]) == (0, found)


async def test_list_says_how_many_runs_it_can_show(image_jobs, database):
    for limit in (2**63 - 1, 10**20):
        done = await image_jobs("list", "--limit", str(limit), DATABASE_URL=database)
        assert (done.code, "100000" in done.err) == (2, True)


async def test_list_shows_why_a_run_failed_and_what_it_cost(image_jobs, database, db, runs):
    await db.execute("update runs set payload = payload || '{\"cost\": 0.0525}' where id = 'job_failed'")
    (run,) = (await image_jobs("list", "--status", "failed", "--json", DATABASE_URL=database)).json
    assert (run["code"], run["error"], run["cost"], run["prompt"]) == ("test", "No red left.", 0.0525, "a fox")
    done = await image_jobs("list", "--status", "failed", DATABASE_URL=database)
    assert done.out.splitlines()[1].split(None, 4) == [
        "job_failed",
        "failed",
        "3",
        "m",
        "$0.0525  demo:painter - test: No red left.",
    ]


async def test_list_shows_a_line_for_each_run(image_jobs, database, runs):
    done = await image_jobs("list", DATABASE_URL=database)
    assert [line.split()[0] for line in done.out.splitlines()] == ["run", "job_pending", "job_cancelled", "job_failed"]
    done = await image_jobs("list", "--code", "other", DATABASE_URL=database)
    assert (done.code, done.out) == (0, "There is no such run.\n")


async def test_runs_from_before_the_migration_come_last(image_jobs, database, db, runs):
    await db.execute("""
        alter table runs disable trigger user;
        insert into runs (id, kind, subject_id, status, processor, created_at)
        select id, 'image_gen', gen_random_uuid(), 'completed', 'demo:painter', null from unnest(array['job_1', 'job_2']) id;
        alter table runs enable trigger user;
    """)
    done = await image_jobs("list", "--json", DATABASE_URL=database)
    assert [run["id"] for run in done.json] == ["job_pending", "job_cancelled", "job_failed", "job_2", "job_1"]
    done = await image_jobs("list", "--status", "completed", DATABASE_URL=database)
    assert [line.split()[:2] for line in done.out.splitlines()[1:]] == [["job_2", "completed"], ["job_1", "completed"]]


async def test_list_without_runs_says_so(image_jobs, database):
    assert (await image_jobs("list", DATABASE_URL=database)).out == "No runs yet.\n"
    assert (await image_jobs("list", "--json", DATABASE_URL=database)).json == []


async def test_an_unknown_status_is_exit_code_2(image_jobs):
    done = await image_jobs("list", "--status", "done")
    assert done.code == 2
    assert "completed" in done.err
