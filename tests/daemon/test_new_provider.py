"""A provider that nobody has heard of: one file (`tests/lantern.py`) and its line in the registry, and nothing else."""

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

from tests.daemons import Daemon, Supabase, daemon, supabase
from tests.postgres import wait_until
from tests.runs import event_names, insert_run, run_row

REGISTERED = (
    "from daemon.providers import PROVIDERS; PROVIDERS['lantern'] = 'tests.lantern'; "
    "from daemon.cli import main; main()"
)


@dataclass
class House:
    """A project, and a folder for the lantern's orders."""

    project: Supabase
    db: "asyncpg.Connection[asyncpg.Record]"
    folder: Path

    def daemon(self, folder: str | None = None) -> AbstractAsyncContextManager[Daemon]:
        """A daemon that knows the lantern."""
        return daemon(
            self.project,
            program=("-c", REGISTERED),
            LANTERN_FOLDER=str(self.folder) if folder is None else folder,
            IMAGE_JOBS_LEASE="2",
            IMAGE_JOBS_POLL_INTERVAL="0.2",
        )

    async def order(self, model: str = "magic") -> str:
        """Inserts a run; answers its id."""
        prompt = {"basePrompt": "orange"}
        return await insert_run(self.db, processor=f"lantern:{model}", workflow=uuid4(), prompt=prompt)

    async def until(self, run: str, wanted: str) -> asyncpg.Record:
        """Waits for a status; answers the row."""

        async def reached() -> bool:
            return (await run_row(self.db, run))["status"] == wanted

        await wait_until(reached, timeout=20)
        return await run_row(self.db, run)

    async def smoking(self, run: str) -> None:
        """Waits until the order has been asked about, and the run is parked."""

        async def parked() -> bool:
            row = await run_row(self.db, run)
            return row["progress"] == 40 and row["claimed_by"] is None

        await wait_until(parked, timeout=20)


@pytest.fixture
async def house(database: str, db: "asyncpg.Connection[asyncpg.Record]", tmp_path: Path) -> AsyncIterator[House]:
    async with supabase(database) as project:
        yield House(project, db, tmp_path)


async def test_an_order_at_a_new_provider_outlives_a_daemon_and_becomes_an_image(house: House) -> None:
    async with house.daemon() as first, house.daemon() as second:
        await first.started()
        await second.started()
        run = await house.order()
        await house.smoking(run)
        first.signal(signal.SIGKILL)
        await first.ended()
        (house.folder / "trimmed").touch()
        row = await house.until(run, "completed")

    assert row["provider_job_id"] == f"{run}.{row['ticket']}"
    assert (row["payload"]["model"], row["payload"]["cost"]) == ("magic", 0.01)
    async with httpx.AsyncClient() as client:
        image = Image.open(BytesIO((await client.get(row["payload"]["imageUrl"])).content))
    assert (image.size, image.getpixel((0, 0))) == ((64, 48), (255, 165, 0))
    assert [name for name in await event_names(house.db, run) if name == "submitted"] == ["submitted"]
    price = await house.db.fetchval("select price from image_models where provider = 'lantern' and model = 'magic'")
    assert float(price) == 0.01


async def test_an_order_at_a_new_provider_is_cancelled_with_its_run(house: House) -> None:
    async with house.daemon() as it:
        await it.started()
        run = await house.order()
        await house.smoking(run)
        row = await run_row(house.db, run)
        assert (house.folder / row["provider_job_id"]).exists()
        await house.db.execute("update runs set status = 'cancelled' where id = $1", run)
        await wait_until(lambda: not (house.folder / row["provider_job_id"]).exists(), timeout=20)

    assert (await run_row(house.db, run))["status"] == "cancelled"


async def test_a_model_that_a_new_provider_does_not_name_is_asked_for_with_a_warning(house: House) -> None:
    (house.folder / "trimmed").touch()
    async with house.daemon() as it:
        await it.started()
        run = await house.order("magick")
        await house.until(run, "completed")

    warning = await house.db.fetchval(
        "select payload from run_events where run_id = $1 and payload ->> 'event' = 'warning'", run
    )
    assert "Did you mean lantern:magic?" in warning["message"]


async def test_where_a_new_provider_is_not_set_up_its_runs_say_so(house: House) -> None:
    async with house.daemon(folder="") as it:
        await it.started()
        row = await house.until(await house.order(), "failed")

    assert row["payload"]["code"] == "no_key"
    assert "lantern" in row["payload"]["error"]
