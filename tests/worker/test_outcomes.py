"""Every way a run can end: the keys of its settlement are those that `image_jobs.settle_runs` reads, no more and no less."""

import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from daemon.calls import Call
from daemon.errors import OutcomeUnknown, Refused, Retryable, RunError
from daemon.events import Event
from daemon.providers import Submitted, Waiting
from daemon.queue.outbox import Outbox
from daemon.queue.signals import Signals
from daemon.run import ClaimedRun
from daemon.worker import endings
from daemon.worker.outcomes import Failed, Failure, Outcome, Parked, Released, Retry
from daemon.worker.reporter import RunReporter
from tests.support.wiring import completed
from tests.worker.test_retries import claimed

SCHEMA = Path(__file__).parents[2] / "sql/schema"
EVENT = Event("late", "The image came late.", data={"cost": 0.04})
FAILURE = Failure("It failed.", "timeout", "Try again.", {"seconds": 3}, "https://example.supabase.co/x.png")
ALWAYS = {"outcome", "events"}
CALLS = [Call(id=1, state="charged", cost=0.04)]

FULL: list[tuple[Outcome, set[str]]] = [
    (
        completed(events=[EVENT], if_lost=EVENT, http_status=200, calls=CALLS),
        {"payload", "if_lost", "http_status", "calls", "stored_ago"},
    ),
    (Failed(FAILURE, fall_back=True, events=[EVENT], if_lost=EVENT), {"payload", "fall_back", "if_lost"}),
    (
        Retry(FAILURE, 2.5, "Again.", refund=True, fall_back=True, refund_for=300),
        {"payload", "due_in", "message", "refund", "fall_back", "refund_for", "over_hint"},
    ),
    (
        Parked(
            "job-1",
            5,
            "At work.",
            webhook=True,
            progress=3,
            ticket=7,
            processor="demo:painter",
            found=True,
            if_lost=EVENT,
        ),
        {"provider_job_id", "due_in", "message", "webhook", "progress", "ticket", "processor", "found", "if_lost"},
    ),
    (Released("Handed back.", if_lost=EVENT), {"message", "if_lost"}),
]
"""Each way to end, with everything that it may have, and the keys of its settlement besides `ALWAYS`."""


def contract() -> set[str]:
    """Return the keys that `image_jobs.settle_runs` reads of a settlement, `makers_of_jobs` for it, and `note_responses` besides."""
    sql = re.sub(r"--.*", "", "".join((SCHEMA / name).read_text() for name in ("29_calls.sql", "41_settle_runs.sql")))
    records = re.findall(r"jsonb_to_recordset\(p_settlements\) as s \(([^)]*)\)", sql)
    assert len(records) > 1
    columns = {column.split()[0] for record in records for column in record.split(",")}
    read = {*re.findall(r"s\.value ->>? '(\w+)'", sql)}
    return (
        columns
        | read
        | {"http_status"}
        | {*re.findall(r"p_settlement ->>? '(\w+)'", (SCHEMA / "29_calls.sql").read_text())}
    )


def reporter(run: ClaimedRun, *, sent: bool = False) -> RunReporter:
    """Return the reporter of an attempt that has sent its request, or not."""

    async def show(_: Path) -> None:
        raise AssertionError

    it = RunReporter(Outbox(Signals()), run, show)
    if sent:
        it.submitted({}, estimate=0.05)
    return it


def error(kind: type[RunError] = Retryable, **fields: Any) -> RunError:
    return kind("It failed.", code="unreachable", hint="Wait.", **fields)


@pytest.mark.parametrize(("outcome", "keys"), FULL, ids=lambda it: getattr(it, "name", ""))
def test_settlement_has_the_keys_of_its_outcome(outcome: Outcome, keys: set[str]) -> None:
    body = outcome.to_json()
    assert body.keys() == keys | ALWAYS
    assert body["outcome"] == outcome.name


def test_settlements_have_the_keys_of_the_sql_contract() -> None:
    assert {key for outcome, _ in FULL for key in outcome.to_json()} | {"id", "claim"} == contract()


def test_values_that_are_none_are_left_out() -> None:
    assert Released().to_json() == {"outcome": "released", "events": []}
    assert Failed(Failure("No.", "internal", "Read the log.")).to_json()["payload"] == {
        "error": "No.",
        "code": "internal",
        "hint": "Read the log.",
    }


def test_completed_payload_is_that_of_the_public_contract() -> None:
    payload = completed(images=["https://example.supabase.co/x.1.png"]).to_json()["payload"]
    assert payload.keys() == {
        "imageUrl", "imagePath", "thumbnailUrl", "thumbnailPath", "originalUrl", "revisedPrompt", "width", "height", "contentType", "bytes",
        "provider", "model", "requestedModel", "cost", "images", "imagePaths",
    }  # fmt: skip
    assert "images" not in completed().to_json()["payload"]


def test_earlier_events_come_first() -> None:
    earlier = replace(EVENT, name="earlier")
    names = [event["payload"]["event"] for event in completed(events=[EVENT]).following([earlier]).to_json()["events"]]
    assert names == ["earlier", "late"]


