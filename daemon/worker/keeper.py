"""Keeps what was paid for and cannot be decoded, as it came, in a private bucket, for the operator."""

import time
from datetime import timedelta

from daemon.errors import RunError, Undecodable
from daemon.events import Event
from daemon.queue.outbox import Outbox
from daemon.run import ClaimedRun
from daemon.storage.client import Storage
from daemon.storage.keys import kept_key

MAX_BYTES = 52_428_800
"""Size limit of the bucket, if it is made here; `image_jobs.storage_steps` has the same."""
PATIENCE = timedelta(minutes=1)


class Keeper:
    """Uploads files that cannot be decoded.

    Args:
        kept: The private bucket; it is made if it is not there.
        outbox: Takes the event that says where a file is.
        patience: How long a file is kept for a storage that takes none.
    """

    def __init__(self, kept: Storage, outbox: Outbox, *, patience: timedelta = PATIENCE) -> None:
        self._kept = kept
        self._outbox = outbox
        self._patience = patience.total_seconds()

    async def keep(self, run: ClaimedRun, error: Undecodable) -> None:
        """Upload what came; its path goes into an event and into the error's data. Where that fails, the event says so."""
        key = kept_key(run.workflow_id, run.id, run.claim)
        try:
            try:
                await self._upload(key, error)
            except RunError as reason:
                if reason.code != "storage_no_bucket":
                    raise
                await self._kept.create_bucket(max_bytes=MAX_BYTES)
                await self._upload(key, error)
        except (RunError, OSError) as reason:
            why = reason.message if isinstance(reason, RunError) else "the file is not there."
            message = f"What the provider sent cannot be decoded, and could not be kept: {why}"
            self._outbox.record(run, Event("incident", message, "error", error.data))
            return
        error.data["keptPath"] = f"{self._kept.bucket}/{key}"
        message = "What the provider sent cannot be decoded; it is kept as it came."
        self._outbox.record(run, Event("kept", message, "error", error.data))

    async def _upload(self, key: str, error: Undecodable) -> None:
        until = time.monotonic() + self._patience
        await self._kept.upload(
            key,
            error.path,
            content_type="application/octet-stream",
            patience=lambda: until - time.monotonic(),
        )
