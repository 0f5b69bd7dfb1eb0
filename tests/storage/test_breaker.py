"""The breaker: closed until an upload works, and told by every upload."""

import asyncio
from datetime import timedelta

import pytest

from daemon.errors import DISK_CODE, Refused, Retryable, RunError
from daemon.storage import breaker as breakers
from daemon.storage.breaker import Breaker
from tests.support.postgres import wait_until

AWAY = Retryable("Storage does not work at the moment (status 500).", code="storage_unavailable", hint="Wait.")


def open_breaker() -> Breaker:
    breaker = Breaker()
    breaker.passed()
    return breaker


def test_breaker_is_closed_until_a_look_has_passed() -> None:
    opened: list[int] = []
    breaker = Breaker(lambda: opened.append(1))
    assert breaker.closed
    breaker.passed()
    breaker.passed()
    assert (breaker.closed, opened) == (False, [1])


@pytest.mark.parametrize(
    ("errors", "closed"),
    [
        ([AWAY], False),
        ([AWAY, AWAY], True),
        ([AWAY, None, AWAY], False),
        ([AWAY, Refused("Too large.", code="storage_too_large", hint="")], False),
        ([Refused("No bucket.", code="storage_no_bucket", hint="")], True),
        ([Refused("No key.", code="storage_unauthorized", hint="")], True),
        ([Retryable("No files.", code=DISK_CODE, hint="")] * 5, False),
    ],
)
def test_breaker_closes_where_others_would_fail(errors: list[RunError | None], closed: bool) -> None:
    breaker = open_breaker()
    for error in errors:
        breaker.passed() if error is None else breaker.failed(error)
    assert breaker.closed is closed
    assert (breaker.reason is not None) is closed
    breaker.passed()
    assert not breaker.closed


async def test_closed_breaker_looks_until_an_upload_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakers, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(breakers, "LONGEST_PAUSE", 0.01)
    breaker, looks, works = Breaker(), 0, asyncio.Event()

    async def probe() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise KeyError("a bug")
        if not works.is_set():
            raise AWAY

    running = asyncio.create_task(breaker.run(probe))
    for _ in range(2):
        seen = looks
        await wait_until(lambda seen=seen: looks > seen + 3)
        assert breaker.closed
        works.set()
        await wait_until(lambda: not breaker.closed)
        seen = looks
        await asyncio.sleep(0.05)
        assert looks == seen
        works.clear()
        breaker.failed(AWAY)
        breaker.failed(AWAY)
    running.cancel()


async def test_look_waits_as_long_as_storage_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakers, "FIRST_PAUSE", 0.001)
    breaker, looks = Breaker(), 0

    async def probe() -> None:
        nonlocal looks
        looks += 1
        raise Retryable("Busy.", code="storage_unavailable", hint="", retry_in=timedelta(seconds=30))

    running = asyncio.create_task(breaker.run(probe))
    await asyncio.sleep(0.1)
    assert looks == 1
    running.cancel()
