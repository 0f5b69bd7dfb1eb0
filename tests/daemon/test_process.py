"""A daemon process as operators and deployments see it: signals, settings, metrics, an install without `daemon/dev`."""

import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.daemon_harness import DaemonHarness, open_harness
from tests.support.postgres import ROOT, wait_until
from tests.support.runs import run_row


@pytest.fixture
async def harness(database: str) -> AsyncIterator[DaemonHarness]:
    async with open_harness(DaemonHarness, database) as harness:
        yield harness


async def test_first_sigterm_drains_without_new_claims(harness: DaemonHarness) -> None:
    async with harness.run_daemon() as process:
        await process.started()
        run = await harness.insert_run(prompt={"size": "128x128"}, demo={"slow": 2})
        await harness.wait_for_status(run, "running")
        process.signal(signal.SIGTERM)
        await wait_until(lambda: process.logged("daemon.draining"))
        late = await harness.insert_run()
        assert await process.ended() == 0
        assert (await run_row(harness.db, run))["status"] == "completed"
        assert (await run_row(harness.db, late))["status"] == "pending"
        assert await harness.db.fetchval("select state from image_jobs.daemon_status") == "stopped"


async def test_second_signal_releases_runs_and_exits(harness: DaemonHarness) -> None:
    async with harness.run_daemon() as process:
        await process.started()
        run = await harness.insert_run(demo={"hang": True})
        await harness.wait_for_status(run, "running")
        process.signal(signal.SIGTERM)
        await wait_until(lambda: process.logged("daemon.draining"))
        process.signal(signal.SIGTERM)
        assert await process.ended(timeout=10) == 0
    row = await run_row(harness.db, run)
    assert row["status"] == "pending"
    assert row["claimed_by"] is None


async def test_missing_setting_is_named_at_start(harness: DaemonHarness) -> None:
    async with harness.run_daemon(SUPABASE_SERVICE_ROLE_KEY="") as process:
        assert await process.ended() == 2
    assert "SUPABASE_SERVICE_ROLE_KEY" in "\n".join(process.raw)
    assert "Traceback" not in "\n".join(process.raw)


async def test_daemon_runs_without_the_dev_package(harness: DaemonHarness, tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns("dev", "__pycache__")
    shutil.copytree(ROOT / "daemon", tmp_path / "daemon", ignore=left_out)
    shutil.copytree(ROOT / "sql", tmp_path / "sql")
    assert not (tmp_path / "daemon/dev").exists()
    async with harness.run_daemon(PYTHONPATH=str(tmp_path)) as process:
        await process.started()
        row = await harness.wait_for_status(await harness.insert_run(demo={"noop": True}), "completed")
    assert row["payload"]["imageUrl"]
