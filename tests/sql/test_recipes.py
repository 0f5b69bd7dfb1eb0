"""The recipes of sql/README.md, executed as they are written there."""

import re

import asyncpg
import pytest

from tests.support.postgres import ROOT, signed_in
from tests.support.protocol import Daemon, Db, move_clock, new_daemon, run_in
from tests.support.runs import WORKFLOW, insert_run, insert_runs, run_row

README = (ROOT / "sql/README.md").read_text()
RECIPES = re.findall(r"^(\S[^\n]*):\n\n```sql\n(.*?)^```\n", README, re.MULTILINE | re.DOTALL)
BLOCKS = re.findall(r"^```sql\n(.*?)^```\n", README, re.MULTILINE | re.DOTALL)


def recipe(words: str) -> str:
    """Find the one recipe whose title begins with these words."""
    (sql,) = [sql for title, sql in RECIPES if title.startswith(words)]
    return sql


async def statuses(db: Db) -> dict[str, int]:
    rows = await db.fetch("select status, count(*) from runs group by status")
    return {row["status"]: row["count"] for row in rows}


@pytest.mark.parametrize("role", ["postgres", "service_role"])
async def test_every_recipe_runs_for_every_operator(db: Db, daemon: Daemon, role: str) -> None:
    for state in ("completed", "failed", "running"):
        await run_in(db, daemon, state)
    assert len(BLOCKS) > 10
    for sql in BLOCKS:
        if role == "service_role" and "grant execute" in sql:
            continue  # the owner's alone
        async with signed_in(db, role="service_role") if role == "service_role" else db.transaction():
            await db.execute(sql)


async def test_requeue_a_hundred_failed_runs(db: Db, daemon: Daemon) -> None:
    await insert_runs(db, 120)
    claims = await daemon.claim(120)
    failed = {"outcome": "failed", "payload": {"error": "No.", "code": "refused"}}
    await daemon.sync(settlements=[{"id": claim["id"], "claim": claim["claim"], **failed} for claim in claims])
    await db.execute(recipe("Requeue up to 100 failed runs"))
    assert await statuses(db) == {"pending": 100, "failed": 20}
    assert len(await daemon.claim(200)) == 100


async def test_cancel_everything_that_is_running(db: Db, daemon: Daemon) -> None:
    await insert_runs(db, 5)
    claims = await daemon.claim(3)
    await db.execute(recipe("Cancel everything that is running"))
    assert await statuses(db) == {"cancelled": 3, "pending": 2}
    assert await daemon.complete(claims[0]) == "lost"


async def test_cancel_pending_runs_of_one_workflow(db: Db, daemon: Daemon) -> None:
    await insert_runs(db, 3)
    await db.execute("insert into image_jobs.workflows (id) values (gen_random_uuid())")
    other = await insert_run(db, workflow=await db.fetchval("select gen_random_uuid()"))
    await db.execute(recipe("Cancel what waits in one workflow"))
    assert (await daemon.claim_one())["id"] == other


async def named(db: Db, name: str) -> str:
    await db.execute(
        "insert into runs (id, kind, subject_id, status, processor, metadata) "
        "values ($1, 'image_gen', $2, 'pending', 'demo:painter', '{\"promptSpec\": {\"basePrompt\": \"a fox\"}}')",
        name,
        WORKFLOW,
    )
    return name


async def test_run_one_now(db: Db, daemon: Daemon) -> None:
    run = await named(db, "job_1")
    await db.execute("update runs set due_at = now() + interval '1 day' where id = $1", run)
    await db.execute(recipe("Run one now"))
    assert (await daemon.claim_one())["id"] == run


