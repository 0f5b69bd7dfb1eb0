"""Google and Stability AI with several daemons, killed ones, and one that has other settings."""

import signal
from collections.abc import AsyncIterator

import pytest

from tests.fakes import google_api, stability_api
from tests.fakes.google_api import reason
from tests.fakes.server import Response
from tests.support.multi_provider_harness import GOOGLE, STABILITY, MultiProviderHarness, multi_provider_harness
from tests.support.postgres import wait_until

NO_CREDIT = {
    GOOGLE: google_api.error(403, "PERMISSION_DENIED", "Billing is disabled.", reason("BILLING_DISABLED")),
    STABILITY: stability_api.error(402, "payment_required", "You lack sufficient credits."),
}


@pytest.fixture
async def harness(database: str) -> AsyncIterator[MultiProviderHarness]:
    async with multi_provider_harness(database) as harness:
        yield harness


@pytest.mark.parametrize(("processor", "cost"), [(GOOGLE, 0.0336), (STABILITY, 0.03)])
async def test_kill_during_the_call_keeps_a_possible_cost(
    processor: str, cost: float, harness: MultiProviderHarness
) -> None:
    api = harness.api(processor)
    api.hold()
    run = await harness.insert_run(processor)
    await harness.wait_for_event(run, "submitted")
    await wait_until(lambda: len(api.requests) == 1)
    async with harness.run_daemon() as other:
        await other.started()
        harness.daemon.signal(signal.SIGKILL)
        await harness.wait_for_event(run, "taken_over")
        assert len(api.requests) == 1  # no new call before the take-over is written down
        await harness.make_due(run)
        row = await harness.wait_for_status(run, "completed")

    assert row["attempt"] == 2
    (taken,) = await harness.events(run, "taken_over")
    assert taken["data"]["possibleCost"] == pytest.approx(cost)
    assert await harness.event_names(run) == [
        *("created", "claimed", "submitted", "taken_over"),
        *("claimed", "submitted", "generated", "stored", "completed"),
    ]
    assert len({event["data"]["daemon"] for event in await harness.events(run, "claimed")}) == 2
    assert len(api.requests) == 2


@pytest.mark.parametrize("processor", [GOOGLE, STABILITY])
async def test_missing_credit_fails_the_run_after_an_hour(processor: str, harness: MultiProviderHarness) -> None:
    provider, api = processor.partition(":")[0], harness.api(processor)
    api.next(*[NO_CREDIT[processor]] * 4)
    async with harness.run_daemon() as other:
        await other.started()
        run = await harness.insert_run(processor)
        assert (await harness.wait_for_retry(run))["attempt"] == 0
        assert await harness.blocked() == {(provider, None): pytest.approx(600, abs=30)}
        waiting = await harness.insert_run(processor)
        await harness.wait_for_status(await harness.insert_run("demo:painter", demo={"noop": True}), "completed")
        assert await harness.event_names(waiting) == ["created"]
        assert len(api.requests) == 1

        await harness.db.execute("delete from runs where id = $1", waiting)
        await harness.db.execute("alter table runs disable trigger user")
        await harness.db.execute("update runs set refused_since = refused_since - interval '61 min' where id = $1", run)
        await harness.db.execute("alter table runs enable trigger user")
        for attempt in (1, 2):
            await harness.make_due(run)
            assert (await harness.wait_for_retry(run, times=attempt + 1))["attempt"] == attempt
        await harness.make_due(run)
        payload = (await harness.wait_for_status(run, "failed"))["payload"]

    assert payload["code"] == "billing"
    assert payload["error"].endswith(" account is out of credit.")
    assert payload["hint"].startswith("Add credit at ")
    assert await harness.events(run, "unknown_outcome") == []
    assert len(api.requests) == 4


async def test_retired_models_fail_with_strict_models(database: str) -> None:
    async with multi_provider_harness(database, IMAGE_JOBS_STRICT_MODELS="1") as harness:
        for processor, instead in (
            ("google:imagen-3.0", GOOGLE),
            ("google:gemini-2.5-flash-image-preview", "google:gemini-2.5-flash-image"),
            ("stability:stable-diffusion-3", "stability:sd3.5-large"),
            ("stability:stable-diffusion-xl", STABILITY),
        ):
            run = await harness.insert_run(processor)
            payload = (await harness.wait_for_status(run, "failed"))["payload"]
            assert (payload["code"], payload["hint"]) == ("model_retired", f"Use {instead}.")
            assert await harness.event_names(run) == ["created", "claimed", "failed"]
    assert harness.google.requests + harness.stability.requests == []


@pytest.mark.parametrize(
    ("processor", "known", "refusal"),
    [
        (
            "google:gemini-nano-banana-2.2",
            GOOGLE,
            google_api.error(404, "NOT_FOUND", "models/x is not found for API version v1."),
        ),
        ("stability:sd3.5-larger", "stability:sd3.5-large", stability_api.error(400, "bad_request", "model: no such")),
    ],
)
async def test_unknown_model_is_refused_with_a_suggestion(
    processor: str, known: str, refusal: Response, harness: MultiProviderHarness
) -> None:
    harness.api(processor).next(refusal)
    run = await harness.insert_run(processor)
    payload = (await harness.wait_for_status(run, "failed"))["payload"]

    assert (payload["code"], payload["hint"]) == ("unknown_model", f"Did you mean {known}?")
    (warning,) = await harness.events(run, "warning")
    assert warning["data"]["field"] == "model"
    assert f"Did you mean {known}?" in warning["message"]
    assert len(harness.api(processor).requests) == 1
