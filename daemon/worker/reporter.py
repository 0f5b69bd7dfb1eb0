"""The `Reporter` of a run: passes progress, previews and events to the outbox, at most one progress write a second."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from daemon.calls import Call, State
from daemon.errors import Retryable
from daemon.events import Event
from daemon.providers import Generated
from daemon.queue.lease import Lease
from daemon.queue.outbox import Outbox
from daemon.run import ClaimedRun

INTERVAL = 1.0
"""Seconds between two progress writes of one run; Realtime drops what comes faster, without a word."""


class RunReporter:
    """The `Reporter` of one attempt, and the flags by which its outcome is chosen.

    Providers call it from the event loop; their calls return at once.

    `deferred`: its response will be a provider job's id.
    `accounted`: the cost is written down, and the picture is being stored. `dropped`: the claim is lost. `model` draws;
    None where that was settled by an earlier claim. `lease`: nothing is sent without a fresh one. `paid`: the call of the
    picture that came. `asked`: the provider was asked about the provider job.
    `webhook_wait`: if no response arrives, a webhook will name the provider job within that time. So the request is not
    sent again before, by this daemon or by one that takes over (see `image_jobs.webhook_wait`). None where none will.
    `http_status`: how the provider has answered; None where no answer came.

    Args:
        outbox: Where progress and events go.
        run: The run.
        show: Stores a preview and returns its public URL, or None if that failed.
    """

    def __init__(self, outbox: Outbox, run: ClaimedRun, show: Callable[[Path], Awaitable[str | None]]) -> None:
        self._outbox = outbox
        self._run = run
        self._show = show
        self._percent = 0
        self._message: str | None = None
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._preview: asyncio.Task[None] | None = None
        self._estimate: float | None = None
        self._closed = False
        self._sent_at: float | None = None
        self._image_at: float | None = None
        self.deferred = False
        self.asked = False
        self.accounted = False
        self.dropped = False
        self.webhook_wait: timedelta | None = None
        self.http_status: int | None = None
        self.model: str | None = None
        self.lease: Lease | None = None
        self.paid: Call | None = None

    @property
    def processor(self) -> str:
        """The `provider:model` at work, whose costs they are."""
        return self._run.processor

    @property
    def estimate(self) -> float | None:
        """Cost of the request that was sent, in USD; None where unknown."""
        return self._estimate

    @property
    def sent(self) -> bool:
        """Whether the request went out, so that it may have been paid for."""
        return self._sent_at is not None

    @property
    def requested(self) -> bool:
        """Whether anything of this run lies at the provider: by this attempt, or as a provider job that is checked, or should be."""
        return self.sent or self._run.provider_job_id is not None or self._run.job_lost

    def call(
        self, state: State, *, cost: float | None = None, image: bool = False, provider_job_id: str | None = None
    ) -> Call:
        """Return what became of the call of this attempt."""
        return Call(
            id=self._run.call,
            state=state,
            cost=cost,
            estimate=self._estimate,
            model=self.model,
            provider_job_id=provider_job_id,
            sent_at=self._sent_at,
            image=image,
            image_at=self._image_at if image else None,
        )

    def submitted(self, request: Mapping[str, Any], *, estimate: float | None = None, deferred: bool = False) -> None:
        """Record the request that is about to go out: from here on it may be paid for.

        Raises:
            Retryable: If it must not go out any more: others may have taken the run over.
        """
        if self.dropped or (self.lease is not None and not self.lease.fresh):
            raise Retryable(
                "The daemon lost touch with the database before the request was sent.",
                code="lease_lapsed",
                hint="Nothing was sent or paid.",
                accepted=False,
            )
        self._sent_at = time.monotonic()
        self.deferred = deferred
        if not deferred:
            self.webhook_wait = None
        self._estimate = estimate
        data: dict[str, Any] = {"request": dict(request), "estimate": estimate}
        if self.webhook_wait is not None:
            data["webhookWait"] = self.webhook_wait.total_seconds()
        call = Call(id=self._run.call, estimate=estimate, model=self.model, sent_at=self._sent_at)
        self._outbox.record(self._run, Event("submitted", "The request goes to the provider.", data=data), calls=[call])

    def progress(self, percent: float, message: str | None = None) -> None:
        """Keep the highest value, and write it now or when the second is over."""
        self._percent = max(self._percent, min(int(percent), 99))
        self._message = message or self._message
        wait = self._last + INTERVAL - time.monotonic()
        if wait <= 0:
            self._write()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(wait, self._write)

    def preview(self, image: Path) -> None:
        """Show a forming picture, unless the one before is still on its way: then the newest wins later."""
        if self._preview is None or self._preview.done():
            self._preview = asyncio.create_task(self._publish(image), name=f"preview of {self._run.id}")

    def warning(self, message: str, *, field: str | None = None, **data: Any) -> None:
        """Record a field of the request that the model cannot honour."""
        if field is not None:
            data["field"] = field
        self._outbox.record(self._run, Event("warning", message, data=data))

    def incident(self, message: str, **data: Any) -> None:
        """Record a malfunction that the operator should look into."""
        self._outbox.record(self._run, Event("incident", message, "error", data))

    async def generated(self, made: Generated) -> bool:
        """Record that the image came and what it cost; return whether the run is still held.

        If it is, its cost is known from here on, whatever happens to this daemon, and so is all that an adoption of the
        picture needs. If not, only its cost was written.
        """
        optional = {
            "originalUrl": made.shown_url,
            "revisedPrompt": made.revised_prompt,
            **made.data,
        }
        data: dict[str, Any] = {"ticket": self._run.ticket, "cost": made.cost, "processor": self.processor}
        used = {"seed": made.seed, "quality": made.quality}
        data |= {name: value for name, value in (*optional.items(), *used.items()) if value is not None}
        event = Event("generated", "The provider made the image.", data=data)
        self._image_at = time.monotonic()
        self.paid = self.call("charged", cost=made.cost, image=True)
        self.accounted = await self._outbox.confirm(self._run, event, message="Storing the image.", calls=[self.paid])
        return self.accounted

    async def shown(self) -> None:
        """Wait until a preview that is on its way is shown: a parked run has no task to wait for it."""
        if self._preview is not None:
            await asyncio.wait([self._preview])
            await self._outbox.confirm(self._run)

    def close(self) -> None:
        """Write nothing more from now on: the settlement is the last write.

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
        self._outbox.record(self._run, progress=self._percent, message=self._message)

    async def _publish(self, image: Path) -> None:
        url = await self._show(image)
        if url is not None and not self._closed:
            self._outbox.record(self._run, preview_url=url)
