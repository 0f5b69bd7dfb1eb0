"""Work that is taken away at the worst moments: its slot comes back."""

import asyncio
from datetime import timedelta

import asyncpg
import pytest

from daemon.fetch import Fetcher
from daemon.heartbeat import Heartbeat
from daemon.metrics import Metrics
from daemon.policy import Policy
from daemon.publisher import Publisher
from daemon.queue import Claimed, Queue
from daemon.storage import Storage
from daemon.turns import Turns
from daemon.worker import Worker
from tests.postgres import wait_until
from tests.runs import insert_run, register, run_row

Db = asyncpg.Connection

POLICY = Policy(
    run_timeout=timedelta(minutes=1),
    poll_interval=timedelta(seconds=1),
    poll_timeout=timedelta(minutes=1),
    webhook_wait=timedelta(minutes=1),
    webhooks=frozenset(),
    strict_models=False,
    max_image_bytes=1_000_000,
)


@pytest.mark.parametrize("how", ["dropped", "handed back"])
async def test_a_run_that_is_taken_away_before_its_first_step_frees_its_slot(database: str, db: Db, how: str) -> None:
    run = await insert_run(db)
    async with Queue(database) as queue, asyncio.TaskGroup() as group:
        daemon = await register(queue)

        # Called only once there is a worker.
        def start_and_stop(run: Claimed) -> None:
            turns.accepting = False
            worker.start(run)
            if how == "dropped":
                worker.drop({run.claim})
            else:
                worker.hand_back()

        turns = Turns(
            queue,
            daemon=lambda: daemon,
            slots=1,
            start=start_and_stop,
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
        storage = Storage("http://127.0.0.1:1", "key", bucket="images")
        worker = Worker(
            group,
            queue=queue,
            turns=turns,
            heartbeat=heartbeat,
            storage=storage,
            contexts=storage,
            fetcher=Fetcher([]),
            publisher=Publisher(storage, storage, turns, heartbeat, max_bytes=1_000_000, max_pixels=1_000_000),
            providers={},
            policy=POLICY,
            metrics=Metrics(None),
            tmp_dir=None,
        )

        turning = group.create_task(turns.run())

        async def given_back() -> bool:
            return (await run_row(db, run))["status"] == "pending" and not turns.accepting

        await wait_until(given_back)
        await asyncio.wait_for(turns.wait_idle(), 5)
        assert worker.idle
        assert (await run_row(db, run))["attempt"] == 0
        turning.cancel()
