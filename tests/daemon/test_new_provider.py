"""A new provider is one file: a daemon with `tests/support/one_file_provider.py` in `daemon/providers/` has it, and that is all."""

import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from uuid import uuid4

import asyncpg
import httpx
import pytest
from PIL import Image

from tests.support.daemons import Daemon, Supabase, daemon, supabase
from tests.support.postgres import ROOT, wait_until
from tests.support.runs import event_names, insert_run, run_row


@dataclass
class House:
    """A project, a copy of the daemon with the provider's file in it, and the folder of the provider's jobs."""

    project: Supabase
    db: "asyncpg.Connection[asyncpg.Record]"
    copy: Path
    jobs: Path

    def daemon(self, folder: str | None = None) -> AbstractAsyncContextManager[Daemon]:
        """Start a daemon from the copy."""
        return daemon(
            self.project,
            PYTHONPATH=str(self.copy),
            EXAMPLE_FOLDER=str(self.jobs) if folder is None else folder,
            IMAGE_JOBS_LEASE="2",
            IMAGE_JOBS_POLL_INTERVAL="0.2",
        )

    async def insert(self, model: str = "colour") -> str:
        """Insert a run; return its id."""
        prompt = {"basePrompt": "orange"}
        return await insert_run(self.db, processor=f"example:{model}", workflow=uuid4(), prompt=prompt)

    async def until(self, run: str, wanted: str) -> asyncpg.Record:
        """Wait for a status; return the row."""

        async def reached() -> bool:
            return (await run_row(self.db, run))["status"] == wanted

        await wait_until(reached, timeout=20)
        return await run_row(self.db, run)

    async def parked(self, run: str) -> asyncpg.Record:
        """Wait until the provider job has been checked, and the run is parked; return the row."""

        async def waits() -> bool:
            row = await run_row(self.db, run)
            return row["progress"] == 40 and row["claimed_by"] is None

        await wait_until(waits, timeout=20)
        return await run_row(self.db, run)


@pytest.fixture
async def house(database: str, db: "asyncpg.Connection[asyncpg.Record]", tmp_path: Path) -> AsyncIterator[House]:
    copy, jobs = tmp_path / "copy", tmp_path / "jobs"
    shutil.copytree(ROOT / "daemon", copy / "daemon", ignore=shutil.ignore_patterns("canvas", "node_modules"))
    shutil.copy(ROOT / "tests/support/one_file_provider.py", copy / "daemon/providers/example.py")
    (copy / "sql").symlink_to(ROOT / "sql")
    jobs.mkdir()
    async with supabase(database) as project:
        yield House(project, db, copy, jobs)


async def test_new_provider_survives_a_daemon_and_makes_an_image(house: House) -> None:
    async with house.daemon() as first, house.daemon() as second:
        await first.started()
        await second.started()
        run = await house.insert()
        await house.parked(run)
        first.signal(signal.SIGKILL)
        await first.ended()
        (house.jobs / "done").touch()
        row = await house.until(run, "completed")

    assert row["provider_job_id"] == f"{run}.{row['ticket']}"
    assert row["lane"] == "example"
    assert (row["payload"]["model"], row["payload"]["cost"]) == ("colour", 0.01)
    async with httpx.AsyncClient() as client:
        image = Image.open(BytesIO((await client.get(row["payload"]["imageUrl"])).content))
    assert (image.size, image.getpixel((0, 0))) == ((64, 48), (255, 165, 0))
    assert [name for name in await event_names(house.db, run) if name == "submitted"] == ["submitted"]
    price = await house.db.fetchval("select price from image_models where provider = 'example' and model = 'colour'")
    assert float(price) == 0.01


async def test_cancelling_a_run_cancels_the_job_of_a_new_provider(house: House) -> None:
    async with house.daemon() as it:
        await it.started()
        run = await house.insert()
        row = await house.parked(run)
        assert (house.jobs / row["provider_job_id"]).exists()
        await house.db.execute("update runs set status = 'cancelled' where id = $1", run)
        await wait_until(lambda: not (house.jobs / row["provider_job_id"]).exists(), timeout=20)

    assert (await run_row(house.db, run))["status"] == "cancelled"


async def test_unlisted_model_of_a_new_provider_has_a_warning(house: House) -> None:
    (house.jobs / "done").touch()
    async with house.daemon() as it:
        await it.started()
        run = await house.insert("color")
        await house.until(run, "completed")

    warning = await house.db.fetchval(
        "select payload from run_events where run_id = $1 and payload ->> 'event' = 'warning'", run
    )
    assert "Did you mean example:colour?" in warning["message"]


async def test_new_provider_without_its_setting_fails_runs_with_no_key(house: House) -> None:
    async with house.daemon(folder="") as it:
        await it.started()
        row = await house.until(await house.insert(), "failed")

    assert row["payload"]["code"] == "no_key"
    assert "example" in row["payload"]["error"]
