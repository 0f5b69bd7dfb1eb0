"""A flood of webhooks: 200 deliveries a second for half a minute, duplicated and shuffled, while a daemon is killed."""

import asyncio
import json
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.fakes.midjourney_api import KEY, MidjourneyAPI
from tests.support.fault_harness import FaultHarness
from tests.support.postgres import connect, wait_until
from tests.support.webhooks import by_sql

SECRET = "a webhook secret of these tests"
RUNS = 120
FOREIGN = 50
PER_SECOND = 200
SECONDS = 30
DELIVERIES = PER_SECOND * SECONDS
CONNECTIONS = 4
"""To the database: a gateway has a few of them."""


@pytest.fixture
async def api() -> AsyncIterator[MidjourneyAPI]:
    async with MidjourneyAPI() as api:
        api.reset()  # the stages hold its address, which is known only now
        yield api


def webhooks(api: MidjourneyAPI, chance: random.Random) -> list[tuple[str, dict[str, Any]]]:
    """The deliveries in the order of sending, as (provider job, stage): half of the stages of all jobs, the end of each
    among them, and stages of foreign jobs; then duplicates of some, everything shuffled."""
    done = [(name, api.done()) for name in api.tasks]
    stages = [(name, {"status": "IN_PROGRESS", "progress": f"{p}%"}) for name in api.tasks for p in range(2, 100, 2)]
    foreign = [(f"foreign-{n}", {"status": "SUBMITTED"}) for n in range(FOREIGN)]
    sent = done + foreign + chance.sample(stages, DELIVERIES // 2)
    sent += chance.choices(sent, k=DELIVERIES - len(sent))
    chance.shuffle(sent)
    return sent


def completing_deliveries(sent: list[tuple[str, dict[str, Any]]]) -> dict[str, int]:
    """The number of the delivery with which each provider job is completed at the fake: for one half the first that says
    so, for the others their last distinct one, which may say something else and come while a daemon polls."""
    new: dict[str, dict[str, int]] = {}
    for number, (name, stage) in enumerate(sent):
        new.setdefault(name, {}).setdefault(stage.get("progress", ""), number)
    return {
        name: numbers["100%"] if int(name) % 2 else max(numbers.values())
        for name, numbers in new.items()
        if "100%" in numbers
    }


async def post_all(
    harness: FaultHarness, api: MidjourneyAPI, sent: list[tuple[str, dict[str, Any]]], half: asyncio.Event
) -> Counter[str]:
    """Post all of them, 200 a second or as fast as this machine can; set `half` on the way. Returns counts of the responses."""
    responses: Counter[str] = Counter()
    signed = {name: task["state"] for name, task in api.tasks.items()}
    ours = next(iter(signed.values()))
    finished = completing_deliveries(sent)
    numbers, started = iter(enumerate(sent)), time.monotonic()

    async def post() -> None:
        db = await connect(harness.project.dsn)
        for number, (name, stage) in numbers:
            await asyncio.sleep(started + number / PER_SECOND - time.monotonic())
            if number == finished.get(name):
                api.tasks[name].update(api.done())
            body = json.dumps({"id": name, "state": signed.get(name, ours), **stage})
            status, response = await by_sql(db)("midjourney", body, {})
            responses["duplicate" if response["duplicate"] else "received"] += status == 200
            if number == len(sent) // 2:
                half.set()
        await db.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(post())
    return responses


@pytest.mark.timeout(300)
async def test_every_run_settles_once_in_a_flood_of_deliveries(harness: FaultHarness, api: MidjourneyAPI) -> None:
    environment = {
        "MIDJOURNEY_API_URL": api.url,
        "MIDJOURNEY_API_KEY": KEY,
        "WEBHOOK_SECRET": SECRET,
        "IMAGE_JOBS_LEASE": "5",
        "IMAGE_JOBS_WEBHOOK_WAIT": "3600",  # every poll is because of a webhook
        "IMAGE_JOBS_POLL_TIMEOUT": "3600",
    }
    async with harness.run_daemon(**environment) as first, harness.run_daemon(**environment) as second:
        await first.started()
        await second.started()
        runs = await harness.insert_runs(RUNS, "midjourney:v7")

        async def all_parked() -> bool:
            parked = "select count(*) from runs where webhook = 'awaited' and claimed_by is null"
            return await harness.db.fetchval(parked) == RUNS

        await wait_until(all_parked, timeout=60)
        sent = webhooks(api, random.Random(4))
        half = asyncio.Event()
        posting = asyncio.create_task(post_all(harness, api, sent, half))
        await half.wait()
        first.signal(signal.SIGKILL)
        responses = await posting
        await harness.assert_all_end_once(timeout=90)

    states = await harness.db.fetch("select id, status from runs")
    assert {row["id"]: row["status"] for row in states} == dict.fromkeys(runs, "completed")
    assert len(api.jobs) == RUNS
    distinct = len({json.dumps(each) for each in sent})
    # A state has twenty places: a repeat of one that has lost its place counts as new, and takes another's.
    assert responses["received"] >= distinct
    assert responses["received"] + responses["duplicate"] == DELIVERIES
    counted = "select sum(accepted), sum(duplicates), sum(refused) from image_jobs.webhook_counters"
    assert tuple(await harness.db.fetchrow(counted) or ()) == (responses["received"], responses["duplicate"], 0)
    places = (
        "select max(kept) from (select count(*) as kept from image_jobs.webhook_deliveries group by state) of_a_state"
    )
    assert 20 <= await harness.db.fetchval(places) < 20 + CONNECTIONS  # those at the same time do not see each other
