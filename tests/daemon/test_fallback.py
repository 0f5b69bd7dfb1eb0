"""Fallbacks (`metadata.fallback`) with whole daemons, and fakes of three APIs that count their requests."""

import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.fakes import google_api
from tests.fakes.google_api import blocked, quota
from tests.fakes.openai_api import cut, error_event, moderation, status
from tests.support.multi_provider_harness import GOOGLE, NANO, STABILITY, MultiProviderHarness, multi_provider_harness
from tests.support.openai_harness import FLARE, OPENAI
from tests.support.postgres import wait_until

STORY = ["claimed", "submitted", "generated", "stored", "completed"]
DOWN = google_api.error(503, "UNAVAILABLE", "The model is overloaded.")


@pytest.fixture
async def unshared(database: str) -> AsyncIterator[MultiProviderHarness]:
    """A daemon that may be killed."""
    async with multi_provider_harness(database) as harness:
        yield harness


async def insert_run(harness: MultiProviderHarness, *fallback: str, processor: str = OPENAI, **metadata: Any) -> str:
    """Insert a run with fallbacks. Returns its id."""
    return await harness.insert_run(processor, fallback=list(fallback), **metadata)


async def set_limits(harness: MultiProviderHarness, provider: str, assignment: str) -> None:
    """Change columns of a provider in `provider_limits`."""
    await harness.db.execute(
        "insert into image_jobs.provider_limits (provider) values ($1) on conflict do nothing", provider
    )
    await harness.db.execute(
        f"update image_jobs.provider_limits set {assignment} where provider = $1 and model is null", provider
    )


async def reroutes(harness: MultiProviderHarness, run: str) -> list[tuple[str, str, str]]:
    """From which processor, to which, and the code of the reason."""
    return [(data["from"], data["to"], data["code"]) for data in await harness.event_data(run, "fallback")]


async def test_payload_names_the_fallback_that_made_the_image(providers: MultiProviderHarness) -> None:
    providers.openai.next(status(503, "server_error"))
    run = await insert_run(providers, GOOGLE)
    row = await providers.wait_for_status(run, "completed")

    assert row["processor"] == OPENAI
    payload = row["payload"]
    assert (payload["provider"], payload["model"], payload["requestedModel"]) == ("google", NANO, FLARE)
    assert payload["cost"] == pytest.approx(0.0336)
    assert await providers.event_names(run) == ["created", "claimed", "submitted", "fallback", *STORY]
    (event,) = await providers.events(run, "fallback")
    assert event["data"].items() >= {"from": OPENAI, "to": GOOGLE, "code": "provider_unavailable"}.items()
    assert event["message"].endswith(f"Going on with {GOOGLE}.")
    assert providers.requests == (1, 1, 0)
    (generated,) = await providers.events(run, "generated")
    assert generated["data"]["processor"] == GOOGLE, "it is Google's cost"


async def test_payload_names_the_provider_without_fallback_too(providers: MultiProviderHarness) -> None:
    run = await insert_run(providers, GOOGLE)
    payload = (await providers.wait_for_status(run, "completed"))["payload"]

    assert (payload["provider"], payload["model"], payload["requestedModel"]) == ("openai", FLARE, FLARE)
    assert providers.requests == (1, 0, 0)


async def test_second_fallback_runs_when_the_first_is_down(providers: MultiProviderHarness) -> None:
    providers.openai.next(status(503, "server_error"))
    providers.google.next(DOWN)
    run = await insert_run(providers, GOOGLE, STABILITY)
    payload = (await providers.wait_for_status(run, "completed"))["payload"]

    assert (payload["provider"], payload["model"]) == ("stability", "core")
    assert [step[:2] for step in await reroutes(providers, run)] == [(OPENAI, GOOGLE), (GOOGLE, STABILITY)]
    assert providers.requests == (1, 1, 1)


