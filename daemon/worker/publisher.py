"""store: from a picture on disk to its URL.

Inspects what the provider made, uploads it with its thumbnail, makes sure that a public URL opens, and returns the run's
outcome. A picture that has been made is paid for: nothing here ever asks for another one.
"""

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

from daemon import images
from daemon.calls import Call
from daemon.errors import Retryable, RunError, Undecodable, not_stored
from daemon.events import Event
from daemon.providers import Generated
from daemon.providers.catalogue import Resolved
from daemon.queue.lease import Lease
from daemon.run import ClaimedRun
from daemon.storage.client import Storage
from daemon.storage.keys import object_key, preview_key, thumbnail_key
from daemon.storage.objects import ClaimLost, StoredObject
from daemon.worker import object_metadata
from daemon.worker.inspector import Inspection, Inspector
from daemon.worker.keeper import Keeper
from daemon.worker.outcomes import Completed, Failed, Failure, Picture, Released
from daemon.worker.uploads import Companion, Uploads

log = structlog.stdlib.get_logger()

PREVIEW_SECONDS = 2.0
"""Seconds that a preview may take: the run may have to wait for it before it parks, and the picture itself comes soon."""

_WITHOUT: Mapping[Companion, str] = {
    "thumbnailUrl": "The image has no thumbnail",
    "context": "The conversation that made the image is not kept",
}
"""The warning where a companion of the picture could not be stored."""


