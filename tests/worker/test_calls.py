"""Cancelled calls: a submit is waited for a moment longer, all others are broken off."""

import asyncio
from datetime import timedelta

import pytest

from daemon.errors import OutcomeUnknown, Refused
from daemon.worker import calls
from daemon.worker.calls import finish_call

LONG = timedelta(minutes=1)


class Call:
    """A call whose response the test decides."""

    def __init__(self, *, submitting: bool, timeout: timedelta = LONG) -> None:
        self.response: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.begun = asyncio.Event()
        self.broken_off = False
        self.task = asyncio.create_task(finish_call(self._make(), timeout=timeout, submitting=lambda: submitting))

    async def _make(self) -> str:
        self.begun.set()
        try:
            return await self.response
        except asyncio.CancelledError:
            self.broken_off = True
            raise

    async def cancel(self) -> None:
        """Cancel it once it has begun."""
        await self.begun.wait()
        self.task.cancel()
        await asyncio.sleep(0)


async def test_cancelled_call_is_broken_off_at_once() -> None:
    call = Call(submitting=False)
    await call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    assert call.broken_off


async def test_response_to_a_submit_is_returned_despite_cancellation() -> None:
    call = Call(submitting=True)
    await call.cancel()
    call.response.set_result("job-1")
    assert await call.task == "job-1"
    assert call.task.cancelling() == 0
    assert not call.broken_off


async def test_refused_submit_is_refused_despite_cancellation() -> None:
    call = Call(submitting=True)
    await call.cancel()
    call.response.set_exception(Refused("No.", code="no", hint=""))
    with pytest.raises(Refused):
        await call.task


async def test_cancelled_submit_of_unknown_outcome_is_broken_off() -> None:
    call = Call(submitting=True)
    await call.cancel()
    call.response.set_exception(OutcomeUnknown("It broke.", code="outcome_unknown", hint=""))
    with pytest.raises(asyncio.CancelledError):
        await call.task


async def test_submit_that_is_cancelled_twice_is_broken_off() -> None:
    call = Call(submitting=True)
    await call.cancel()
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    assert call.broken_off


async def test_submit_is_waited_for_within_its_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "SUBMIT_GRACE", 0.05)
    call = Call(submitting=True)
    await call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(call.task, 5)
    assert call.broken_off


@pytest.mark.parametrize("submitting", [False, True])
async def test_slow_call_is_a_timeout_and_no_cancellation(submitting: bool) -> None:
    call = Call(submitting=submitting, timeout=timedelta(seconds=0.05))
    with pytest.raises(TimeoutError):
        await call.task
    assert call.broken_off
    assert call.task.cancelling() == 0
