"""Waits before the next try, and which errors fall back."""

from uuid import UUID

import pytest

from daemon.errors import OutcomeUnknown, Refused, Retryable, RunError
from daemon.run import ClaimedRun
from daemon.worker.retries import FALLBACK_CODES, JITTER, LONGEST_RATE_LIMIT, MOST_RUNS, Retries, should_fall_back


def claimed(run: str = "run_1", *, attempt: int = 1, processor: str = "demo:painter", **metadata: object) -> ClaimedRun:
    """Return a claimed run with these values."""
    return ClaimedRun.read(
        UUID(int=0),
        {
            "id": run,
            "claim": 1,
            "ticket": 1,
            "subject_id": "",
            "processor": processor,
            "requested": processor,
            "call": 1,
            "metadata": metadata,
            "attempt": attempt,
            "max_attempts": 3,
            "provider_job_id": None,
            "webhook": None,
            "submitted_ago": None,
            "created_by": None,
            "source_workflow": None,
            "generated": None,
            "contested": False,
            "waited": 0,
        },
    )


def about(seconds: float) -> object:
    """Match these seconds, with jitter."""
    return pytest.approx(seconds, rel=JITTER + 1e-9)


def test_wait_doubles_up_to_a_minute_also_without_attempts() -> None:
    retries = Retries()
    assert [retries.next(claimed()) for _ in range(8)] == [about(s) for s in (2, 4, 8, 16, 32, 60, 60, 60)]


def test_wait_of_an_uncounted_run_goes_by_its_attempt() -> None:
    assert Retries().next(claimed(attempt=3)) == about(8)


def test_runs_that_failed_together_return_apart() -> None:
    retries = Retries()
    assert len({retries.next(claimed(f"run_{number}")) for number in range(100)}) > 90


def test_count_is_per_provider_and_ends_with_the_run() -> None:
    retries = Retries()
    for _ in range(4):
        retries.next(claimed())
    assert retries.next(claimed(processor="demo:other")) == about(2)
    retries.forget(claimed())
    assert retries.next(claimed()) == about(2)


def test_oldest_of_very_many_runs_is_forgotten() -> None:
    retries = Retries()
    for number in range(MOST_RUNS):
        retries.next(claimed(f"run_{number}"))
    retries.next(claimed("run_0"))  # counted again: now run_1 is the oldest
    retries.next(claimed("run_new"))
    assert retries.next(claimed("run_0")) == about(8)
    assert retries.next(claimed("run_1")) == about(2)


def failed(kind: type[RunError], code: str) -> RunError:
    """Return an error of a provider."""
    return kind("It failed.", code=code, hint="")


@pytest.mark.parametrize("code", sorted(FALLBACK_CODES))
@pytest.mark.parametrize("kind", [Refused, Retryable])
def test_provider_trouble_falls_back(kind: type[RunError], code: str) -> None:
    assert should_fall_back(failed(kind, code), claimed(), wait=0)


@pytest.mark.parametrize("code", ["invalid_request", "input_image_invalid", "storage_unavailable", "internal"])
def test_trouble_that_is_the_same_everywhere_stays(code: str) -> None:
    assert not should_fall_back(failed(Refused, code), claimed(), wait=60)


def test_only_a_long_rate_limit_falls_back() -> None:
    error = failed(Retryable, "rate_limited")
    assert should_fall_back(error, claimed(), wait=LONGEST_RATE_LIMIT)
    assert not should_fall_back(error, claimed(), wait=LONGEST_RATE_LIMIT - 1)


def test_refused_content_falls_back_only_if_asked() -> None:
    error = failed(Refused, "content_policy")
    assert not should_fall_back(error, claimed(), wait=0)
    assert should_fall_back(error, claimed(fallbackOnRefusal=True), wait=0)


@pytest.mark.parametrize(
    ("code", "attempt", "falls_back"),
    [
        ("timeout", 2, False),
        ("timeout", 3, True),
        ("outcome_unknown", 3, True),
        ("storage_disk", 3, False),
    ],
)
def test_unknown_outcome_falls_back_after_the_last_attempt(code: str, attempt: int, falls_back: bool) -> None:
    assert should_fall_back(failed(OutcomeUnknown, code), claimed(attempt=attempt), wait=0) is falls_back
