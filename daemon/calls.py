"""A call to a provider, which may be taken away while it is under way."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, TypeVar

from daemon.errors import OutcomeUnknown

T = TypeVar("T")

LAST_WORD = 8.0
"""Seconds that an order is waited for after its run was taken away: shorter than a daemon that must leave has."""


async def answered(call: Coroutine[Any, Any, T], *, timeout: timedelta, ordered: Callable[[], bool]) -> T:
    """The answer to a call.

    When the caller is cancelled, the call is broken off. But if it is an order that has been sent, its answer is waited for
    a moment longer and is the result: only by the id in it the order can be cancelled, or fetched by another daemon.

    Args:
        call: What makes the call.
        timeout: How long it may take.
        ordered: Whether an order has been sent.

    Raises:
        TimeoutError: If it takes longer.
    """

    async def in_time() -> T:
        async with asyncio.timeout(timeout.total_seconds()):
            return await call

    answer = asyncio.create_task(in_time())
    try:
        return await asyncio.shield(answer)
    except asyncio.CancelledError:
        if not ordered():
            raise
        try:
            async with asyncio.timeout(LAST_WORD):
                last = await answer
        except (OutcomeUnknown, TimeoutError):
            raise asyncio.CancelledError from None
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
        return last
    finally:
        if not answer.done():
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
