"""A run whose provider can do nothing goes on to the next: whole daemons, and fakes of three APIs that count requests."""

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest

from tests.daemons import daemon
from tests.fakes import google_api, stability_api
from tests.fakes.google_api import GoogleAPI, blocked, quota
from tests.fakes.openai_api import KEY, OpenAIAPI, cut, error_event, moderation, status
from tests.fakes.stability_api import StabilityAPI
from tests.openai_studio import FLARE, Studio, open_studio
from tests.postgres import Cluster, wait_until
from tests.runs import insert_run, insert_runs

OPENAI = f"openai:{FLARE}"
NANO = "gemini-nano-banana-2.1"
GOOGLE, STABILITY = f"google:{NANO}", "stability:core"
MADE = ["claimed", "submitted", "generated", "stored", "completed"]
DOWN = google_api.error(503, "UNAVAILABLE", "The model is overloaded.")


@dataclass
class Town:
    """Three providers and a daemon that has the keys of all."""

    studio: Studio
    google: GoogleAPI
    stability: StabilityAPI

    async def order(self, *fallback: str, processor: str = OPENAI, **metadata: Any) -> str:
        """Inserts a run with a fallback; answers its id."""
        return await insert_run(
            self.studio.db, processor=processor, workflow=uuid4(), fallback=list(fallback), **metadata
        )

    async def limit(self, provider: str, how: str) -> None:
        """Changes the limits of a provider."""
        await self.studio.db.execute(
            "insert into provider_limits (provider) values ($1) on conflict do nothing", provider
        )
        await self.studio.db.execute(
            f"update provider_limits set {how} where provider = $1 and model is null", provider
        )

    async def steps(self, run: str) -> list[tuple[str, str, str]]:
        """From whom, to whom and why it went on."""
        return [
            (event["data"]["from"], event["data"]["to"], event["data"]["code"])
            for event in await self.studio.events(run, "fallback")
        ]

    @property
    def requests(self) -> tuple[int, int, int]:
        """How many OpenAI, Google and Stability AI have had."""
        return len(self.studio.api.requests), len(self.google.requests), len(self.stability.requests)


@pytest.fixture(scope="module")
async def shared(postgres: Cluster) -> AsyncIterator[Town]:
    async with AsyncExitStack() as opened:
        openai, google, stability = OpenAIAPI(), GoogleAPI(), StabilityAPI()
        for api in (openai, google, stability):
            await opened.enter_async_context(api)
        dsn = await opened.enter_async_context(postgres.database())
        keys = environment(openai, google, stability)
        yield Town(await opened.enter_async_context(open_studio(dsn, openai, **keys)), google, stability)


def environment(openai: OpenAIAPI, google: GoogleAPI, stability: StabilityAPI) -> dict[str, str]:
    """Keys and addresses; a lease that is over soon, for those who are killed."""
    return {
        "OPENAI_API_KEY": KEY,
        "OPENAI_BASE_URL": openai.url,
        "GOOGLE_API_KEY": google_api.KEY,
        "GOOGLE_BASE_URL": google.url,
        "STABILITY_API_KEY": stability_api.KEY,
        "STABILITY_BASE_URL": stability.url,
        "IMAGE_JOBS_LEASE": "2",
    }


@pytest.fixture
async def town(shared: Town) -> Town:
    """The APIs are as new, and nothing is closed or limited."""
    for api in (shared.studio.api, shared.google, shared.stability):
        api.reset()
    await shared.studio.db.execute("delete from provider_limits where model is not null")
    await shared.studio.db.execute("update provider_limits set blocked_until = null, per_minute = null, paused = false")
    return shared


async def test_where_openai_is_down_google_draws_and_the_payload_says_so(town: Town) -> None:
    town.studio.api.next(status(503, "server_error"))
    run = await town.order(GOOGLE)
    row = await town.studio.until(run, "completed")

    assert row["processor"] == OPENAI
    payload = row["payload"]
    assert (payload["provider"], payload["model"], payload["requestedModel"]) == ("google", NANO, FLARE)
    assert payload["cost"] == pytest.approx(0.0336)
    assert await town.studio.story(run) == ["created", "claimed", "submitted", "fallback", *MADE]
    (event,) = await town.studio.events(run, "fallback")
    assert event["data"].items() >= {"from": OPENAI, "to": GOOGLE, "code": "provider_unavailable"}.items()
    assert event["message"].endswith(f"Going on with {GOOGLE}.")
    assert town.requests == (1, 1, 0)
    (generated,) = await town.studio.events(run, "generated")
    assert generated["data"]["processor"] == GOOGLE, "it is Google's cost"


