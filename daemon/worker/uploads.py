"""Uploads a picture, its thumbnail, its conversation and further pictures.

All of it is paid for. So a storage that is away is waited for, and only the picture itself is indispensable.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args

import structlog

from daemon.errors import Refused, RunError, not_stored
from daemon.images import ImageInfo
from daemon.providers import Generated
from daemon.queue.lease import Lease
from daemon.queue.outbox import Outbox
from daemon.run import ClaimedRun
from daemon.storage.client import Storage
from daemon.storage.keys import conversation_key, extra_key, thumbnail_key
from daemon.storage.objects import ClaimLost
from daemon.worker import object_metadata
from daemon.worker.inspector import Inspection, Inspector
from daemon.worker.late_uploads import LateUploads

log = structlog.stdlib.get_logger()

STORAGE_AWAY = timedelta(minutes=1)
"""How long a picture is kept while storage takes no uploads: to make it again would cost more."""

LONG = 0.5
"""Seconds of uploading after which the claim is confirmed once more."""

Companion = Literal["thumbnailUrl", "context"]
"""A file that is stored with a picture, by the field of its warning."""
COMPANIONS: tuple[Companion, ...] = get_args(Companion)


class Uploads:
    """Uploads files of runs.

    Args:
        storage: Supabase Storage.
        conversations: Another bucket of it, which is not public, for conversations.
        outbox: Confirms right before each upload that the claim still holds.
        lease: No upload begins without a fresh one.
        inspector: Inspects further pictures.
        late: Puts right what an upload of a lost claim has overwritten.
        storage_away: How long a run's files are kept for a storage that takes none.
    """

    def __init__(
        self,
        storage: Storage,
        conversations: Storage,
        outbox: Outbox,
        lease: Lease,
        inspector: Inspector,
        *,
        late: LateUploads,
        storage_away: timedelta = STORAGE_AWAY,
    ) -> None:
        self._storage = storage
        self._conversations = conversations
        self._outbox = outbox
        self._lease = lease
        self._inspector = inspector
        self._late = late
        self._storage_away = storage_away.total_seconds()

    def patience(self) -> Callable[[], float]:
        """Return the time that is left for storing a run's files: one deadline for all of them, from now on."""
        until = time.monotonic() + self._storage_away
        return lambda: until - time.monotonic()

    async def _upload(
        self,
        run: ClaimedRun,
        key: str,
        file: Path,
        patience: Callable[[], float],
        *,
        content_type: str,
        metadata: Mapping[str, str] | None = None,
        into: Storage | None = None,
    ) -> int:
        """Upload a file that was paid for; return how often that was tried."""

        async def held() -> bool:
            await self._lease.wait_fresh()
            return await self._outbox.confirm(run)

        def waiting() -> None:
            self._outbox.record(run, message="Storage does not answer. The image is kept until it does.")

        return await (into or self._storage).upload(
            key,
            file,
            content_type=content_type,
            metadata={**object_metadata.ours(run), **(metadata or {})},
            private=await self._storage.is_private(),
            may_write=held,
            may_go_on=lambda: self._lease.fresh,
            patience=patience,
            waiting=waiting,
        )

    async def further(
        self, run: ClaimedRun, made: Generated, seen: Inspection, patience: Callable[[], float]
    ) -> tuple[list[str], list[RunError]]:
        """Upload further pictures side by side; return the keys of those that arrived, and the errors of the others."""

        async def upload(number: int, image: Path, info: ImageInfo | None) -> str:
            info = info or (await self._inspector.inspect(image)).info
            key = extra_key(run.workflow_id, run.id, number, info.extension)
            await self._upload(run, key, image, patience, content_type=info.content_type)
            return key

        keys: list[str] = []
        missing: list[RunError] = []
        pictures = [*((image, None) for image in made.extra), *seen.quarters]
        uploads = (upload(number, *picture) for number, picture in enumerate(pictures, 1))
        for result in await asyncio.gather(*uploads, return_exceptions=True):
            match result:
                case str():
                    keys.append(result)
                case ClaimLost():
                    raise result
                case Exception():
                    missing.append(_missing(run, result))
                case _:
                    raise result
        return keys, missing

    async def picture(
        self,
        run: ClaimedRun,
        key: str,
        made: Generated,
        seen: Inspection,
        *,
        patience: Callable[[], float],
        extra: Sequence[str],
    ) -> tuple[int, dict[Companion, RunError]]:
        """Upload the picture and its companions side by side. Companions are not waited for once the picture is stored.

        Returns:
            The tries that the picture took, and the errors of its companions: a picture that is stored is not thrown away
            for want of one.
        """

        info, ended = seen.info, False

        def beside_it() -> float:
            return 0.0 if ended else patience()

        async def main() -> int:
            nonlocal ended
            metadata = object_metadata.describe(run, info, extra, made.cost)
            await self._late.copy(run, key, made.path, content_type=info.content_type, metadata=metadata)
            try:
                return await self._upload(
                    run, key, made.path, patience, content_type=info.content_type, metadata=metadata
                )
            finally:
                ended = True

        async def thumbnail() -> None:
            if seen.thumbnail is None:
                raise Refused(seen.flaw or "None was made.", code="no_thumbnail", hint="The image itself is stored.")
            where, of = thumbnail_key(run.workflow_id, run.id), {"sha256": info.sha256}
            await self._late.copy(run, where, seen.thumbnail, content_type="image/webp", metadata=of)
            await self._upload(run, where, seen.thumbnail, beside_it, content_type="image/webp", metadata=of)

        conversation = self._conversation(run, made, beside_it)
        async with self._late.watched(run, (key, thumbnail_key(run.workflow_id, run.id)), info.sha256):
            started = time.monotonic()
            tries, *others = await asyncio.gather(main(), thumbnail(), conversation, return_exceptions=True)
            if isinstance(tries, BaseException):
                raise tries
            # An upload that took long may have been frozen, and come after another's.
            if time.monotonic() - started > LONG:
                await self._confirm(run)
        beside: dict[Companion, RunError] = {}
        for field, error in zip(COMPANIONS, others, strict=True):
            if isinstance(error, Exception) and not isinstance(error, ClaimLost):
                beside[field] = _missing(run, error)
            elif error is not None:
                raise error
        return tries, beside

    async def _confirm(self, run: ClaimedRun) -> None:
        """Make sure that the claim still holds.

        Raises:
            ClaimLost: If it does not.
        """
        if not await self._outbox.confirm(run):
            raise ClaimLost(run.id)

    async def _conversation(self, run: ClaimedRun, made: Generated, patience: Callable[[], float]) -> None:
        """Upload the conversation that made a picture, where there is one."""
        if made.conversation is not None:
            where, into = conversation_key(run.workflow_id, run.id), self._conversations
            await self._upload(run, where, made.conversation, patience, content_type="application/json", into=into)


def _missing(run: ClaimedRun, error: Exception) -> RunError:
    """Return why a file beside a picture is not stored. The picture is there and paid for, whatever is wrong with the file."""
    if isinstance(error, (RunError, OSError)):
        return not_stored(error)
    log.error("file.not_stored", run_id=run.id, exc_info=error)
    return Refused("Something went wrong inside the daemon.", code="internal", hint="Its log has the details.")
