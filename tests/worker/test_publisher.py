"""Storing what a provider has made: a worker in this process, a real database and storage, and a provider of the tests."""

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest

from daemon.fetch import Fetcher
from daemon.heartbeat import Heartbeat
from daemon.metrics import Metrics
from daemon.providers import Generated, Model, Reporter, Request
from daemon.publisher import Publisher
from daemon.queue import Queue
from daemon.storage import Storage
from daemon.turns import Turns
from daemon.worker import Policy, Worker
from tests.daemons import supabase
from tests.fakes.server import picture
from tests.faults.world import Gate
from tests.postgres import wait_until
from tests.runs import insert_run, register, run_row

Db = asyncpg.Connection
Draw = Callable[[Request, Reporter], Awaitable[Generated]]
POLICY = Policy(
    run_timeout=timedelta(minutes=1),
    poll_interval=timedelta(seconds=1),
    poll_timeout=timedelta(minutes=1),
    webhook_wait=timedelta(minutes=1),
    webhooks=frozenset(),
    strict_models=False,
    max_image_bytes=1_000_000,
)
STORAGE_AWAY = timedelta(seconds=0.2)
QUICK = timedelta(milliseconds=1)


async def red_fox(request: Request, _: Reporter) -> Generated:
    """Draws as it should."""
    path = request.workdir / "fox"
    path.write_bytes(picture())
    return Generated(path, 0.05)


@dataclass
class Painter:
    """A provider that does what the test says, and counts."""

    draw: Draw = red_fox
    calls: int = 0
    models: tuple[Model, ...] = ()
    largest_context: int = 1000
    heard: bytes | None = None

    async def generate(self, request: Request, report: Reporter) -> Generated:
        self.calls += 1
        self.heard = None if request.previous_context is None else request.previous_context.read_bytes()
        report.submitted({}, estimate=0.05)
        return await self.draw(request, report)

    async def aclose(self) -> None:
        pass


@dataclass
class Shop:
    """Where runs are worked on."""

    db: Db
    gate: Gate
    painter: Painter = field(default_factory=Painter)

    async def ended(self, run: str) -> asyncpg.Record:
        """The row, once it is final."""

        async def over() -> asyncpg.Record | None:
            row = await run_row(self.db, run)
            return row if row["finished_at"] else None

        return await wait_until(over)

    async def events(self, run: str, name: str) -> list[asyncpg.Record]:
        return await self.db.fetch(
            "select payload ->> 'message' as message, payload -> 'data' as data from run_events"
            " where run_id = $1 and payload ->> 'event' = $2 order by seq",
            run,
            name,
        )


@pytest.fixture
async def shop(database: str, db: Db) -> AsyncIterator[Shop]:
    shop = Shop(db, Gate())
    async with (
        supabase(database, shop.gate.before) as project,
        Queue(database) as queue,
        Storage(project.url, project.keys.service_role_key, bucket="images", first_wait=QUICK) as storage,
        Storage(project.url, project.keys.service_role_key, bucket="images-context", first_wait=QUICK) as contexts,
        asyncio.TaskGroup() as group,
    ):
        daemon = await register(queue)
        turns = Turns(
            queue,
            daemon=lambda: daemon,
            slots=1,
            start=lambda run: worker.start(run),  # noqa: PLW0108 - there is no worker yet
            lost=lambda _: None,
            fenced=lambda _: asyncio.sleep(0),
        )
        heartbeat = Heartbeat(
            queue,
            lease=timedelta(seconds=30),
            daemon=lambda: daemon,
            state=lambda: (0, False, False),
            fenced=lambda _: asyncio.sleep(0),
        )
        worker = Worker(
            group,
            queue=queue,
            turns=turns,
            heartbeat=heartbeat,
            storage=storage,
            contexts=contexts,
            fetcher=Fetcher([]),
            publisher=Publisher(
                storage,
                contexts,
                turns,
                heartbeat,
                max_bytes=1_000_000,
                max_pixels=1_000_000,
                storage_away=STORAGE_AWAY,
            ),
            providers={"demo": shop.painter},
            policy=POLICY,
            metrics=Metrics(None),
            tmp_dir=None,
        )
        tasks = [group.create_task(turns.run()), group.create_task(heartbeat.run())]
        yield shop
        for task in tasks:
            task.cancel()


async def test_a_storage_that_does_not_come_back_ends_the_run_with_a_cure(shop: Shop) -> None:
    shop.gate.closed = True
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert (row["status"], row["payload"]["code"]) == ("failed", "storage_unavailable")
    assert "equeue" in row["payload"]["hint"]
    assert row["payload"]["details"]["uploadTries"] == 3
    assert shop.gate.uploads(run) == 3
    assert shop.gate.looks > 1
    assert shop.painter.calls == 1
    assert (await shop.events(run, "generated"))[0]["data"]["cost"] == pytest.approx(0.05)


async def test_a_storage_that_comes_and_goes_is_not_waited_for_twice(shop: Shop) -> None:
    looks = itertools.count(1)
    shop.gate.lets = lambda _, path: path.endswith("/bucket/images") and next(looks) % 2 == 0
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert row["status"] == "failed"
    assert shop.gate.uploads(run) == 6
    assert row["payload"]["details"]["uploadTries"] == 6


async def test_a_picture_that_cannot_be_read_from_the_disk_fails_the_run_and_keeps_its_cost(shop: Shop) -> None:
    async def vanishes(request: Request, _: Reporter) -> Generated:
        return Generated(request.workdir / "gone", 0.05)

    shop.painter.draw = vanishes
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert (row["status"], row["payload"]["code"]) == ("failed", "storage_disk")
    assert "then requeue" in row["payload"]["hint"]
    assert row["payload"]["details"] == {"errno": "ENOENT"}
    assert (await shop.events(run, "generated"))[0]["data"]["cost"] == pytest.approx(0.05)
    assert shop.painter.calls == 1


