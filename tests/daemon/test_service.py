"""Runs of the demo provider from the row to the image, with whole daemons."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.daemon_harness import DaemonHarness, fetch, open_harness
from tests.support.daemons import Daemon
from tests.support.postgres import wait_until
from tests.support.runs import event_names, run_row


@pytest.fixture
async def harness(database: str) -> AsyncIterator[DaemonHarness]:
    async with open_harness(DaemonHarness, database) as harness:
        yield harness


async def test_pending_row_becomes_an_image_at_a_public_url(harness: DaemonHarness) -> None:
    async with harness.run_daemon() as process:
        await process.started()
        run = await harness.insert_run(prompt={"size": "256x192", "seed": 7})
        row = await harness.wait_for_status(run, "completed")
        payload = row["payload"]
        assert payload["imageUrl"].startswith(
            f"{harness.project.url}/storage/v1/object/public/images/{row['subject_id']}/{run}.png?v="
        )
        assert (payload["width"], payload["height"]) == (256, 192)
        assert payload["contentType"] == "image/png"
        assert payload["model"] == payload["requestedModel"] == "painter"
        assert payload["cost"] == 0
        assert set(payload["timings"]) >= {"queuedMs", "generateMs", "storeMs", "settleMs"}
        image = await fetch(payload["imageUrl"])
        assert image.headers["content-type"] == "image/png"
        assert len(image.content) == payload["bytes"]
        assert (await fetch(payload["thumbnailUrl"])).headers["content-type"] == "image/webp"
        node = await harness.node_data(run)
        assert node["status"] == "completed"
        assert node["imageUrl"] == payload["imageUrl"]
        folder = f"{row['subject_id']}/{run}"
        for shown in (payload, node):
            assert (shown["imagePath"], shown["thumbnailPath"]) == (f"{folder}.png", f"{folder}.thumb.webp")
        events = await harness.event_names(run)
        assert events[0] == "created"
        assert events[1] == "claimed"
        assert events[-1] == "completed"
        assert [name for name in events if name in {"generated", "stored"}] == ["generated", "stored"]


async def test_node_shows_progress_and_preview(harness: DaemonHarness) -> None:
    seen: list[int] = []
    previews: set[str] = set()

    async def completed() -> bool:
        node = await harness.node_data(run)
        if node.get("status") == "running":
            seen.append(node.get("progress", 0))
            if node.get("previewUrl"):
                previews.add(node["previewUrl"])
                assert f"/{node['previewPath']}?v=" in node["previewUrl"]
        return node.get("status") == "completed"

    async with harness.run_daemon() as process:
        await process.started()
        run = await harness.insert_run(prompt={"size": "512x512"}, demo={"slow": 5})
        await wait_until(completed, timeout=40)
    assert seen == sorted(seen)
    assert len({percent for percent in seen if 0 < percent < 100}) >= 2
    assert previews
    assert "previewUrl" not in await harness.node_data(run)
    assert "progress" in await event_names(harness.db, run)


async def test_third_failure_is_final_with_reason_and_hint(harness: DaemonHarness) -> None:
    async with harness.run_daemon() as process:
        await process.started()
        run = await harness.insert_run(demo={"fail": "The brush broke."})

        async def failed() -> bool:
            await harness.db.execute(
                "update runs set due_at = now() where id = $1 and status = 'pending' and due_at > now()", run
            )
            return (await run_row(harness.db, run))["status"] == "failed"

        await wait_until(failed, timeout=30)
        row = await run_row(harness.db, run)
        assert "The brush broke." in row["payload"]["error"]
        assert row["payload"]["hint"]
        assert row["attempt"] == 3
        events = await harness.event_names(run)
        assert events.count("claimed") == 3
        assert events.count("retry") == 2
        assert events.count("failed") == 1


async def test_passing_failure_ends_with_an_image(harness: DaemonHarness) -> None:
    async with harness.run_daemon() as process:
        await process.started()
        run = await harness.insert_run(prompt={"size": "128x128"}, demo={"fail": "The brush broke.", "times": 1})
        row = await harness.wait_for_status(run, "completed")
        assert row["attempt"] == 2


async def test_refusal_is_final_at_once(harness: DaemonHarness) -> None:
    async with harness.run_daemon() as process:
        await process.started()
        run = await harness.insert_run(demo={"refuse": "violence"})
        row = await harness.wait_for_status(run, "failed")
        assert row["attempt"] == 1
        assert row["payload"]["code"] == "content_policy"


async def test_throttled_run_waits_and_keeps_its_attempt(harness: DaemonHarness) -> None:
    async with harness.run_daemon() as process:
        await process.started()
        run = await harness.insert_run(prompt={"size": "128x128"}, demo={"throttle": 1, "times": 1})
        row = await harness.wait_for_status(run, "completed")
        assert row["attempt"] == 1
        assert "retry" in await harness.event_names(run)


async def test_submitted_run_is_parked_and_completed_later(harness: DaemonHarness) -> None:
    async with harness.run_daemon(IMAGE_JOBS_CONCURRENCY="1", IMAGE_JOBS_POLL_INTERVAL="0.5") as process:
        await process.started()
        run = await harness.insert_run(prompt={"size": "128x128"}, demo={"submit": 2})
        await harness.wait_until_parked(run)
        # It holds no slot: with a single one, another run overtakes it.
        other = await harness.insert_run(prompt={"size": "128x128"}, demo={"noop": True})
        await harness.wait_for_status(other, "completed")
        row = await harness.wait_for_status(run, "completed")
        assert row["attempt"] == 1
        assert "parked" in await harness.event_names(run)


async def test_endless_parked_run_fails_with_an_incident(harness: DaemonHarness) -> None:
    async with harness.run_daemon(IMAGE_JOBS_POLL_INTERVAL="0.2", IMAGE_JOBS_POLL_TIMEOUT="1") as process:
        await process.started()
        run = await harness.insert_run(demo={"submit": 3600})
        row = await harness.wait_for_status(run, "failed")
        assert row["payload"]["error"] == "Polling timeout exceeded"
        (event,) = await harness.events(run, "incident")
        assert row["provider_job_id"] is not None
        lines = await wait_until(lambda: process.logged("run.incident"))
        place = {"workflow": str(row["subject_id"]), "node": row["metadata"]["nodeId"]}
        wanted = {"level": "warning", "run_id": run, "error": event["message"], **place}
        assert [{name: line[name] for name in wanted} for line in lines] == [wanted]


async def test_cancelling_frees_the_slot_at_once(harness: DaemonHarness) -> None:
    async with harness.run_daemon(IMAGE_JOBS_CONCURRENCY="1") as process:
        await process.started()
        run = await harness.insert_run(demo={"hang": True})
        await harness.wait_for_status(run, "running")
        await harness.cancel(run)
        # The only slot is free again.
        other = await harness.insert_run(demo={"noop": True})
        await harness.wait_for_status(other, "completed", timeout=10)
        assert (await run_row(harness.db, run))["status"] == "cancelled"


async def test_run_requeued_while_running_completes_once(harness: DaemonHarness) -> None:
    async with harness.run_daemon() as process:
        await process.started()
        run = await harness.insert_run(prompt={"size": "128x128"}, demo={"slow": 2})
        for _ in range(3):
            await harness.wait_for_status(run, "running")
            await harness.requeue(run)
        await harness.wait_for_status(run, "completed")
        assert (await harness.event_names(run)).count("completed") == 1


async def test_missing_key_fails_the_run_and_is_named(harness: DaemonHarness) -> None:
    async with harness.run_daemon(APP_URL="https://app.example.com/canvas") as process:
        await process.started()
        run = await harness.insert_run("openai:gpt-image-2")
        row = await harness.wait_for_status(run, "failed")
        assert row["payload"]["error"] == "No daemon here can use openai: OPENAI_API_KEY is not set."
        assert row["payload"]["code"] == "no_key"
        await wait_until(lambda: process.logged("run.finished"))
        assert process.logged("run.finished")[0]["link"] == f"https://app.example.com/canvas#{row['subject_id']}"
        unknown = await harness.insert_run("nobody:nothing")
        assert (await harness.wait_for_status(unknown, "failed"))["payload"]["code"] == "unknown_provider"


async def test_daemons_share_runs_without_doing_one_twice(harness: DaemonHarness) -> None:
    async with (
        harness.run_daemon(IMAGE_JOBS_CONCURRENCY="4") as one,
        harness.run_daemon(IMAGE_JOBS_CONCURRENCY="4") as two,
    ):
        await one.started()
        await two.started()
        ids = await harness.insert_runs(60, demo={"noop": True})

        async def done() -> bool:
            return await harness.db.fetchval("select count(*) from runs where status = 'completed'") == len(ids)

        await wait_until(done, timeout=40)
    by = await harness.db.fetch(
        """select payload -> 'data' ->> 'daemon' as daemon, count(*) as runs from run_events
        where payload ->> 'event' = 'claimed' group by 1"""
    )
    assert sum(row["runs"] for row in by) == 60
    assert len(by) == 2


@pytest.mark.timeout(240)
async def test_thousand_runs_complete_within_bounded_memory(harness: DaemonHarness) -> None:
    async with harness.run_daemon(IMAGE_JOBS_CONCURRENCY="32") as process:
        await process.started()
        ids = await harness.insert_runs(1000, demo={"noop": True})

        async def done() -> bool:
            return await harness.db.fetchval(
                "select count(*) from runs where status in ('completed', 'failed')"
            ) == len(ids)

        await wait_until(done, timeout=200)
        assert peak_memory(process) < 500
    assert await harness.db.fetchval("select count(*) from runs where status = 'completed'") == 1000
    assert await harness.db.fetchval("select count(*) from run_events where payload ->> 'event' = 'completed'") == 1000
    assert await harness.db.fetchval("select count(*) from storage.objects where name like '%.png'") == 1000


def peak_memory(process: Daemon) -> int:
    """Peak resident memory in MB."""
    with Path(f"/proc/{process.process.pid}/status").open() as lines:
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


async def test_work_starts_within_two_seconds_of_the_insert(harness: DaemonHarness) -> None:
    async with harness.run_daemon() as process:
        await process.started()
        waits: list[float] = []
        for _ in range(3):  # a machine of CI may stand still during one
            run = await harness.insert_run(demo={"noop": True})
            row = await harness.wait_for_status(run, "completed")
            waits.append((row["started_at"] - row["created_at"]).total_seconds())
        assert min(waits) < 2


async def test_wrong_storage_key_costs_no_run(harness: DaemonHarness) -> None:
    async with harness.run_daemon(SUPABASE_SERVICE_ROLE_KEY=harness.project.keys.anon_key) as process:
        await process.started()
        (closed,) = await wait_until(lambda: process.logged("storage.closed"))
        assert "SUPABASE_SERVICE_ROLE_KEY" in closed["cure"]
        assert harness.project.keys.anon_key not in str(closed)
        run = await harness.insert_run(demo={"noop": True})
    assert (await run_row(harness.db, run))["status"] == "pending"
    async with harness.run_daemon():
        await harness.wait_for_status(run, "completed")


async def test_stored_image_is_adopted_after_a_lost_settlement(harness: DaemonHarness) -> None:
    async with harness.run_daemon() as process:
        await process.started()
        run = await harness.insert_run(demo={"noop": True})
        done = await harness.wait_for_status(run, "completed")
        ticket = done["ticket"]
        await harness.undo_settlement(run)
        await harness.wait_for_status(run, "completed")
        assert (await run_row(harness.db, run))["ticket"] == ticket
        events = await harness.event_names(run)
        assert "adopted" in events
        assert events.count("generated") == 1
