"""A daemon process from start to end: what a user, an operator and a deployment see of it."""

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import httpx
import pytest

from tests.daemons import Daemon, Supabase, daemon, supabase
from tests.postgres import ROOT, free_port, wait_until
from tests.runs import WORKFLOW, event_names, insert_run, insert_runs, run_row

Db = asyncpg.Connection


@pytest.fixture
async def project(database: str) -> AsyncIterator[Supabase]:
    async with supabase(database) as it:
        yield it


async def status(db: Db, run: str) -> str:
    return (await run_row(db, run))["status"]


async def until(db: Db, run: str, wanted: str, timeout: float = 30) -> asyncpg.Record:
    """Waits for a status; says what happened instead if it does not come."""

    async def reached() -> bool:
        return await status(db, run) == wanted

    try:
        await wait_until(reached, timeout=timeout)
    except (TimeoutError, AssertionError):
        row = await run_row(db, run)
        pytest.fail(f"{run} is {row['status']}, not {wanted}: {row['payload']} {await event_names(db, run)}")
    return await run_row(db, run)


async def test_a_pending_row_becomes_an_image_at_a_public_url(project: Supabase, db: Db) -> None:
    await db.execute(
        "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ('n1', $1, 'image_generation', '{}')",
        WORKFLOW,
    )
    async with daemon(project) as it:
        await it.started()
        run = await insert_run(db, nodeId="n1", prompt={"size": "256x192", "seed": 7})
        row = await until(db, run, "completed")
        payload = row["payload"]
        assert payload["imageUrl"].startswith(f"{project.url}/storage/v1/object/public/images/{WORKFLOW}/{run}.png?v=")
        assert (payload["width"], payload["height"]) == (256, 192)
        assert payload["contentType"] == "image/png"
        assert payload["model"] == payload["requestedModel"] == "painter"
        assert payload["cost"] == 0
        assert set(payload["timings"]) >= {"queuedMs", "generateMs", "storeMs", "settleMs"}
        async with httpx.AsyncClient() as client:
            image = await client.get(payload["imageUrl"])
            assert image.status_code == 200
            assert image.headers["content-type"] == "image/png"
            assert len(image.content) == payload["bytes"]
            thumbnail = await client.get(payload["thumbnailUrl"])
            assert thumbnail.headers["content-type"] == "image/webp"
        node = await db.fetchval("select node_data from workflow_nodes where id = 'n1'")
        assert node["status"] == "completed"
        assert node["imageUrl"] == payload["imageUrl"]
        events = await event_names(db, run)
        assert events[0] == "created"
        assert events[1] == "claimed"
        assert events[-1] == "completed"
        assert [name for name in events if name in {"generated", "stored"}] == ["generated", "stored"]


async def test_the_node_shows_progress_and_a_preview_while_the_image_forms(project: Supabase, db: Db) -> None:
    await db.execute(
        "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ('n1', $1, 'image_generation', '{}')",
        WORKFLOW,
    )
    seen: list[int] = []
    previews: set[str] = set()

    async def looked() -> bool:
        node = await db.fetchval("select node_data from workflow_nodes where id = 'n1'")
        if node.get("status") == "running":
            seen.append(node.get("progress", 0))
            if node.get("previewUrl"):
                previews.add(node["previewUrl"])
        return node.get("status") == "completed"

    async with daemon(project) as it:
        await it.started()
        run = await insert_run(db, nodeId="n1", prompt={"size": "512x512"}, demo={"slow": 5})
        await wait_until(looked, timeout=40)
    assert seen == sorted(seen)
    assert len({percent for percent in seen if 0 < percent < 100}) >= 2
    assert previews
    assert "previewUrl" not in await db.fetchval("select node_data from workflow_nodes where id = 'n1'")
    assert "progress" in await event_names(db, run)


async def test_a_failure_is_retried_and_the_third_one_is_final_with_a_reason_and_a_hint(
    project: Supabase, db: Db
) -> None:
    async with daemon(project) as it:
        await it.started()
        run = await insert_run(db, demo={"fail": "The brush broke."})

        async def hurry() -> bool:
            await db.execute(
                "update runs set due_at = now() where id = $1 and status = 'pending' and due_at > now()", run
            )
            return await status(db, run) == "failed"

        await wait_until(hurry, timeout=30)
        row = await run_row(db, run)
        assert "The brush broke." in row["payload"]["error"]
        assert row["payload"]["hint"]
        assert row["attempt"] == 3
        events = await event_names(db, run)
        assert events.count("claimed") == 3
        assert events.count("retry") == 2
        assert events.count("failed") == 1


async def test_a_failure_that_passes_ends_with_an_image(project: Supabase, db: Db) -> None:
    async with daemon(project) as it:
        await it.started()
        run = await insert_run(db, prompt={"size": "128x128"}, demo={"fail": "The brush broke.", "times": 1})
        row = await until(db, run, "completed")
        assert row["attempt"] == 2


