"""Calls that are taken away: what is broken off, and what is waited for a moment longer."""

import asyncio
from datetime import timedelta

import pytest

from daemon import calls
from daemon.calls import answered
from daemon.errors import OutcomeUnknown, Refused

LONG = timedelta(minutes=1)


class Call:
    """A call that answers when it is told to."""

    def __init__(self, *, order: bool, timeout: timedelta = LONG) -> None:
        self.answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.begun = asyncio.Event()
        self.broken_off = False
        self.task = asyncio.create_task(answered(self._make(), timeout=timeout, ordered=lambda: order))

    async def _make(self) -> str:
        self.begun.set()
        try:
            return await self.answer
        except asyncio.CancelledError:
            self.broken_off = True
            raise

    async def taken_away(self) -> None:
        """Takes it away once it has begun."""
        await self.begun.wait()
        self.task.cancel()
        await asyncio.sleep(0)


async def test_a_call_that_is_taken_away_is_broken_off_at_once() -> None:
    call = Call(order=False)
    await call.taken_away()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    assert call.broken_off


async def test_the_answer_to_an_order_is_the_result_although_the_call_was_taken_away() -> None:
    call = Call(order=True)
    await call.taken_away()
    call.answer.set_result("order-1")
    assert await call.task == "order-1"
    assert call.task.cancelling() == 0
    assert not call.broken_off


async def test_a_refused_order_is_refused_although_the_call_was_taken_away() -> None:
    call = Call(order=True)
    await call.taken_away()
    call.answer.set_exception(Refused("No.", code="no", hint=""))
    with pytest.raises(Refused):
        await call.task


async def test_an_order_that_is_taken_away_and_comes_to_nothing_known_counts_as_broken_off() -> None:
    call = Call(order=True)
    await call.taken_away()
    call.answer.set_exception(OutcomeUnknown("It broke.", code="outcome_unknown", hint=""))
    with pytest.raises(asyncio.CancelledError):
        await call.task


async def test_an_order_that_is_taken_away_twice_is_broken_off() -> None:
    call = Call(order=True)
    await call.taken_away()
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    assert call.broken_off


async def test_an_order_is_not_waited_for_longer_than_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "LAST_WORD", 0.05)
    call = Call(order=True)
    await call.taken_away()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(call.task, 5)
    assert call.broken_off


@pytest.mark.parametrize("order", [False, True])
async def test_a_call_that_takes_too_long_is_a_timeout_and_no_cancellation(order: bool) -> None:
    call = Call(order=order, timeout=timedelta(seconds=0.05))
    with pytest.raises(TimeoutError):
        await call.task
    assert call.broken_off
    assert call.task.cancelling() == 0