async def test_before_all_others_and_not_before_tonight(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    first, tonight = await named(db, "job_1"), await named(db, "job_2")
    await db.execute(recipe("Before all others"))
    assert (await daemon.claim())[0]["id"] == first
    assert len(await daemon.claim(10)) == 1
    await move_clock(db, "25 h")
    assert (await daemon.claim_one())["id"] == tonight


async def test_give_a_run_more_attempts(db: Db) -> None:
    run = await named(db, "job_1")
    await db.execute(recipe("Give a run more attempts"))
    assert (await run_row(db, run))["max_attempts"] == 5


async def test_pause_a_provider_and_open_it_again(db: Db) -> None:
    daemon = await new_daemon(db, "openai")
    await insert_run(db, processor="openai:gpt-image-2")
    await db.execute(recipe("Pause a provider"))
    assert await daemon.claim(10) == []
    blocks = iter(BLOCKS)
    assert recipe("Pause a provider") in blocks
    await db.execute(next(blocks))
    assert len(await daemon.claim(10)) == 1


async def test_open_what_is_blocked(db: Db) -> None:
    daemon = await new_daemon(db, "openai")
    await insert_run(db, processor="openai:gpt-image-2")
    await db.execute("select image_jobs.block_provider('openai', null, '1 h', 'Out of credit.')")
    assert await daemon.claim(10) == []
    await db.execute(recipe("See what a 429"))
    assert len(await daemon.claim(10)) == 1


async def test_change_a_limit(db: Db) -> None:
    daemon = await new_daemon(db, "openai", "google")
    await insert_runs(db, 150, processor="google:imagen")
    await insert_runs(db, 10, processor="openai:gpt-image-2")
    await db.execute(recipe("Change a limit"))
    claimed = [run["processor"] for run in await daemon.claim(300)]
    assert claimed.count("google:imagen") == 150
    assert claimed.count("openai:gpt-image-2") == 5
    await insert_runs(db, 30, processor="openai:gpt-image-1")
    assert [run["processor"] for run in await daemon.claim(300)] == ["openai:gpt-image-1"] * 15


async def test_more_waiting_leaves_the_budgets_of_a_user(db: Db) -> None:
    await db.execute(recipe("Give each user 50 images"))
    await db.execute(recipe("Let one user have more waiting"))
    each, user = await db.fetch(
        """select max_waiting, images_per_day, usd_per_day, usd_per_month from image_jobs.usage_limits
        where applies_to in ('each user', 'user') order by applies_to"""
    )
    assert user["max_waiting"] > each["max_waiting"]
    assert tuple(user)[1:] == tuple(each)[1:] == (50, 2, None)


async def test_the_views_show_the_state_of_the_queue(db: Db, daemon: Daemon) -> None:
    await insert_runs(db, 4)
    claimed, *_ = await daemon.claim(2)
    stored = {"kind": "log", "payload": {"event": "stored", "message": "Stored.", "data": {"uploadTries": 2}}}
    payload = {"imageUrl": "https://example.com/i.png", "model": "painter-2", "cost": 0.04}
    await daemon.settle(claimed, "completed", payload=payload, events=[stored])
    for statement in recipe("See how it goes").strip().split(";\n"):
        assert (await db.fetch(statement) == []) == ("storage_violations" in statement)
    (queue,) = await db.fetch("select * from image_jobs.queue_stats")
    assert (queue["provider"], queue["pending"], queue["running"], queue["completed"]) == ("demo", 2, 1, 1)
    (costs,) = await db.fetch("select * from image_jobs.run_costs")
    assert (costs["provider"], costs["model"], costs["images"], float(costs["cost"])) == ("demo", "painter", 1, 0.04)
    uploads = await db.fetchrow("select * from image_jobs.storage_stats")
    assert (uploads["tried"], uploads["failed"], float(uploads["success_rate"])) == (2, 1, 0.5)
    stages = await db.fetch("select provider, model, stage, p50 from image_jobs.run_timings")
    timings = (await run_row(db, claimed["id"]))["payload"]["timings"]
    assert {row["stage"]: row["p50"] for row in stages} == timings
    assert {(row["provider"], row["model"]) for row in stages} == {("demo", "painter-2")}
    assert await db.fetchval("select state from image_jobs.daemon_status") == "alive"


async def test_events_of_a_run_and_common_failures(db: Db, daemon: Daemon) -> None:
    run = await named(db, "job_1")
    await daemon.fail(await daemon.claim_one(), error="It went wrong.")
    trail, failures = recipe("What happened to one run").strip().removesuffix(";").split(";\n")
    assert [row["event"] for row in await db.fetch(trail)] == ["created", "claimed", "failed"]
    (failure,) = await db.fetch(failures)
    assert (failure["code"], failure["count"], failure["example"]) == ("refused", 1, run)
    assert failure["sentence"] == "It went wrong."
    assert run == "job_1"


async def test_let_a_user_see_a_workflow(db: Db) -> None:
    run = await insert_run(db)
    member = "aaaaaaaa-0000-4000-8000-00000000000a"
    with pytest.raises(asyncpg.PostgresError):
        async with signed_in(db, member):
            await db.fetchval("select cancel_run($1)", run)
    await db.execute(recipe("Let a user see and use a workflow"))
    async with signed_in(db, member):
        assert (await db.fetchval("select cancel_run($1)", run))["status"] == "cancelled"


async def test_forget_runs_that_ended_long_ago(db: Db, daemon: Daemon) -> None:
    old = await run_in(db, daemon, "completed")
    young = await run_in(db, daemon, "completed")
    await db.execute("update runs set finished_at = now() - interval '91 days' where id = $1", old)
    await db.execute(recipe("Forget runs"))
    assert {row["id"] for row in await db.fetch("select id from runs")} == {young}
    assert {row["run_id"] for row in await db.fetch("select run_id from run_events")} == {young}


async def test_a_paused_provider_is_shown_even_without_runs(db):
    await db.execute("update image_jobs.provider_limits set paused = true where provider = 'google'")
    row = await db.fetchrow("select provider, pending, paused from image_jobs.queue_stats")
    assert tuple(row) == ("google", 0, True)
