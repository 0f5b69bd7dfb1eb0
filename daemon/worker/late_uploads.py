"""Puts right what an upload of a lost claim has overwritten.

A daemon that froze in mid-upload, or whose upload storage has kept waiting, may replace the picture with which another has
finished the run meanwhile, before a requeue or since. No picture can be uploaded on a condition. So an attempt that follows
a lost claim which had a picture in hand puts a copy of its own beside, in the bucket `…-kept`, before it stores it; and the
daemon that lost its claim in mid-upload looks afterwards whether its own picture lies there, and brings the copy back. The
copy goes after an hour: no storage waits that long for the rest of an upload.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from daemon.errors import RunError
from daemon.run import ClaimedRun
from daemon.storage.client import Storage
from daemon.storage.keys import copy_key
from daemon.storage.objects import ClaimLost, StoredObject
from daemon.worker import object_metadata
from daemon.worker.workdirs import Workdirs

log = structlog.stdlib.get_logger()

LOOKS = (0.0, 2.0, 10.0, 60.0)
"""Seconds between the looks: storage may complete an upload after the daemon has broken it off."""
COPY_KEPT = 3600.0
"""Seconds until a copy is removed. That of a daemon which ends before stays."""
COPY_TIMEOUT = 5.0
"""Seconds for a copy: the picture itself waits for it, and is worth more."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of an object that was stored under a ticket; `key` is the object's."""

    run: ClaimedRun
    key: str


@dataclass(frozen=True, slots=True)
class LateUpload:
    """Uploads of a run whose claim was lost before they were known to have ended; `sha256` is the picture's."""

    run: ClaimedRun
    keys: Sequence[str]
    sha256: str


class LateUploads:
    """Looks after late uploads, in the background: the run's own task is cancelled when its claim is lost.

    Args:
        storage: The bucket of images.
        kept: The bucket of the copies.
        workdirs: Where a copy lies until it is back.
        max_bytes: Size of the largest picture.
    """

    def __init__(self, storage: Storage, kept: Storage, workdirs: Workdirs, *, max_bytes: int) -> None:
        self._storage = storage
        self._kept = kept
        self._workdirs = workdirs
        self._max_bytes = max_bytes
        self._noted: asyncio.Queue[LateUpload | Copy] = asyncio.Queue()

    @asynccontextmanager
    async def watched(self, run: ClaimedRun, keys: Sequence[str], sha256: str) -> AsyncGenerator[None]:
        """Look afterwards whether the uploads in this block were late, if the claim is lost or given up meanwhile."""
        try:
            yield
        except (asyncio.CancelledError, ClaimLost):
            self._noted.put_nowait(LateUpload(run, keys, sha256))
            raise

    async def run(self) -> None:
        """Look after what is noted, until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                match await self._noted.get():
                    case LateUpload() as late:
                        group.create_task(self._look_after(late), name=f"late upload of {late.run.id}")
                    case Copy() as copy:
                        group.create_task(self._remove(copy), name=f"copy of {copy.run.id}")

    async def copy(
        self, run: ClaimedRun, key: str, file: Path, *, content_type: str, metadata: Mapping[str, str]
    ) -> None:
        """Keep a copy of a file that is about to be stored, if a lost claim may still be storing its own."""
        if run.generated is None and not run.contested:
            return
        metadata = {**metadata, "ticket": str(run.ticket)}
        try:
            async with asyncio.timeout(COPY_TIMEOUT):
                await self._kept.upload(copy_key(key), file, content_type=content_type, metadata=metadata)
        except (RunError, OSError) as error:
            log.warning("copy.not_kept", run_id=run.id, error=str(error) or f"It took more than {COPY_TIMEOUT:.0f} s.")
        self._noted.put_nowait(Copy(run, key))

    async def _remove(self, copy: Copy) -> None:
        """Remove a copy once it is old, unless it is by then one of a later ticket."""
        await asyncio.sleep(COPY_KEPT)
        key = copy_key(copy.key)
        try:
            found = await self._kept.find(key)
            if found is not None and _ticket(found) <= copy.run.ticket:
                await self._kept.remove([key])
        except Exception as error:  # noqa: BLE001 - it only takes room
            log.warning("copy.not_removed", run_id=copy.run.id, error=str(error))

    async def _look_after(self, late: LateUpload) -> None:
        for pause in LOOKS:
            await asyncio.sleep(pause)
            for key in late.keys:
                try:
                    await self._put_right(late, key)
                except (RunError, OSError) as error:
                    log.warning("late_upload.not_looked_at", run_id=late.run.id, error=str(error))
                except Exception:  # a bug of ours must not end the daemon
                    log.exception("late_upload.not_looked_at", run_id=late.run.id)

    async def _put_right(self, late: LateUpload, key: str) -> None:
        copy = await self._kept.find(copy_key(key))
        if copy is None or object_metadata.sha256(copy) == late.sha256 or _ticket(copy) < late.run.ticket:
            return
        found = await self._storage.find(key)
        if found is None or object_metadata.sha256(found) != late.sha256:
            return
        with self._workdirs.new() as folder:
            file = Path(folder) / "copy"
            await self._kept.download(copy_key(key), file, max_bytes=self._max_bytes)
            private = await self._storage.is_private()
            await self._storage.upload(
                key, file, content_type=copy.content_type, metadata=copy.metadata, private=private
            )
        log.warning("late_upload.put_right", run_id=late.run.id, key=key)


def _ticket(found: StoredObject) -> int:
    ticket = found.metadata.get("ticket", "")
    return int(ticket) if ticket.isdecimal() else 0
