"""Work that is taken away at the worst moments: its slot comes back."""

import asyncio

import asyncpg
import pytest

from daemon.queue.client import Queue
from daemon.queue.dispatcher import Dispatcher
from daemon.run import ClaimedRun
from daemon.storage.client import Storage
from tests.support.postgres import wait_until
from tests.support.runs import insert_run, run_row
from tests.support.wiring import wired

Db = asyncpg.Connection


@pytest.mark.parametrize("how", ["dropped", "handed back"])
async def test_run_taken_away_before_its_first_step_frees_its_slot(database: str, db: Db, how: str) -> None:
    run = await insert_run(db)
    async with Queue(database) as queue, asyncio.TaskGroup() as group:
        it = await wired(queue, slots=1)
        storage = Storage("http://127.0.0.1:1", "key", bucket="images")
        worker = it.worker(group, storage, storage, {})
        started = asyncio.Event()

        def start_and_stop(run: ClaimedRun) -> None:
            dispatcher.accepting = False
            worker.start(run)
            if how == "dropped":
                worker.drop({run.claim})
            else:
                worker.hand_back()
            started.set()

        dispatcher = Dispatcher(
            queue,
            it.identity,
            it.signals,
            it.outbox,
            unreachable=it.unreachable,
            slots=1,
            start=start_and_stop,
            drop=worker.drop,
        )
        syncing = group.create_task(dispatcher.run())
        await started.wait()

        async def given_back() -> bool:
            return (await run_row(db, run))["status"] == "pending"

        await wait_until(given_back)
        await asyncio.wait_for(dispatcher.wait_idle(), 5)
        assert worker.idle
        assert (await run_row(db, run))["attempt"] == 0
        syncing.cancel()
