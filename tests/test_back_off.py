"""How long a run waits for its next try."""

from uuid import UUID

import pytest

from daemon.back_off import JITTER, MOST_RUNS, BackOff
from daemon.queue import Claimed


def claimed(run: str = "run_1", *, attempt: int = 1, processor: str = "demo:painter") -> Claimed:
    """A run, of which nothing counts but this."""
    return Claimed.read(
        UUID(int=0),
        {
            "id": run,
            "claim": 1,
            "ticket": 1,
            "subject_id": "",
            "processor": processor,
            "requested": processor,
            "metadata": {},
            "attempt": attempt,
            "max_attempts": 3,
            "provider_job_id": None,
            "webhook": None,
            "submitted_ago": None,
            "made": None,
            "waited": 0,
        },
    )


def about(seconds: float) -> object:
    """These seconds, with jitter."""
    return pytest.approx(seconds, rel=JITTER + 1e-9)


def test_it_doubles_up_to_a_minute_although_refusals_cost_no_attempt() -> None:
    back_off = BackOff()
    assert [back_off.next(claimed()) for _ in range(8)] == [about(s) for s in (2, 4, 8, 16, 32, 60, 60, 60)]


def test_a_daemon_that_knows_nothing_of_a_run_goes_by_its_attempt() -> None:
    assert BackOff().next(claimed(attempt=3)) == about(8)


def test_runs_that_failed_together_do_not_come_back_together() -> None:
    back_off = BackOff()
    assert len({back_off.next(claimed(f"run_{number}")) for number in range(100)}) > 90


def test_another_provider_begins_anew_and_so_does_a_run_that_has_ended() -> None:
    back_off = BackOff()
    for _ in range(4):
        back_off.next(claimed())
    assert back_off.next(claimed(processor="demo:other")) == about(2)
    back_off.forget(claimed())
    assert back_off.next(claimed()) == about(2)


def test_of_very_many_runs_the_oldest_is_forgotten() -> None:
    back_off = BackOff()
    for number in range(MOST_RUNS):
        back_off.next(claimed(f"run_{number}"))
    back_off.next(claimed("run_0"))  # heard of again: now run_1 is the oldest
    back_off.next(claimed("run_new"))
    assert back_off.next(claimed("run_0")) == about(8)
    assert back_off.next(claimed("run_1")) == about(2)
