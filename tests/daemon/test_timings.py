"""Times of runs of whole daemons: what the provider took by its own clock, for each provider and mode."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from tests.fakes.midjourney_api import MidjourneyAPI
from tests.fakes.openai_api import Call as ImagesCall
from tests.fakes.openai_api import status
from tests.fakes.openai_responses import ResponsesAPI
from tests.fakes.server import Call
from tests.support.daemon_harness import DaemonHarness
from tests.support.midjourney_harness import MIDJOURNEY, midjourney_environment
from tests.support.multi_provider_harness import GOOGLE, STABILITY, multi_provider_harness
from tests.support.openai_harness import OPENAI, background_harness
from tests.support.runs import in_milliseconds, run_row
from tests.support.storage_gate import StorageGate

PAINTER = "demo:painter"
SECONDS = 3.0
"""How long each call takes, by the clock of who is called."""
NEAR = 0.25
"""Seconds by which a time may be longer than that. Machines stand still now and then: one of some rounds has to be near."""
ROUNDS = 8
EARLIER = 0.02
"""By which it may be shorter: two clocks, and milliseconds."""

Calls = Sequence[Call | ImagesCall]


pytestmark = pytest.mark.timeout(180)


async def timings(harness: DaemonHarness, run: str) -> dict[str, int]:
    """Return the times of a completed run: in sequence, and all of the time there was."""
    await harness.wait_for_status(run, "completed")
    row = await run_row(harness.db, run)
    times: dict[str, int] = row["payload"]["timings"]
    assert all(value >= 0 for value in times.values())
    assert sum(times.values()) == in_milliseconds(row["finished_at"] - row["created_at"])
    return times


def took(calls: Calls) -> float:
    """Return the seconds from the first request to the last response, by the API's clock."""
    return max(call.left_at for call in calls) - min(call.came_at for call in calls)


Result = Awaitable[tuple[float, float]]
"""The seconds that the run says, and those by the API's clock."""


async def near(lanes: dict[str, Callable[[], Awaitable[Result]]]) -> None:
    """Have the run of each lane made, side by side, and again those that were not near."""
    left = dict(lanes)
    seen: dict[str, list[tuple[float, float]]] = {}
    for _ in range(ROUNDS):
        begun = {name: await begin() for name, begin in left.items()}
        for name, result in begun.items():
            measured, real = await result
            seen.setdefault(name, []).append((measured, real))
            assert real >= SECONDS - EARLIER, seen
            assert measured >= real - EARLIER, seen
            if measured <= real + NEAR:
                del left[name]
        if not left:
            return
    pytest.fail(f"Never near: {[seen[name] for name in left]}")


async def test_calls_take_as_long_as_the_provider(database: str, midjourney_api: MidjourneyAPI) -> None:
    midjourney_api.takes = SECONDS
    environment = midjourney_environment(midjourney_api)
    async with multi_provider_harness(database, **environment) as harness:
        for api in (harness.openai, harness.google, harness.stability):
            api.takes = SECONDS

        async def once(calls: Calls, processor: str, **metadata: Any) -> Result:
            before = len(calls)
            small = {"size": "64x64"} if processor == PAINTER else {}  # what the painter needs is a processor
            run = await harness.insert_run(processor, prompt={"seed": 7, **small}, **metadata)
            return finish(calls, before, run, processor)

        async def finish(calls: Calls, before: int, run: str, processor: str) -> tuple[float, float]:
            times = await timings(harness, run)
            payload = (await run_row(harness.db, run))["payload"]
            used = (payload.get("seed"), payload.get("quality"))
            assert used == ((None, "medium") if processor == OPENAI else (7, None)), processor
            real = took(calls[before:]) if calls else SECONDS
            return times["generateMs"] / 1000, real

        async def in_json() -> Result:
            # A server that does not stream is asked again without.
            harness.openai.next(status(400, param="stream"))
            return await once(harness.openai.requests, OPENAI)

        painted: list[Call] = []
        await near(
            {
                "google": lambda: once(harness.google.requests, GOOGLE),
                "stability": lambda: once(harness.stability.requests, STABILITY),
                "midjourney": lambda: once(midjourney_api.requests, MIDJOURNEY),
                "stream": lambda: once(harness.openai.requests, OPENAI),
                "demo": lambda: once(painted, PAINTER, demo={"slow": SECONDS}),
                "demo's job": lambda: once(painted, PAINTER, demo={"submit": SECONDS, "noop": True}),
            }
        )
        await near({"JSON": in_json})


async def test_jobs_take_as_long_as_the_provider(
    database: str, responses_api: ResponsesAPI, midjourney_api: MidjourneyAPI
) -> None:
    """A job in the background that is polled, one that a webhook ends, and one whose daemon is killed."""
    responses_api.takes = midjourney_api.takes = SECONDS
    gate = StorageGate()
    environment = midjourney_environment(
        midjourney_api, WEBHOOK_SECRET_MIDJOURNEY="a webhook secret of the tests", IMAGE_JOBS_WEBHOOK_WAIT="600"
    )
    async with background_harness(database, responses_api, gate=gate, **environment) as harness:

        async def once(calls: list[Call], processor: str) -> Result:
            before = len(calls)
            return finish(calls, before, await harness.insert_run(processor))

        async def finish(calls: list[Call], before: int, run: str) -> tuple[float, float]:
            times = await timings(harness, run)
            return times["generateMs"] / 1000, took(calls[before:])

        await near(
            {
                "background": lambda: once(responses_api.requests, OPENAI),
                "webhook": lambda: once(midjourney_api.requests, MIDJOURNEY),
            }
        )

        responses_api.requests.clear()
        gate.held["POST"] = asyncio.Event()  # the picture has come, and is not stored
        run = await harness.insert_run()
        await harness.wait_for_event(run, "generated")
        once_fetched = took(responses_api.requests)
        harness.daemon.signal(signal.SIGKILL)
        await harness.daemon.ended()
        gate.held.pop("POST").set()
        async with harness.run_daemon():
            times = await timings(harness, run)
        # Until the picture that is stored was in hand: the first one went with its daemon.
        real = took(responses_api.requests)
        assert len(responses_api.jobs) == 1
        assert real > once_fetched + 1
        assert real - EARLIER <= times["generateMs"] / 1000 <= real + 40 * NEAR