async def test_a_run_that_needs_no_fallback_names_who_delivered_as_well(town: Town) -> None:
    run = await town.order(GOOGLE)
    payload = (await town.studio.until(run, "completed"))["payload"]

    assert (payload["provider"], payload["model"], payload["requestedModel"]) == ("openai", FLARE, FLARE)
    assert town.requests == (1, 0, 0)


async def test_where_google_is_down_too_stability_draws(town: Town) -> None:
    town.studio.api.next(status(503, "server_error"))
    town.google.next(DOWN)
    run = await town.order(GOOGLE, STABILITY)
    payload = (await town.studio.until(run, "completed"))["payload"]

    assert (payload["provider"], payload["model"]) == ("stability", "core")
    assert [step[:2] for step in await town.steps(run)] == [(OPENAI, GOOGLE), (GOOGLE, STABILITY)]
    assert town.requests == (1, 1, 1)


async def test_the_last_provider_is_tried_again_as_the_only_one_would_be(town: Town) -> None:
    town.studio.api.next(status(503, "server_error"))
    town.google.next(DOWN)
    run = await town.order(GOOGLE)
    await town.studio.put_off(run)
    await town.studio.hurry(run)
    row = await town.studio.until(run, "completed")

    assert (row["payload"]["provider"], row["attempt"]) == ("google", 2)
    assert town.requests == (1, 2, 0)


async def test_without_credit_the_circuit_closes_and_those_who_wait_go_on(town: Town) -> None:
    await town.limit("openai", "per_minute = 1")
    town.studio.api.next(status(429, "insufficient_quota"))
    waiting = await insert_runs(town.studio.db, 3, processor=OPENAI, fallback=[GOOGLE])
    patient = await insert_run(town.studio.db, processor=OPENAI)
    for run in waiting:
        payload = (await town.studio.until(run, "completed"))["payload"]
        assert payload["provider"] == "google"

    steps = sorted([step for run in waiting for step in await town.steps(run)])
    assert steps == [(OPENAI, GOOGLE, "billing"), *[(OPENAI, GOOGLE, "blocked")] * 2]
    assert ("openai", None) in await town.studio.blocked()
    assert town.requests == (1, 3, 0)
    await town.studio.until(patient, "pending")
    assert await town.studio.story(patient) == ["created"]
    await town.studio.db.execute("select cancel_run($1)", patient)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (status(401, "invalid_api_key"), "authentication"),
        (status(403, "unsupported_country"), "permission"),
        (status(404, "model_not_found"), "unknown_model"),
        (status(429, "rate_limit_exceeded", headers={"retry-after": "60"}), "rate_limited"),
    ],
)
async def test_whatever_closes_openai_to_us_sends_the_run_on(fault: Any, code: str, town: Town) -> None:
    town.studio.api.next(fault)
    run = await town.order(GOOGLE)
    await town.studio.until(run, "completed")

    assert await town.steps(run) == [(OPENAI, GOOGLE, code)]
    assert town.requests == (1, 1, 0)


async def test_a_used_up_quota_of_the_day_sends_the_run_on(town: Town) -> None:
    town.google.next(google_api.error(429, "RESOURCE_EXHAUSTED", "Enough.", quota("RequestsPerDayPerModel")))
    run = await town.order(STABILITY, processor=GOOGLE)
    await town.studio.until(run, "completed")

    assert await town.steps(run) == [(GOOGLE, STABILITY, "quota_daily")]


async def test_a_short_rate_limit_is_waited_for(town: Town) -> None:
    town.studio.api.next(status(429, "rate_limit_exceeded", headers={"retry-after": "2"}))
    run = await town.order(GOOGLE)
    payload = (await town.studio.until(run, "completed"))["payload"]

    assert payload["provider"] == "openai"
    assert town.requests == (2, 0, 0)


async def test_a_provider_without_a_key_is_left_for_one_that_has_one(town: Town) -> None:
    run = await town.order(GOOGLE, processor="midjourney:v7")
    payload = (await town.studio.until(run, "completed"))["payload"]

    assert (payload["provider"], payload["requestedModel"]) == ("google", "v7")
    assert await town.steps(run) == [("midjourney:v7", GOOGLE, "no_key")]
    assert town.requests == (0, 1, 0)


async def test_a_picture_of_a_step_whose_settlement_was_lost_is_adopted_as_that_steps(town: Town) -> None:
    town.studio.api.next(status(503, "server_error"))
    run = await town.order(GOOGLE)
    first = (await town.studio.until(run, "completed"))["payload"]
    # As if the daemon had died between storage and settlement.
    async with town.studio.db.transaction():
        await town.studio.db.execute("select set_config('image_jobs.hand', 'daemon', true)")
        await town.studio.db.execute(
            """update runs set status = 'pending', payload = null, finished_at = null, due_at = now(), rank = 0
            where id = $1""",
            run,
        )
    again = (await town.studio.until(run, "completed"))["payload"]

    for name in ("imageUrl", "provider", "model", "requestedModel", "cost"):
        assert again[name] == first[name]
    assert (await town.studio.story(run))[-1:] == ["completed"]
    assert len(await town.studio.events(run, "adopted")) == 1
    assert town.requests == (1, 1, 0)


