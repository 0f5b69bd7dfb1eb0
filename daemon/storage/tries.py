"""Tries of a request: how many, and with which pauses."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type
from tenacity.wait import wait_exponential_jitter

from daemon.errors import Retryable

T = TypeVar("T")

TRIES = 3
"""At least, of each request whose error is retryable."""
LONGEST_PAUSE = 10.0
"""Seconds between two tries, unless Storage asks for more."""


async def persist(
    once: Callable[[], Awaitable[T]],
    *,
    first_wait: float,
    patience: Callable[[], float],
    waiting: Callable[[], None],
) -> T:
    """Run `once` until it succeeds, is refused, or has failed three times and patience is over.

    Args:
        once: Raises Retryable for what may pass.
        first_wait: Seconds before the second try; doubled before each further one, with jitter.
        patience: Returns the seconds for which more than three tries are made, from now.
        waiting: Called once, when three tries have failed and more are made.

    Raises:
        Retryable, Refused: Those of the last try.
    """
    growing = wait_exponential_jitter(initial=first_wait, jitter=first_wait, max=LONGEST_PAUSE)

    def over(state: RetryCallState) -> bool:
        return state.attempt_number >= TRIES and patience() <= 0

    def pause(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        wanted = error.retry_in if isinstance(error, Retryable) else None
        seconds = growing(state) if wanted is None else max(wanted.total_seconds(), first_wait)
        # The last try is made when patience ends.
        return min(seconds, patience() if patience() > 0 else LONGEST_PAUSE)

    def before_sleep(state: RetryCallState) -> None:
        if state.attempt_number == TRIES:
            waiting()

    return await AsyncRetrying(
        stop=over,
        wait=pause,
        retry=retry_if_exception_type(Retryable),
        before_sleep=before_sleep,
        reraise=True,
    )(once)