async def test_a_refusal_is_final_at_once(project: Supabase, db: Db) -> None:
    async with daemon(project) as it:
        await it.started()
        run = await insert_run(db, demo={"refuse": "violence"})
        row = await until(db, run, "failed")
        assert row["attempt"] == 1
        assert row["payload"]["code"] == "content_policy"


async def test_a_throttled_run_waits_and_gets_its_attempt_back(project: Supabase, db: Db) -> None:
    async with daemon(project) as it:
        await it.started()
        run = await insert_run(db, prompt={"size": "128x128"}, demo={"throttle": 1, "times": 1})
        row = await until(db, run, "completed")
        assert row["attempt"] == 1
        assert "retry" in await event_names(db, run)


async def test_a_submitted_run_is_parked_and_finished_later(project: Supabase, db: Db) -> None:
    async with daemon(project, IMAGE_JOBS_CONCURRENCY="1", IMAGE_JOBS_POLL_INTERVAL="0.5") as it:
        await it.started()
        run = await insert_run(db, prompt={"size": "128x128"}, demo={"submit": 2})

        async def parked() -> bool:
            row = await run_row(db, run)
            return row["status"] == "running" and row["claimed_by"] is None and row["provider_job_id"] is not None

        await wait_until(parked)
        # It holds no slot: with a single one, another run overtakes it.
        other = await insert_run(db, prompt={"size": "128x128"}, demo={"noop": True})
        await until(db, other, "completed")
        row = await until(db, run, "completed")
        assert row["attempt"] == 1
        assert "parked" in await event_names(db, run)


async def test_a_parked_run_that_never_ends_is_given_up_with_an_incident(project: Supabase, db: Db) -> None:
    async with daemon(project, IMAGE_JOBS_POLL_INTERVAL="0.2", IMAGE_JOBS_POLL_TIMEOUT="1") as it:
        await it.started()
        run = await insert_run(db, demo={"submit": 3600})
        row = await until(db, run, "failed")
        assert row["payload"]["error"] == "Polling timeout exceeded"
        assert "incident" in await event_names(db, run)
        assert row["provider_job_id"] is not None


async def test_cancelling_stops_the_work_at_once(project: Supabase, db: Db) -> None:
    async with daemon(project, IMAGE_JOBS_CONCURRENCY="1") as it:
        await it.started()
        run = await insert_run(db, demo={"hang": True})
        await until(db, run, "running")
        await db.execute("update runs set status = 'cancelled' where id = $1", run)
        # The only slot is free again.
        other = await insert_run(db, demo={"noop": True})
        await until(db, other, "completed", timeout=10)
        assert await status(db, run) == "cancelled"


async def test_a_run_that_is_requeued_while_it_is_worked_on_ends_once(project: Supabase, db: Db) -> None:
    async with daemon(project) as it:
        await it.started()
        run = await insert_run(db, prompt={"size": "128x128"}, demo={"slow": 2})
        for _ in range(3):
            await until(db, run, "running")
            await db.execute("update runs set status = 'pending' where id = $1", run)
        await until(db, run, "completed")
        assert (await event_names(db, run)).count("completed") == 1


async def test_a_run_of_a_provider_without_a_key_fails_and_says_which_key(project: Supabase, db: Db) -> None:
    async with daemon(project, APP_URL="https://app.example.com/canvas") as it:
        await it.started()
        run = await insert_run(db, processor="openai:gpt-image-2")
        row = await until(db, run, "failed")
        assert row["payload"]["error"] == "No daemon here can use openai: OPENAI_API_KEY is not set."
        assert row["payload"]["code"] == "no_key"
        await wait_until(lambda: it.logged("run.finished"))
        assert it.logged("run.finished")[0]["link"] == f"https://app.example.com/canvas#{row['subject_id']}"
        nobody = await insert_run(db, processor="nobody:nothing")
        assert (await until(db, nobody, "failed"))["payload"]["code"] == "unknown_provider"


async def test_the_first_sigterm_lets_runs_finish_and_claims_no_more(project: Supabase, db: Db) -> None:
    async with daemon(project) as it:
        await it.started()
        run = await insert_run(db, prompt={"size": "128x128"}, demo={"slow": 2})
        await until(db, run, "running")
        it.signal(signal.SIGTERM)
        await wait_until(lambda: it.logged("daemon.draining"))
        late = await insert_run(db)
        assert await it.ended() == 0
        assert await status(db, run) == "completed"
        assert await status(db, late) == "pending"
        assert await db.fetchval("select state from daemons") == "stopped"


async def test_the_second_signal_hands_runs_back_and_leaves(project: Supabase, db: Db) -> None:
    async with daemon(project) as it:
        await it.started()
        run = await insert_run(db, demo={"hang": True})
        await until(db, run, "running")
        it.signal(signal.SIGTERM)
        await wait_until(lambda: it.logged("daemon.draining"))
        it.signal(signal.SIGTERM)
        assert await it.ended(timeout=10) == 0
    row = await run_row(db, run)
    assert row["status"] == "pending"
    assert row["claimed_by"] is None


