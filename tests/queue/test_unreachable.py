"""A provider that cannot be reached is closed for this daemon alone."""

import pytest

from daemon.queue.unreachable import FIRST_PAUSE, LONGEST_PAUSE, STREAK, Unreachable


class Clock:
    """Seconds that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def closed_for(unreachable: Unreachable, clock: Clock) -> float:
    """Move the clock on until the provider is tried again; return the seconds."""
    began = clock.now
    while unreachable.closed():
        clock.now += 0.5
    return clock.now - began


def test_a_streak_of_failed_connections_closes_one_provider(clock: Clock) -> None:
    unreachable = Unreachable(clock)
    for _ in range(STREAK - 1):
        unreachable.failed("openai")
        unreachable.failed("google")
    assert unreachable.closed() == []
    unreachable.failed("openai")
    assert unreachable.closed() == ["openai"]


def test_pauses_double_up_to_a_minute_while_it_stays_so(clock: Clock) -> None:
    unreachable = Unreachable(clock)
    pauses = []
    for _ in range(7):
        for _ in range(2 * STREAK):  # those that were under way with the first do not count
            unreachable.failed("openai")
        pauses.append(closed_for(unreachable, clock))
    assert pauses == [min(FIRST_PAUSE * 2**n, LONGEST_PAUSE) for n in range(7)]


def test_a_response_ends_the_trouble(clock: Clock) -> None:
    unreachable = Unreachable(clock)
    for _ in range(STREAK):
        unreachable.failed("openai")
    unreachable.reached("openai")
    assert unreachable.closed() == []
    unreachable.failed("openai")
    assert unreachable.closed() == []
