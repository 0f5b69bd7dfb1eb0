"""Google and Stability AI through several daemons, killed ones, and one that is set up in another way."""

import json
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from uuid import uuid4

import pytest

from tests.daemons import daemon
from tests.fakes import google_api, stability_api
from tests.fakes.google_api import GoogleAPI, reason
from tests.fakes.openai_api import OpenAIAPI
from tests.fakes.server import Answer, FakeAPI
from tests.fakes.stability_api import StabilityAPI
from tests.openai_studio import Studio, open_studio
from tests.postgres import wait_until
from tests.runs import insert_run

NEWEST = "google:gemini-nano-banana-2.1"
CORE = "stability:core"
NO_CREDIT = {
    NEWEST: google_api.error(403, "PERMISSION_DENIED", "Billing is disabled.", reason("BILLING_DISABLED")),
    CORE: stability_api.error(402, "payment_required", "You lack sufficient credits."),
}


@dataclass
class Town:
    """Both APIs, and how a daemon is told where they are."""

    google: GoogleAPI
    stability: StabilityAPI

    @property
    def environment(self) -> dict[str, str]:
        return {
            "GOOGLE_API_KEY": google_api.KEY,
            "GOOGLE_BASE_URL": self.google.url,
            "STABILITY_API_KEY": stability_api.KEY,
            "STABILITY_BASE_URL": self.stability.url,
            "IMAGE_JOBS_LEASE": "2",
        }

    def api(self, processor: str) -> FakeAPI:
        """Who is asked."""
        return self.google if processor.startswith("google") else self.stability


@pytest.fixture
async def town() -> AsyncIterator[Town]:
    async with GoogleAPI() as google, StabilityAPI() as stability:
        yield Town(google, stability)


@pytest.fixture
async def studio(database: str, town: Town) -> AsyncIterator[Studio]:
    async with AsyncExitStack() as opened:
        api = await opened.enter_async_context(OpenAIAPI())
        studio = await opened.enter_async_context(open_studio(database, api, **town.environment))
        yield studio
        rows = await studio.db.fetch(
            "select to_jsonb(r) as row from runs r union all select to_jsonb(e) from run_events e"
        )
        written = json.dumps([row["row"] for row in rows]) + "\n".join(studio.daemon.raw)
        assert google_api.KEY not in written
        assert stability_api.KEY not in written


async def order(studio: Studio, processor: str) -> str:
    """Inserts a run; answers its id."""
    return await insert_run(studio.db, processor=processor, workflow=uuid4())


@pytest.mark.parametrize(("processor", "cost"), [(NEWEST, 0.0336), (CORE, 0.03)])
async def test_a_daemon_killed_in_mid_call_leaves_a_possible_cost_and_then_another_makes_the_picture(
    processor: str, cost: float, studio: Studio, town: Town
) -> None:
    api = town.api(processor)
    api.hold()
    run = await order(studio, processor)
    await wait_until(lambda: studio.events(run, "submitted"))
    await wait_until(lambda: len(api.requests) == 1)
    async with daemon(studio.project, **town.environment) as other:
        await other.started()
        studio.daemon.signal(signal.SIGKILL)
        await wait_until(lambda: studio.events(run, "taken_over"), timeout=20)
        assert len(api.requests) == 1  # nobody asks anew before that is written down
        await studio.hurry(run)
        row = await studio.until(run, "completed")

    assert row["attempt"] == 2
    (taken,) = await studio.events(run, "taken_over")
    assert taken["data"]["possibleCost"] == pytest.approx(cost)
    assert await studio.story(run) == [
        *("created", "claimed", "submitted", "taken_over"),
        *("claimed", "submitted", "generated", "stored", "completed"),
    ]
    assert len({event["data"]["daemon"] for event in await studio.events(run, "claimed")}) == 2
    assert len(api.requests) == 2


@pytest.mark.parametrize("processor", [NEWEST, CORE])
async def test_without_credit_no_daemon_asks_again_and_after_an_hour_the_run_fails_with_a_cure(
    processor: str, studio: Studio, town: Town
) -> None:
    provider, api = processor.partition(":")[0], town.api(processor)
    api.next(*[NO_CREDIT[processor]] * 4)
    async with daemon(studio.project, **town.environment) as other:
        await other.started()
        run = await order(studio, processor)
        assert (await studio.put_off(run))["attempt"] == 0
        assert await studio.blocked() == {(provider, None): pytest.approx(600, abs=30)}
        waiting = await order(studio, processor)
        await studio.until(await insert_run(studio.db, demo={"noop": True}), "completed")
        assert await studio.story(waiting) == ["created"]
        assert len(api.requests) == 1

        await studio.db.execute("delete from runs where id = $1", waiting)
        await studio.db.execute("alter table runs disable trigger user")
        await studio.db.execute("update runs set refused_since = refused_since - interval '61 min' where id = $1", run)
        await studio.db.execute("alter table runs enable trigger user")
        for attempt in (1, 2):
            await studio.hurry(run)
            assert (await studio.put_off(run, times=attempt + 1))["attempt"] == attempt
        await studio.hurry(run)
        payload = (await studio.until(run, "failed"))["payload"]

    assert payload["code"] == "billing"
    assert payload["error"].endswith(" account is out of credit.")
    assert payload["hint"].startswith("Add credit at ")
    assert await studio.events(run, "unknown_outcome") == []
    assert len(api.requests) == 4


async def test_retired_models_fail_where_models_are_strict(database: str, town: Town) -> None:
    async with open_studio(database, OpenAIAPI(), **town.environment, IMAGE_JOBS_STRICT_MODELS="1") as studio:
        for processor, instead in (
            ("google:imagen-3.0", NEWEST),
            ("google:gemini-2.5-flash-image-preview", "google:gemini-2.5-flash-image"),
            ("stability:stable-diffusion-3", "stability:sd3.5-large"),
            ("stability:stable-diffusion-xl", CORE),
        ):
            run = await order(studio, processor)
            payload = (await studio.until(run, "failed"))["payload"]
            assert (payload["code"], payload["hint"]) == ("model_retired", f"Use {instead}.")
            assert await studio.story(run) == ["created", "claimed", "failed"]
    assert town.google.requests + town.stability.requests == []


@pytest.mark.parametrize(
    ("processor", "known", "gone"),
    [
        (
            "google:gemini-nano-banana-2.2",
            NEWEST,
            google_api.error(404, "NOT_FOUND", "models/x is not found for API version v1."),
        ),
        ("stability:sd3.5-larger", "stability:sd3.5-large", stability_api.error(400, "bad_request", "model: no such")),
    ],
)
async def test_a_model_nobody_knows_is_asked_for_with_a_warning_and_refused_with_a_guess(
    processor: str, known: str, gone: Answer, studio: Studio, town: Town
) -> None:
    town.api(processor).next(gone)
    run = await order(studio, processor)
    payload = (await studio.until(run, "failed"))["payload"]

    assert (payload["code"], payload["hint"]) == ("unknown_model", f"Did you mean {known}?")
    (warning,) = await studio.events(run, "warning")
    assert warning["data"]["field"] == "model"
    assert f"Did you mean {known}?" in warning["message"]
    assert len(town.api(processor).requests) == 1