async def test_several_daemons_share_the_work_and_no_run_is_done_twice(project: Supabase, db: Db) -> None:
    async with daemon(project, IMAGE_JOBS_CONCURRENCY="4") as one, daemon(project, IMAGE_JOBS_CONCURRENCY="4") as two:
        await one.started()
        await two.started()
        ids = await insert_runs(db, 60, demo={"noop": True})

        async def done() -> bool:
            return await db.fetchval("select count(*) from runs where status = 'completed'") == len(ids)

        await wait_until(done, timeout=40)
    by = await db.fetch(
        """select payload -> 'data' ->> 'daemon' as daemon, count(*) as runs from run_events
        where payload ->> 'event' = 'claimed' group by 1"""
    )
    assert sum(row["runs"] for row in by) == 60
    assert len(by) == 2


@pytest.mark.timeout(240)
async def test_a_thousand_runs_in_one_statement_all_finish_within_bounded_memory(project: Supabase, db: Db) -> None:
    async with daemon(project, IMAGE_JOBS_CONCURRENCY="32") as it:
        await it.started()
        ids = await insert_runs(db, 1000, demo={"noop": True})

        async def done() -> bool:
            return await db.fetchval("select count(*) from runs where status in ('completed', 'failed')") == len(ids)

        await wait_until(done, timeout=200)
        assert peak_memory(it) < 500
    assert await db.fetchval("select count(*) from runs where status = 'completed'") == 1000
    assert await db.fetchval("select count(*) from run_events where payload ->> 'event' = 'completed'") == 1000
    assert await db.fetchval("select count(*) from storage.objects where name like '%.png'") == 1000


def peak_memory(it: Daemon) -> int:
    """Peak resident memory in MB."""
    with Path(f"/proc/{it.process.pid}/status").open() as lines:
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


async def test_work_starts_within_two_seconds_of_the_insert(project: Supabase, db: Db) -> None:
    async with daemon(project) as it:
        await it.started()
        run = await insert_run(db, demo={"noop": True})
        row = await until(db, run, "completed")
        assert (row["started_at"] - row["created_at"]).total_seconds() < 2


async def test_a_daemon_without_its_settings_says_which_and_how(project: Supabase) -> None:
    async with daemon(project, SUPABASE_SERVICE_ROLE_KEY="") as it:
        assert await it.ended() == 2
    assert "SUPABASE_SERVICE_ROLE_KEY" in "\n".join(it.raw)
    assert "Traceback" not in "\n".join(it.raw)


async def test_a_wrong_storage_key_fails_the_run_with_a_sentence_and_a_cure(project: Supabase, db: Db) -> None:
    async with daemon(project, SUPABASE_SERVICE_ROLE_KEY=project.keys.anon_key) as it:
        await it.started()
        run = await insert_run(db, demo={"noop": True})
        row = await until(db, run, "failed")
        assert row["payload"]["code"].startswith("storage")
        assert "SUPABASE_SERVICE_ROLE_KEY" in row["payload"]["hint"]
        assert project.keys.anon_key not in str(dict(row))


async def test_what_a_killed_daemon_had_stored_already_is_used_and_not_made_again(project: Supabase, db: Db) -> None:
    async with daemon(project) as it:
        await it.started()
        run = await insert_run(db, demo={"noop": True})
        done = await until(db, run, "completed")
        ticket = done["ticket"]
        # As if the settlement had not arrived: the row goes back to where a take-over would put it.
        async with db.transaction():
            await db.execute("select set_config('image_jobs.hand', 'daemon', true)")
            await db.execute(
                """update runs set status = 'pending', payload = null, finished_at = null, due_at = now(), rank = 0
                where id = $1""",
                run,
            )
        await until(db, run, "completed")
        assert (await run_row(db, run))["ticket"] == ticket
        events = await event_names(db, run)
        assert "adopted" in events
        assert events.count("generated") == 1
        await asyncio.sleep(0)


async def test_metrics_are_served_where_a_port_is_set(project: Supabase, db: Db) -> None:
    port = free_port()
    async with daemon(project, IMAGE_JOBS_METRICS_PORT=str(port)) as it:
        await it.started()
        await until(db, await insert_run(db, demo={"noop": True}), "completed")
        async with httpx.AsyncClient() as client:

            async def counted() -> bool:
                text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
                return 'image_jobs_runs_finished_total{outcome="completed",provider="demo"} 1.0' in text

            await wait_until(counted)


async def test_a_production_install_without_the_dev_parts_makes_images_all_the_same(
    project: Supabase, db: Db, tmp_path: Path
) -> None:
    left_out = shutil.ignore_patterns("dev", "__pycache__")
    shutil.copytree(ROOT / "daemon", tmp_path / "daemon", ignore=left_out)
    shutil.copytree(ROOT / "sql", tmp_path / "sql")
    assert not (tmp_path / "daemon/dev").exists()
    async with daemon(project, PYTHONPATH=str(tmp_path)) as it:
        await it.started()
        row = await until(db, await insert_run(db, demo={"noop": True}), "completed")
    assert row["payload"]["imageUrl"]