async def test_last_fallback_is_retried_like_a_sole_provider(providers: MultiProviderHarness) -> None:
    providers.openai.next(status(503, "server_error"))
    providers.google.next(DOWN)
    run = await insert_run(providers, GOOGLE)
    await providers.wait_for_retry(run)
    await providers.make_due(run)
    row = await providers.wait_for_status(run, "completed")

    assert (row["payload"]["provider"], row["attempt"]) == ("google", 1)
    assert providers.requests == (1, 2, 0)


async def test_waiting_runs_are_rerouted_when_credit_runs_out(providers: MultiProviderHarness) -> None:
    await set_limits(providers, "openai", "per_minute = 1")
    providers.openai.next(status(429, "insufficient_quota"))
    waiting = await providers.insert_runs(3, OPENAI, fallback=[GOOGLE])
    without_fallback = await providers.insert_run(OPENAI)
    for run in waiting:
        payload = (await providers.wait_for_status(run, "completed"))["payload"]
        assert payload["provider"] == "google"

    steps = sorted([step for run in waiting for step in await reroutes(providers, run)])
    assert steps == [(OPENAI, GOOGLE, "billing"), *[(OPENAI, GOOGLE, "blocked")] * 2]
    assert ("openai", None) in await providers.blocked()
    assert providers.requests == (1, 3, 0)
    await providers.wait_for_status(without_fallback, "pending")
    assert await providers.event_names(without_fallback) == ["created"]
    await providers.db.execute("select cancel_run($1)", without_fallback)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (status(401, "invalid_api_key"), "authentication"),
        (status(403, "unsupported_country"), "permission"),
        (status(404, "model_not_found"), "unknown_model"),
        (status(429, "rate_limit_exceeded", headers={"retry-after": "60"}), "rate_limited"),
    ],
)
async def test_blocking_errors_reroute_the_run(fault: Any, code: str, providers: MultiProviderHarness) -> None:
    providers.openai.next(fault)
    run = await insert_run(providers, GOOGLE)
    await providers.wait_for_status(run, "completed")

    assert await reroutes(providers, run) == [(OPENAI, GOOGLE, code)]
    assert providers.requests == (1, 1, 0)


async def test_daily_quota_reroutes_the_run(providers: MultiProviderHarness) -> None:
    providers.google.next(google_api.error(429, "RESOURCE_EXHAUSTED", "Enough.", quota("RequestsPerDayPerModel")))
    run = await insert_run(providers, STABILITY, processor=GOOGLE)
    await providers.wait_for_status(run, "completed")

    assert await reroutes(providers, run) == [(GOOGLE, STABILITY, "quota_daily")]


async def test_short_rate_limit_is_waited_for(providers: MultiProviderHarness) -> None:
    providers.openai.next(status(429, "rate_limit_exceeded", headers={"retry-after": "2"}))
    run = await insert_run(providers, GOOGLE)
    payload = (await providers.wait_for_status(run, "completed"))["payload"]

    assert payload["provider"] == "openai"
    assert providers.requests == (2, 0, 0)


async def test_provider_without_a_key_is_skipped(providers: MultiProviderHarness) -> None:
    run = await insert_run(providers, GOOGLE, processor="midjourney:v7")
    payload = (await providers.wait_for_status(run, "completed"))["payload"]

    assert (payload["provider"], payload["requestedModel"]) == ("google", "v7")
    assert await reroutes(providers, run) == [("midjourney:v7", GOOGLE, "no_key")]
    assert providers.requests == (0, 1, 0)


async def test_fallback_image_is_adopted_after_a_lost_settlement(providers: MultiProviderHarness) -> None:
    providers.openai.next(status(503, "server_error"))
    run = await insert_run(providers, GOOGLE)
    first = (await providers.wait_for_status(run, "completed"))["payload"]
    await providers.undo_settlement(run)
    again = (await providers.wait_for_status(run, "completed"))["payload"]

    for name in ("imageUrl", "provider", "model", "requestedModel", "cost"):
        assert again[name] == first[name]
    assert (await providers.event_names(run))[-1:] == ["completed"]
    assert len(await providers.events(run, "adopted")) == 1
    assert providers.requests == (1, 1, 0)