@pytest.mark.parametrize("switch", [{}, {"fallbackOnRefusal": False}])
async def test_a_refusal_of_the_content_is_final(switch: dict[str, bool], town: Town) -> None:
    town.studio.api.next(error_event(moderation("input", "violence"), after=0))
    run = await town.order(GOOGLE, **switch)
    row = await town.studio.until(run, "failed")

    assert (row["payload"]["code"], row["via"]) == ("content_policy", None)
    assert await town.steps(run) == []
    assert town.requests == (1, 0, 0)


async def test_a_refusal_goes_on_if_the_caller_says_so(town: Town) -> None:
    town.studio.api.next(error_event(moderation("input", "violence"), after=0))
    town.google.next(blocked("PROHIBITED_CONTENT"))
    run = await town.order(GOOGLE, STABILITY, fallbackOnRefusal=True)
    row = await town.studio.until(run, "completed")

    assert row["payload"]["provider"] == "stability"
    assert [step[2] for step in await town.steps(run)] == ["content_policy"] * 2
    assert town.requests == (1, 1, 1)


async def test_what_is_wrong_with_the_request_is_wrong_everywhere(town: Town) -> None:
    town.studio.api.next(status(400, "invalid_value"))
    run = await town.order(GOOGLE)
    row = await town.studio.until(run, "failed")

    assert row["payload"]["code"] == "invalid_request"
    assert town.requests == (1, 0, 0)


async def test_what_may_have_been_paid_for_is_tried_again_before_another_is_asked(town: Town) -> None:
    town.studio.api.next(cut(after=0), cut(after=0), cut(after=0))
    run = await town.order(GOOGLE)
    for times in (1, 2):
        await town.studio.put_off(run, times)
        await town.studio.hurry(run)
    payload = (await town.studio.until(run, "completed"))["payload"]

    assert payload["provider"] == "google"
    assert await town.steps(run) == [(OPENAI, GOOGLE, "outcome_unknown")]
    unknown = await town.studio.events(run, "unknown_outcome")
    assert [event["data"]["processor"] for event in unknown] == [OPENAI] * 3
    assert town.requests == (3, 1, 0)


async def test_a_daemon_killed_between_two_steps_is_followed_by_another_and_nothing_is_paid_twice(
    postgres: Cluster,
) -> None:
    async with (
        OpenAIAPI() as openai,
        GoogleAPI() as google,
        StabilityAPI() as stability,
        postgres.database() as dsn,
        open_studio(dsn, openai, **(keys := environment(openai, google, stability))) as studio,
    ):
        town = Town(studio, google, stability)
        openai.next(status(503, "server_error"))
        await town.limit("google", "paused = true")
        run = await town.order(GOOGLE)
        await wait_until(lambda: studio.events(run, "fallback"), timeout=20)
        studio.daemon.signal(signal.SIGKILL)
        await studio.daemon.ended()
        async with daemon(studio.project, **keys) as other:
            await other.started()
            await town.limit("google", "paused = false")
            row = await studio.until(run, "completed")

        assert (row["payload"]["provider"], row["attempt"]) == ("google", 1)
        assert await studio.story(run) == ["created", "claimed", "submitted", "fallback", *MADE]
        assert town.requests == (1, 1, 0)


async def test_a_daemon_killed_within_a_step_costs_an_attempt_there_and_the_first_is_not_asked_again(
    postgres: Cluster,
) -> None:
    async with (
        OpenAIAPI() as openai,
        GoogleAPI() as google,
        StabilityAPI() as stability,
        postgres.database() as dsn,
        open_studio(dsn, openai, **(keys := environment(openai, google, stability))) as studio,
    ):
        town = Town(studio, google, stability)
        openai.next(status(503, "server_error"))
        google.hold()
        run = await town.order(GOOGLE)
        await wait_until(lambda: google.requests, timeout=20)
        async with daemon(studio.project, **keys) as other:
            await other.started()
            studio.daemon.signal(signal.SIGKILL)
            (taken,) = await wait_until(lambda: studio.events(run, "taken_over"), timeout=20)
            await studio.hurry(run)
            row = await studio.until(run, "completed")

        assert taken["data"]["processor"] == GOOGLE
        assert taken["data"]["possibleCost"] == pytest.approx(0.0336)
        assert (row["payload"]["provider"], row["attempt"]) == ("google", 2)
        assert town.requests == (1, 2, 0)