class Publisher:
    """Stores pictures of runs.

    Args:
        storage: Supabase Storage.
        uploads: Uploads files that were paid for.
        inspector: Inspects pictures.
        keeper: Keeps what cannot be decoded.
        lease: No preview is stored without a fresh one.
    """

    def __init__(self, storage: Storage, uploads: Uploads, inspector: Inspector, keeper: Keeper, lease: Lease) -> None:
        self._storage = storage
        self._uploads = uploads
        self._keeper = keeper
        self._inspector = inspector
        self._lease = lease

    async def publish(
        self, run: ClaimedRun, model: Resolved, made: Generated, workdir: Path
    ) -> Completed | Failed | Released:
        """Store the picture; return the run's outcome, also where storing fails."""
        unused = Event("unused", "The run was taken away while its image was being stored; it was not used.")
        try:
            patience = self._uploads.patience()
            seen = await self._inspect(run, made, workdir)
            info = seen.info
            key = object_key(run.workflow_id, run.id, info.extension)
            # Before the picture itself: where that lies, an adoption finds them, too.
            extra, missing = await self._uploads.further(run, made, seen, patience)
            tries, beside = await self._uploads.picture(run, key, made, seen, patience=patience, extra=extra)
        except ClaimLost:
            return Released(if_lost=unused)
        except (RunError, OSError) as reason:
            error = not_stored(reason)
            failed = Event("store_failed", error.message, "error", error.data)
            return Failed(Failure.of(error), events=[failed], if_lost=unused)
        stored_at = time.monotonic()
        stored = Event("stored", "The image is in storage.", data={"uploadTries": tries, "bytes": info.bytes})
        url, warnings = await self._announce(key, info.sha256)
        small = None if "thumbnailUrl" in beside else thumbnail_key(run.workflow_id, run.id)
        return Completed(
            picture=Picture(
                original_url=made.shown_url,
                revised_prompt=made.revised_prompt,
                width=info.width,
                height=info.height,
                content_type=info.content_type,
                bytes=info.bytes,
                cost=made.cost,
                seed=made.seed,
                quality=made.quality,
            ),
            image_url=url,
            image_path=key,
            thumbnail_url=await self._thumbnail_url(small, info.sha256),
            thumbnail_path=small,
            provider=model.provider,
            model=model.model,
            requested_model=_requested_model(run, model),
            stored_at=stored_at,
            images=await self._urls(extra, info.sha256),
            image_paths=extra,
            events=[
                stored,
                *(_warning(f"{_WITHOUT[field]}: {error.message}", field) for field, error in beside.items()),
                *(_warning(f"A further picture is missing: {error.message}", "images") for error in missing),
                *warnings,
            ],
            if_lost=unused,
        )

    async def keep(self, run: ClaimedRun, error: Undecodable) -> None:
        """Keep what cannot be decoded, as it came."""
        await self._keeper.keep(run, error)

    async def _inspect(self, run: ClaimedRun, made: Generated, workdir: Path) -> Inspection:
        """Inspect the picture, and make its thumbnail. One that cannot be decoded is kept as it came."""
        try:
            return await self._inspector.inspect(
                made.path, thumbnail=workdir / "thumbnail.webp", quarters=workdir if made.grid else None
            )
        except Undecodable as error:
            error.cost = made.cost
            await self._keeper.keep(run, error)
            raise

    async def adopt(self, run: ClaimedRun, model: Resolved) -> Completed | None:
        """Return the outcome with the picture that an earlier attempt has stored but not settled; None if there is none.

        Only one that was made for the very same request, since the last requeue, counts.
        """
        try:
            for extension in images.EXTENSIONS:
                found = await self._storage.find(object_key(run.workflow_id, run.id, extension))
                if found is not None and object_metadata.is_for(run, found):
                    return await self._adopted(run, model, found)
        except Retryable as error:
            error.accepted = False  # nothing was submitted, and what was may lie there: looking costs no attempt
            raise
        return None

    async def _adopted(self, run: ClaimedRun, model: Resolved, found: StoredObject) -> Completed:
        found_at = time.monotonic()
        version = object_metadata.sha256(found)
        thumbnail = await self._storage.find(thumbnail_key(run.workflow_id, run.id))
        small = thumbnail.key if thumbnail is not None and object_metadata.sha256(thumbnail) == version else None
        url, warnings = await self._announce(found.key, version)
        extra = object_metadata.extra_keys(found)
        message = "An earlier attempt had stored the image already; it is used."
        return Completed(
            picture=object_metadata.picture(run, found),
            image_url=url,
            image_path=found.key,
            thumbnail_url=await self._thumbnail_url(small, version),
            thumbnail_path=small,
            provider=model.provider,
            model=model.model,
            requested_model=_requested_model(run, model),
            stored_at=found_at,
            images=await self._urls(extra, version),
            image_paths=extra,
            events=[Event("adopted", message, data={"imageUrl": url}), *warnings],
            calls=[Call(id=run.call, state="free"), *([drawn] if (drawn := object_metadata.call(found)) else [])],
        )

    async def preview(self, run: ClaimedRun, image: Path) -> str | None:
        """Store a forming picture and return its URL; None if that failed, since nothing depends on it."""
        if not self._lease.fresh:
            return None
        small = image.with_suffix(".preview.webp")
        key = preview_key(run.workflow_id, run.id)
        try:
            async with asyncio.timeout(PREVIEW_SECONDS):
                if not await self._inspector.shrink(image, small):
                    return None
                version = hashlib.sha256(await asyncio.to_thread(small.read_bytes)).hexdigest()[:8]
                private = await self._storage.is_private()
                metadata = object_metadata.ours(run)
                await self._storage.upload(key, small, content_type="image/webp", metadata=metadata, private=private)
                return await self._storage.object_url(key, version)
        except (RunError, OSError) as error:  # also TimeoutError
            log.info("preview.failed", error=str(error) or type(error).__name__)
            return None

    async def _announce(self, key: str, version: str) -> tuple[str, list[Event]]:
        """Return the picture's address, and a warning where it should be public, and is not yet. A private one is not asked."""
        url = await self._storage.object_url(key, version)
        try:
            if await self._storage.is_private() or await self._storage.is_public(url):
                return url, []
            if await self._storage.is_private(at_once=True):
                return await self._storage.object_url(key, version), []
        except Exception:  # the picture is stored and paid for: a look at it must not fail the run
            log.exception("public_url.not_checked")
        return url, [Event("warning", "The public URL does not answer yet.", data={"imageUrl": url})]

    async def _thumbnail_url(self, key: str | None, version: str) -> str | None:
        return None if key is None else await self._storage.object_url(key, version)

    async def _urls(self, keys: Sequence[str], version: str) -> list[str]:
        return [await self._storage.object_url(key, version[:8]) for key in keys]


def _requested_model(run: ClaimedRun, model: Resolved) -> str:
    """Return the model that was asked for: another than was used, if that is retired or the run fell back."""
    return model.requested if run.processor == run.requested else run.requested.partition(":")[2]


def _warning(message: str, field: str) -> Event:
    return Event("warning", message, data={"field": field})