@pytest.mark.parametrize("switch", [{}, {"fallbackOnRefusal": False}])
async def test_content_refusal_is_final_by_default(switch: dict[str, bool], providers: MultiProviderHarness) -> None:
    providers.openai.next(error_event(moderation("input", "violence"), after=0))
    run = await insert_run(providers, GOOGLE, **switch)
    row = await providers.wait_for_status(run, "failed")

    assert (row["payload"]["code"], row["routed_to"]) == ("content_policy", None)
    assert await reroutes(providers, run) == []
    assert providers.requests == (1, 0, 0)


async def test_content_refusal_reroutes_with_fallback_on_refusal(providers: MultiProviderHarness) -> None:
    providers.openai.next(error_event(moderation("input", "violence"), after=0))
    providers.google.next(blocked("PROHIBITED_CONTENT"))
    run = await insert_run(providers, GOOGLE, STABILITY, fallbackOnRefusal=True)
    row = await providers.wait_for_status(run, "completed")

    assert row["payload"]["provider"] == "stability"
    assert [step[2] for step in await reroutes(providers, run)] == ["content_policy"] * 2
    assert providers.requests == (1, 1, 1)


async def test_invalid_request_is_not_rerouted(providers: MultiProviderHarness) -> None:
    providers.openai.next(status(400, "invalid_value"))
    run = await insert_run(providers, GOOGLE)
    row = await providers.wait_for_status(run, "failed")

    assert row["payload"]["code"] == "invalid_request"
    assert providers.requests == (1, 0, 0)


async def test_unknown_outcomes_are_retried_before_rerouting(providers: MultiProviderHarness) -> None:
    providers.openai.next(cut(after=0), cut(after=0), cut(after=0))
    run = await insert_run(providers, GOOGLE)
    for times in (1, 2):
        await providers.wait_for_retry(run, times)
        await providers.make_due(run)
    payload = (await providers.wait_for_status(run, "completed"))["payload"]

    assert payload["provider"] == "google"
    assert await reroutes(providers, run) == [(OPENAI, GOOGLE, "outcome_unknown")]
    unknown = await providers.events(run, "unknown_outcome")
    assert [event["data"]["processor"] for event in unknown] == [OPENAI] * 3
    assert providers.requests == (3, 1, 0)


async def test_kill_between_fallbacks_pays_nothing_twice(unshared: MultiProviderHarness) -> None:
    unshared.openai.next(status(503, "server_error"))
    await set_limits(unshared, "google", "paused = true")
    run = await insert_run(unshared, GOOGLE)
    await unshared.wait_for_event(run, "fallback")
    unshared.daemon.signal(signal.SIGKILL)
    await unshared.daemon.ended()
    async with unshared.run_daemon() as other:
        await other.started()
        await set_limits(unshared, "google", "paused = false")
        row = await unshared.wait_for_status(run, "completed")

    assert (row["payload"]["provider"], row["attempt"]) == ("google", 1)
    assert await unshared.event_names(run) == ["created", "claimed", "submitted", "fallback", *STORY]
    assert unshared.requests == (1, 1, 0)


async def test_kill_during_a_fallback_costs_one_attempt_there(unshared: MultiProviderHarness) -> None:
    unshared.openai.next(status(503, "server_error"))
    unshared.google.hold()
    run = await insert_run(unshared, GOOGLE)
    await wait_until(lambda: unshared.google.requests, timeout=20)
    async with unshared.run_daemon() as other:
        await other.started()
        unshared.daemon.signal(signal.SIGKILL)
        (taken,) = await unshared.wait_for_event(run, "taken_over")
        await unshared.make_due(run)
        row = await unshared.wait_for_status(run, "completed")

    assert taken["data"]["processor"] == GOOGLE
    assert taken["data"]["possibleCost"] == pytest.approx(0.0336)
    assert (row["payload"]["provider"], row["attempt"]) == ("google", 2)
    assert unshared.requests == (1, 2, 0)
