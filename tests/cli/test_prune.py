"""prune."""

import pytest

from tests.support.runs import insert_runs


async def test_prune_deletes_what_ended_long_ago(image_jobs, database, db):
    old, new, unfinished = await insert_runs(db, 3)
    await db.execute("update runs set status = 'cancelled' where id = any ($1)", [old, new])
    await db.execute("select set_config('image_jobs.writer', 'daemon', false)")
    await db.execute("update runs set finished_at = now() - interval '91 days' where id = $1", old)
    done = await image_jobs("prune", "--older-than", "90d", DATABASE_URL=database)
    assert (done.code, done.out, done.err) == (0, "1 run was deleted.\n", "")
    assert {row["id"] for row in await db.fetch("select id from runs")} == {new, unfinished}
    done = await image_jobs("prune", "--older-than", "90", "--json", DATABASE_URL=database)
    assert done.json == {"pruned": 0, "refused": 0, "reason": None}


async def test_prune_names_what_keeps_a_run(image_jobs, database, db):
    (run,) = await insert_runs(db, 1)
    await db.execute("update runs set status = 'cancelled'")
    await db.execute("select set_config('image_jobs.writer', 'daemon', false)")
    await db.execute("update runs set finished_at = now() - interval '91 days'")
    await db.execute("create table gallery (run_id varchar references runs (id))")
    await db.execute("insert into gallery values ($1)", run)
    done = await image_jobs("prune", "--older-than", "90d", DATABASE_URL=database)
    assert (done.code, done.out) == (1, "0 runs were deleted.\n")
    assert "1 could not be deleted" in done.err
    assert "gallery" in done.err


@pytest.mark.parametrize("age", ["0d", "-1", "soon", "90h", "36501", ""])
async def test_an_age_that_is_no_number_of_days_is_refused(image_jobs, database, age):
    done = await image_jobs("prune", "--older-than", age, DATABASE_URL=database)
    assert done.code == 2
    assert "--older-than is wrong: it should be a number of days" in done.err


async def test_prune_needs_an_age(image_jobs, database):
    done = await image_jobs("prune", DATABASE_URL=database)
    assert done.code == 2
    assert "--older-than" in done.err
