"""What a provider says while it works, on its way into the database: at most one write a second and run."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from daemon.providers import Generated
from daemon.queue import Claimed
from daemon.turns import Turns

INTERVAL = 1.0
"""Seconds between two progress writes of one run; Realtime drops what comes faster, without a word."""


def event(name: str, message: str, *, kind: str = "log", **data: Any) -> dict[str, Any]:
    """An entry of the audit trail. `kind` is progress, log or error; empty data is left out.

    The id is for the write whose acknowledgement is lost: sent again, the event (and its cost) still counts once.
    """
    payload: dict[str, Any] = {"event": name, "message": message}
    if data:
        payload["data"] = data
    return {"id": str(uuid4()), "kind": kind, "payload": payload}


class RunReporter:
    """The `Reporter` of one run. Providers call it from the event loop; nothing here waits.

    `webhook_wait`: if nothing more is heard of an order, a webhook will tell within that time that it was taken. So it is
    not made again before, by this daemon or by one that takes over (see `private.webhook_wait`). None where none will.

    Args:
        turns: Where progress goes.
        run: The run.
        show: Stores a preview and answers its public URL, or None if it came to nothing.
    """

    def __init__(self, turns: Turns, run: Claimed, show: Callable[[Path], Awaitable[str | None]]) -> None:
        self._turns = turns
        self._run = run
        self._show = show
        self._percent = 0
        self._message: str | None = None
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._preview: asyncio.Task[None] | None = None
        self._estimate: float | None = None
        self._closed = False
        self.sent = False
        self.ordered = False
        self.webhook_wait: timedelta | None = None
        self.accounted = False

    @property
    def processor(self) -> str:
        """Who is at work, as `provider:model`: whose costs they are."""
        return self._run.processor

    @property
    def estimate(self) -> float | None:
        """What the call that was sent may cost, in USD; None where unknown."""
        return self._estimate

    def submitted(self, request: Mapping[str, Any], *, estimate: float | None = None, order: bool = False) -> None:
        """The request is about to go out: from here on it may be paid for."""
        self.sent = True
        self.ordered = order
        if not order:
            self.webhook_wait = None
        self._estimate = estimate
        data: dict[str, Any] = {"request": dict(request), "estimate": estimate}
        if self.webhook_wait is not None:
            data["webhookWait"] = self.webhook_wait.total_seconds()
        self._turns.record(self._run, events=[event("submitted", "The request goes to the provider.", **data)])

    def progress(self, percent: float, message: str | None = None) -> None:
        """Keeps the highest value, and writes it now or when the second is over."""
        self._percent = max(self._percent, min(int(percent), 99))
        self._message = message or self._message
        wait = self._last + INTERVAL - time.monotonic()
        if wait <= 0:
            self._write()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(wait, self._write)

    def preview(self, image: Path) -> None:
        """Shows a forming picture, unless the one before is still on its way: then the newest wins later."""
        if self._preview is None or self._preview.done():
            self._preview = asyncio.create_task(self._publish(image), name=f"preview of {self._run.id}")

    def warning(self, message: str, *, field: str | None = None, **data: Any) -> None:
        """An event that names what the model cannot do."""
        if field is not None:
            data["field"] = field
        self._turns.record(self._run, events=[event("warning", message, **data)])

    def incident(self, message: str, **data: Any) -> None:
        """An event for the operator: something that should work does not."""
        self._turns.record(self._run, events=[event("incident", message, kind="error", **data)])

    async def generated(self, made: Generated) -> bool:
        """Writes down that the image came and what it cost; answers whether the run is still ours.

        If it is, its cost is known from here on, whatever happens to this daemon, and so is all that an adoption of the
        picture needs to know. If not, nothing was written.
        """
        known = {
            "originalUrl": made.shown_url,
            "revisedPrompt": made.revised_prompt,
            **made.data,
        }
        data: dict[str, Any] = {"ticket": self._run.ticket, "cost": made.cost, "processor": self.processor}
        data |= {name: value for name, value in known.items() if value is not None}
        self.accounted = await self._turns.confirm(
            self._run,
            events=[event("generated", "The provider made the image.", **data)],
            message="Storing the image.",
        )
        return self.accounted

    async def shown(self) -> None:
        """Waits until a preview that is on its way is on display: a run that is parked has nobody to wait for it."""
        if self._preview is not None:
            await asyncio.wait([self._preview])
            await self._turns.confirm(self._run)

    def close(self) -> None:
        """Nothing more is written from now on; the settlement has the last word.

        Waits for nothing, so that no cancellation can come between a run's outcome and its settlement.
        """
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._preview is not None:
            self._preview.cancel()

    def _write(self) -> None:
        self._timer = None
        self._last = time.monotonic()
        self._turns.record(self._run, progress=self._percent, message=self._message)

    async def _publish(self, image: Path) -> None:
        url = await self._show(image)
        if url is not None and not self._closed:
            self._turns.record(self._run, preview_url=url)
