"""Bounds a call to a provider, and saves the response to a submit whose run is taken away meanwhile."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, TypeVar

from daemon.errors import OutcomeUnknown

T = TypeVar("T")

SUBMIT_GRACE = 8.0
"""Seconds that a submit's response is waited for after its run was taken away: shorter than a daemon that must leave has."""


async def finish_call(call: Coroutine[Any, Any, T], *, timeout: timedelta, submitting: Callable[[], bool]) -> T:
    """Return the result of a call.

    When the caller is cancelled, the call is broken off. But if it has submitted a provider job, its response is waited for
    `SUBMIT_GRACE` longer and returned: only by the id in it the job can be cancelled, or fetched by another daemon.

    Args:
        call: The coroutine that makes the call.
        timeout: How long it may take.
        submitting: Returns whether a provider job has been submitted.

    Raises:
        TimeoutError: If it takes longer.
    """

    async def in_time() -> T:
        async with asyncio.timeout(timeout.total_seconds()):
            return await call

    response = asyncio.create_task(in_time())
    try:
        return await asyncio.shield(response)
    except asyncio.CancelledError:
        if not submitting():
            raise
        try:
            async with asyncio.timeout(SUBMIT_GRACE):
                last = await response
        except (OutcomeUnknown, TimeoutError):
            raise asyncio.CancelledError from None
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
        return last
    finally:
        if not response.done():
            response.cancel()
            await asyncio.gather(response, return_exceptions=True)