async def test_a_thumbnail_that_cannot_be_made_is_left_out_with_a_warning(shop: Shop) -> None:
    async def in_the_way(request: Request, report: Reporter) -> Generated:
        (request.workdir / "thumbnail.webp").mkdir()
        return await red_fox(request, report)

    shop.painter.draw = in_the_way
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert row["status"] == "completed"
    assert row["payload"]["imageUrl"]
    assert row["payload"]["thumbnailUrl"] is None
    (warning,) = await shop.events(run, "warning")
    assert "no thumbnail" in warning["message"]
    assert warning["data"]["field"] == "thumbnailUrl"


async def test_further_pictures_that_cannot_be_read_are_left_out_with_a_warning(shop: Shop) -> None:
    async def one_of_two(request: Request, report: Reporter) -> Generated:
        made = await red_fox(request, report)
        return Generated(made.path, 0.05, extra=(request.workdir / "gone", made.path))

    shop.painter.draw = one_of_two
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert row["status"] == "completed"
    assert len(row["payload"]["images"]) == 1
    assert [warning["data"]["field"] for warning in await shop.events(run, "warning")] == ["images"]


@pytest.mark.parametrize("content", [b"no picture", None])
async def test_a_preview_that_cannot_be_shown_is_left_out(shop: Shop, content: bytes | None) -> None:
    async def forming(request: Request, report: Reporter) -> Generated:
        preview = request.workdir / "preview"
        if content is not None:
            preview.write_bytes(content)
        report.preview(preview)
        await asyncio.sleep(0)
        return await red_fox(request, report)

    shop.painter.draw = forming
    run = await insert_run(shop.db)
    assert (await shop.ended(run))["status"] == "completed"


async def test_what_a_cleared_away_directory_refuses_costs_no_outcome(shop: Shop, tmp_path: Path) -> None:
    async def cleared_away(request: Request, report: Reporter) -> Generated:
        made = await red_fox(request, report)
        elsewhere = Path(shutil.move(request.workdir, tmp_path / "elsewhere"))
        return Generated(elsewhere / made.path.name, 0.05)

    shop.painter.draw = cleared_away
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert row["status"] == "completed"


async def test_a_storage_that_cannot_say_what_an_earlier_attempt_stored_costs_no_attempt(shop: Shop) -> None:
    shop.gate.closed = True
    async with shop.db.transaction():
        run = await insert_run(shop.db)
        await shop.db.execute("select set_config('image_jobs.hand', 'daemon', true)")
        await shop.db.execute("update runs set attempt = 1 where id = $1", run)

    async def put_off() -> bool:
        return bool(await shop.events(run, "retry"))

    await wait_until(put_off)
    assert (await run_row(shop.db, run))["attempt"] == 1
    assert shop.painter.calls == 0
    shop.gate.closed = False
    row = await shop.ended(run)
    assert (row["status"], row["attempt"], shop.painter.calls) == ("completed", 2, 1)


async def test_whoever_may_see_a_picture_does_not_learn_what_it_cost_or_which_words_it_was_drawn_from(
    shop: Shop,
) -> None:
    said = "Ein Fuchs im Schnee: ❄\x00 " * 5000

    async def worded_anew(request: Request, report: Reporter) -> Generated:
        made = await red_fox(request, report)
        return Generated(made.path, 0.05, revised_prompt=said)

    shop.painter.draw = worded_anew
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert row["payload"]["revisedPrompt"] == said.replace("\x00", "")
    public = await shop.db.fetchval("select user_metadata from storage.objects where name like $1", f"%/{run}.png")
    assert set(public) == {"request", "ticket", "sha256", "width", "height", "extra"}


async def with_words(request: Request, report: Reporter) -> Generated:
    """Draws, and has something to say of it."""
    made = await red_fox(request, report)
    words = request.workdir / "words.json"
    words.write_text('{"said": "a fox"}')
    return Generated(made.path, 0.05, context=words)


async def test_what_a_provider_said_of_a_picture_it_hears_again(shop: Shop) -> None:
    shop.painter.draw = with_words
    first = await shop.ended(await insert_run(shop.db))
    again = await insert_run(shop.db, prompt={"previousImage": first["payload"]["imageUrl"]})
    assert (await shop.ended(again))["status"] == "completed"
    assert shop.painter.heard == b'{"said": "a fox"}'


@pytest.mark.parametrize("why", ["it is away", "there is too much"])
async def test_words_that_cannot_be_had_are_left_out_with_a_warning(shop: Shop, why: str) -> None:
    shop.painter.draw = with_words
    first = await shop.ended(await insert_run(shop.db))
    if why == "it is away":
        shop.gate.closed_for = "/images-context/"
    else:
        shop.painter.largest_context = 3
    shop.painter.draw = red_fox
    again = await insert_run(shop.db, prompt={"previousImage": first["payload"]["imageUrl"]})
    assert (await shop.ended(again))["status"] == "completed"
    assert shop.painter.heard is None
    (warning,) = await shop.events(again, "warning")
    assert warning["data"]["field"] == "previousImage"


async def test_words_that_storage_does_not_take_are_left_out_with_a_warning(shop: Shop) -> None:
    shop.painter.draw = with_words
    shop.gate.closed_for = "/images-context/"
    run = await insert_run(shop.db)
    assert (await shop.ended(run))["status"] == "completed"
    (warning,) = await shop.events(run, "warning")
    assert warning["data"]["field"] == "context"