def test_unwritable_outcome_keeps_the_url_of_a_stored_image() -> None:
    assert completed("https://example.supabase.co/x.png").unwritable("No.").failure.image_url == (
        "https://example.supabase.co/x.png"
    )
    others = [outcome.unwritable("No.").to_json() for outcome, _ in FULL if outcome.name != "completed"]
    assert [(it["outcome"], it["payload"]["code"]) for it in others] == [("failed", "internal")] * 4
    assert not any("imageUrl" in it["payload"] for it in others)
    assert {it["payload"]["details"]["reason"] for it in others} == {"No."}


def test_event_has_an_id_of_its_own_and_no_empty_data() -> None:
    body = EVENT.to_json()
    assert body.keys() == {"id", "kind", "payload"}
    assert body["payload"] == {"event": "late", "message": "The image came late.", "data": {"cost": 0.04}}
    assert "data" not in Event("stored", "It is stored.").to_json()["payload"]
    assert body["id"] == EVENT.to_json()["id"] != Event("late", "The image came late.").to_json()["id"]


async def test_refused_is_final_and_retryable_is_not() -> None:
    run = claimed()
    assert isinstance(endings.failed(error(Refused), run, reporter(run), wait=3), Failed)
    again = endings.failed(error(), run, reporter(run, sent=True), wait=3)
    assert isinstance(again, Retry)
    assert (again.due_in, again.refund, again.fall_back) == (3, False, True)
    assert again.message == "It failed. Trying again in 3 s."


async def test_retry_goes_by_the_time_that_the_error_names() -> None:
    run = claimed()
    again = endings.failed(error(retry_in=timedelta(seconds=9), accepted=False), run, reporter(run), wait=3)
    assert isinstance(again, Retry)
    assert (again.due_in, again.refund, again.refund_for) == (9, True, None)


async def test_a_providers_own_error_costs_no_attempt_for_five_minutes() -> None:
    run = claimed()
    again = endings.failed(error(own_error=True), run, reporter(run), wait=3)
    assert isinstance(again, Retry)
    assert (again.refund, again.refund_for) == (True, 300)


async def test_unknown_outcome_keeps_its_possible_cost() -> None:
    run = claimed()
    again = endings.failed(error(OutcomeUnknown), run, reporter(run, sent=True), wait=3)
    (unknown,) = again.events
    assert unknown.name == "unknown_outcome"
    assert unknown.data == {"possibleCost": 0.05, "processor": "demo:painter"}


async def test_charged_and_incident_events_come_with_the_failure() -> None:
    run = claimed()
    outcome = endings.failed(error(Refused, cost=0.04, data={"incident": True}), run, reporter(run), wait=0)
    assert [event.name for event in outcome.events] == ["charged", "incident"]


@pytest.mark.parametrize("sent", [True, False])
async def test_a_job_that_was_not_sent_is_one_that_was_found(sent: bool) -> None:
    run = claimed()
    outcome = endings.submitted(Submitted("job-1"), run, reporter(run, sent=sent), due=timedelta(seconds=5))
    assert outcome.found is not sent


async def test_stopped_check_keeps_the_charge_of_its_picture() -> None:
    """The claim is lost while the charge of a picture that has come still waits to be written."""
    run = replace(claimed(), provider_job_id="job-1")
    it = reporter(run)
    assert endings.stopped(it).calls is None
    it.paid, it.dropped = it.call("charged", cost=0.04, image=True), True
    assert endings.stopped(it).calls == [it.paid]


@pytest.mark.parametrize(("asked", "state"), [(False, "unknown"), (True, "free")])
async def test_only_the_provider_says_that_its_job_is_free(asked: bool, state: str) -> None:
    """A daemon without the provider's key ends the run, and knows nothing of the provider job."""
    run = replace(claimed(), provider_job_id="job-1")
    it = reporter(run)
    it.asked = asked
    outcome = endings.failed(error(Refused), run, it, wait=0)
    assert [call.state for call in outcome.calls or ()] == [state]


@pytest.mark.parametrize(("sent", "dropped", "kind"), [
    (False, False, Released), (False, True, Released), (True, True, Released), (True, False, Retry),
])  # fmt: skip
async def test_stopped_attempt_is_retried_if_it_was_sent(sent: bool, dropped: bool, kind: type[Outcome]) -> None:
    it = reporter(claimed(), sent=sent)
    it.dropped = dropped
    outcome = endings.stopped(it)
    assert isinstance(outcome, kind)
    noted = [event.name for event in [*outcome.events, outcome.if_lost] if event is not None]
    assert noted == ["unknown_outcome"] * sent


async def test_crash_is_internal_and_keeps_its_possible_cost() -> None:
    outcome = endings.crashed(reporter(claimed(), sent=True))
    assert outcome.failure.code == "internal"
    assert [event.name for event in outcome.events] == ["unknown_outcome"]


def test_submitted_job_can_find_its_run_without_the_claim() -> None:
    parked = endings.submitted(Submitted("job-1"), claimed(), reporter(claimed()), due=timedelta(seconds=5))
    assert (parked.provider_job_id, parked.due_in, parked.ticket, parked.processor) == ("job-1", 5, 1, "demo:painter")
    assert parked.if_lost is not None
    assert parked.if_lost.data == {"providerJobId": "job-1"}


@pytest.mark.parametrize(("told", "shown"), [(None, None), (12.7, 12), (100, 99)])
def test_progress_of_a_waiting_job_ends_at_99(told: float | None, shown: int | None) -> None:
    parked = endings.still_waiting("job-1", Waiting(told), due=timedelta(0), webhook=False)
    assert parked.to_json().get("progress") == shown
