"""200 deliveries a second for half a minute, doubled and in any order, and one of two daemons is killed meanwhile."""

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
from tests.faults.world import World
from tests.postgres import connect, wait_until
from tests.webhooks import by_sql

SECRET = "a webhook secret of these tests"
RUNS = 120
FOREIGN = 50
PER_SECOND = 200
SECONDS = 30
DELIVERIES = PER_SECOND * SECONDS
CONNECTIONS = 4
"""To the database, as a gateway has a few of them."""


@pytest.fixture
async def api() -> AsyncIterator[MidjourneyAPI]:
    async with MidjourneyAPI() as api:
        api.reset()  # it knows its address by now
        yield api


def webhooks(api: MidjourneyAPI, chance: random.Random) -> list[tuple[str, dict[str, Any]]]:
    """What is sent, in this order: half of the stages of all orders, the end of each among them, and webhooks of orders that
    nobody made; and then some of all that again, everything shuffled."""
    done = [(name, api.done()) for name in api.tasks]
    stages = [(name, {"status": "IN_PROGRESS", "progress": f"{p}%"}) for name in api.tasks for p in range(2, 100, 2)]
    foreign = [(f"foreign-{n}", {"status": "SUBMITTED"}) for n in range(FOREIGN)]
    sent = done + foreign + chance.sample(stages, DELIVERIES // 2)
    sent += chance.choices(sent, k=DELIVERIES - len(sent))
    chance.shuffle(sent)
    return sent


def ends(sent: list[tuple[str, dict[str, Any]]]) -> dict[str, int]:
    """With which webhook each order is finished in truth: one half when one first says so, the others with the last new
    one of theirs, which may say something else, and come while a daemon is asking."""
    new: dict[str, dict[str, int]] = {}
    for number, (name, stage) in enumerate(sent):
        new.setdefault(name, {}).setdefault(stage.get("progress", ""), number)
    return {
        name: numbers["100%"] if int(name) % 2 else max(numbers.values())
        for name, numbers in new.items()
        if "100%" in numbers
    }


async def pour(
    world: World, api: MidjourneyAPI, sent: list[tuple[str, dict[str, Any]]], half: asyncio.Event
) -> Counter[str]:
    """Posts all of them, 200 a second, or as fast as this machine can; sets `half` on the way. Counts the answers."""
    answers: Counter[str] = Counter()
    signed = {name: task["state"] for name, task in api.tasks.items()}
    ours = next(iter(signed.values()))
    finished = ends(sent)
    numbers, started = iter(enumerate(sent)), time.monotonic()

    async def post() -> None:
        db = await connect(world.project.dsn)
        for number, (name, stage) in numbers:
            await asyncio.sleep(started + number / PER_SECOND - time.monotonic())
            if number == finished.get(name):
                api.tasks[name].update(api.done())
            body = json.dumps({"id": name, "state": signed.get(name, ours), **stage})
            status, said = await by_sql(db)("midjourney", body, {})
            answers["duplicate" if said["duplicate"] else "received"] += status == 200
            if number == len(sent) // 2:
                half.set()
        await db.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(post())
    return answers


@pytest.mark.timeout(300)
async def test_every_run_settles_once_in_a_flood_of_deliveries(world: World, api: MidjourneyAPI) -> None:
    environment = {
        "MIDJOURNEY_API_URL": api.url,
        "MIDJOURNEY_API_KEY": KEY,
        "WEBHOOK_SECRET": SECRET,
        "IMAGE_JOBS_LEASE": "5",
        "IMAGE_JOBS_WEBHOOK_WAIT": "3600",  # whatever is asked, is asked because of a webhook
        "IMAGE_JOBS_POLL_TIMEOUT": "3600",
    }
    async with world.daemon(**environment) as first, world.daemon(**environment) as second:
        await first.started()
        await second.started()
        runs = await world.order(RUNS, "midjourney:v7")

        async def all_parked() -> bool:
            parked = "select count(*) from runs where webhook = 'awaited' and claimed_by is null"
            return await world.db.fetchval(parked) == RUNS

        await wait_until(all_parked, timeout=60)
        sent = webhooks(api, random.Random(4))
        half = asyncio.Event()
        pouring = asyncio.create_task(pour(world, api, sent, half))
        await half.wait()
        first.signal(signal.SIGKILL)
        answers = await pouring
        await world.all_ended_once(timeout=90)

    states = await world.db.fetch("select id, status from runs")
    assert {row["id"]: row["status"] for row in states} == dict.fromkeys(runs, "completed")
    assert len(api.orders) == RUNS
    distinct = len({json.dumps(each) for each in sent})
    assert answers == {"received": distinct, "duplicate": DELIVERIES - distinct}
    counted = "select sum(accepted), sum(duplicates), sum(refused) from private.webhook_counters"
    assert tuple(await world.db.fetchrow(counted) or ()) == (distinct, DELIVERIES - distinct, 0)
    assert await world.db.fetchval("select count(*) from private.webhook_deliveries") == distinct
