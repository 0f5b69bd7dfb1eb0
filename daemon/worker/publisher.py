"""store: from a picture on disk to a public URL.

Checks what the provider made, puts it into storage with its thumbnail, makes sure that the URL answers, and words the
settlement. A picture that has been made is paid for: nothing here ever asks for another one.
"""

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import structlog

from daemon import images, object_metadata
from daemon.disk import not_stored
from daemon.errors import Retryable, RunError
from daemon.heartbeat import Heartbeat
from daemon.images import ImageInfo
from daemon.providers import Generated
from daemon.providers.catalogue import Resolved
from daemon.queue import Claimed
from daemon.reporter import event
from daemon.storage import ClaimGone, Storage, StoredObject
from daemon.storage_keys import context_key, extra_key, object_key, preview_key, thumbnail_key
from daemon.turns import Turns

log = structlog.stdlib.get_logger()

STORAGE_AWAY = timedelta(minutes=1)
"""How long a picture is kept while storage is away: to make it again would cost more. Then it is tried once more."""

_WITHOUT = {
    "thumbnailUrl": "The image has no thumbnail",
    "context": "The conversation that made the image is not kept",
}
"""What belongs to a picture, and the warning where it could not be stored."""


class Publisher:
    """Stores pictures of runs.

    Args:
        storage: Supabase Storage.
        contexts: Another bucket of it, which is not public, for what providers want to hear again.
        turns: Asked right before each upload whether the claim still holds.
        heartbeat: No upload begins without a fresh lease.
        max_bytes, max_pixels: Larger pictures are refused.
        storage_away: How long a picture is kept for a storage that is away.
    """

    def __init__(
        self,
        storage: Storage,
        contexts: Storage,
        turns: Turns,
        heartbeat: Heartbeat,
        *,
        max_bytes: int,
        max_pixels: int,
        storage_away: timedelta = STORAGE_AWAY,
    ) -> None:
        self._storage = storage
        self._contexts = contexts
        self._turns = turns
        self._heartbeat = heartbeat
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._storage_away = storage_away.total_seconds()

    async def inspect(self, image: Path) -> ImageInfo:
        """What the file is; raises `RunError` if it is not an image we take, `OSError` for trouble with the disk."""
        return await asyncio.to_thread(images.inspect, image, max_bytes=self._max_bytes, max_pixels=self._max_pixels)

    async def publish(
        self, run: Claimed, model: Resolved, made: Generated, workdir: Path, *, generate_ms: int
    ) -> dict[str, Any]:
        """Stores the picture and answers the body of the run's settlement, also where storing fails."""
        unused = event("unused", "The run was taken away while its image was being stored; it was not used.")
        started = time.monotonic()
        try:
            info = await self.inspect(made.path)
            key = object_key(run.workflow_id, run.id, info.extension)
            # Before the picture itself: where that lies, an adoption finds them, too.
            extra, missing = await self._upload_extra(run, made)
            tries, beside = await self._upload_all(run, key, made, workdir, info, extra=extra)
        except ClaimGone:
            return {"outcome": "released", "events": [], "if_lost": unused}
        except (RunError, OSError) as reason:
            error = not_stored(reason)
            payload = {"error": error.message, "code": error.code, "hint": error.hint, "details": error.data}
            return {
                "outcome": "failed",
                "payload": payload,
                "events": [event("store_failed", error.message, kind="error", **error.data)],
                "if_lost": unused,
            }
        events = [event("stored", "The image is in storage.", uploadTries=tries, bytes=info.bytes)]
        events += [
            event("warning", f"{_WITHOUT[field]}: {error.message}", field=field) for field, error in beside.items()
        ]
        events += [
            event("warning", f"A further picture is missing: {error.message}", field="images") for error in missing
        ]
        url = await self._announced(key, info.sha256, events)
        store_ms = round(1000 * (time.monotonic() - started))
        payload = {
            "imageUrl": url,
            "thumbnailUrl": None if "thumbnailUrl" in beside else await self._thumbnail_url(run, info.sha256),
            "originalUrl": made.shown_url,
            "revisedPrompt": made.revised_prompt,
            "width": info.width,
            "height": info.height,
            "contentType": info.content_type,
            "bytes": info.bytes,
            **_delivered_by(run, model),
            "cost": made.cost,
            "timings": {
                "queuedMs": round(1000 * run.waited.total_seconds()),
                "generateMs": generate_ms,
                "storeMs": store_ms,
            },
            **await self._images(extra, info.sha256),
        }
        return {"outcome": "completed", "payload": payload, "events": events, "if_lost": unused}

    async def adopt(self, run: Claimed, model: Resolved) -> dict[str, Any] | None:
        """Finds the picture that an earlier attempt has stored but not settled; None if there is none.

        Only one that was made for the very same request, since the last requeue, counts.
        """
        try:
            for extension in images.EXTENSIONS:
                found = await self._storage.find(object_key(run.workflow_id, run.id, extension))
                if found is not None and object_metadata.is_for(run, found):
                    return await self._adopted(run, model, found)
        except Retryable as error:
            error.accepted = False  # nothing was ordered, and what was may lie there: looking costs no attempt
            raise
        return None

    async def _adopted(self, run: Claimed, model: Resolved, found: StoredObject) -> dict[str, Any]:
        version = object_metadata.sha256(found)
        small = await self._storage.find(thumbnail_key(run.workflow_id, run.id))
        has_thumbnail = small is not None and object_metadata.sha256(small) == version
        warnings: list[dict[str, Any]] = []
        url = await self._announced(found.key, version, warnings)
        payload = {
            **object_metadata.payload(run, found),
            "imageUrl": url,
            "thumbnailUrl": await self._thumbnail_url(run, version) if has_thumbnail else None,
            **_delivered_by(run, model),
            "timings": {"queuedMs": round(1000 * run.waited.total_seconds())},
            **await self._images(object_metadata.extra_keys(found), version),
        }
        message = "An earlier attempt had stored the image already; it is used."
        return {
            "outcome": "completed",
            "payload": payload,
            "events": [event("adopted", message, imageUrl=url), *warnings],
        }

    async def preview(self, run: Claimed, image: Path) -> str | None:
        """Stores a forming picture and answers its URL; None if that did not work, since nothing depends on it."""
        if not self._heartbeat.fresh:
            return None
        small = image.with_suffix(".preview.webp")
        key = preview_key(run.workflow_id, run.id)
        try:
            await asyncio.to_thread(images.thumbnail, image, small)
            version = hashlib.sha256(await asyncio.to_thread(small.read_bytes)).hexdigest()[:8]
            await self._storage.upload(key, small, content_type="image/webp")
            return await self._storage.public_url(key, version)
        except (RunError, OSError) as error:
            log.info("preview.failed", error=str(error))
            return None

    async def _announced(self, key: str, version: str, events: list[dict[str, Any]]) -> str:
        """The picture's address; one that does not answer adds a warning to `events`."""
        url = await self._storage.public_url(key, version)
        if not await self._storage.is_public(url):
            events.append(event("warning", "The public URL does not answer yet.", imageUrl=url))
        return url

    async def _thumbnail_url(self, run: Claimed, version: str) -> str:
        return await self._storage.public_url(thumbnail_key(run.workflow_id, run.id), version)

    async def _images(self, keys: Sequence[str], version: str) -> dict[str, Any]:
        """The part of the payload that lists further pictures; nothing where there are none."""
        urls = [await self._storage.public_url(key, version[:8]) for key in keys]
        return {"images": urls} if urls else {}

    async def _upload(
        self,
        run: Claimed,
        key: str,
        file: Path,
        *,
        content_type: str,
        metadata: Mapping[str, str] | None = None,
        into: Storage | None = None,
    ) -> int:
        """Uploads a file that was paid for; answers how often that was tried.

        Three tries are for the moment. Where storage is away for longer, there are three more as soon as it is back,
        and no third time.
        """

        async def ours() -> bool:
            await self._heartbeat.wait_fresh()
            return await self._turns.confirm(run)

        storage = into or self._storage
        tried = 0
        until: float | None = None
        while True:
            try:
                return tried + await storage.upload(
                    key, file, content_type=content_type, metadata=metadata, may_write=ours
                )
            except RunError as error:
                tried += int(error.data["uploadTries"])
                error.data["uploadTries"] = tried
                if not isinstance(error, Retryable) or until is not None:
                    raise
                self._turns.record(run, message="Storage does not answer. The image is kept until it does.")
                until = time.monotonic() + self._storage_away
                if not await storage.returns(until):
                    raise

    async def _upload_extra(self, run: Claimed, made: Generated) -> tuple[list[str], list[RunError]]:
        """Uploads further pictures side by side; answers the keys of those that arrived, and what kept others away."""

        async def upload(number: int, image: Path) -> str:
            info = await self.inspect(image)
            key = extra_key(run.workflow_id, run.id, number, info.extension)
            await self._upload(run, key, image, content_type=info.content_type)
            return key

        keys: list[str] = []
        missing: list[RunError] = []
        uploads = (upload(number, image) for number, image in enumerate(made.extra, 1))
        for result in await asyncio.gather(*uploads, return_exceptions=True):
            match result:
                case str():
                    keys.append(result)
                case RunError() | OSError():
                    missing.append(not_stored(result))
                case _:
                    raise result
        return keys, missing

    async def _upload_all(
        self,
        run: Claimed,
        key: str,
        made: Generated,
        workdir: Path,
        info: ImageInfo,
        *,
        extra: Sequence[str],
    ) -> tuple[int, dict[str, RunError]]:
        """Uploads the picture and what belongs to it side by side; answers the tries that the picture took, and by its
        name what kept anything else away: a picture that is stored is not thrown away for want of that."""

        async def thumbnail() -> None:
            small = workdir / "thumbnail.webp"
            await asyncio.to_thread(images.thumbnail, made.path, small)
            of = {"sha256": info.sha256}
            await self._upload(
                run, thumbnail_key(run.workflow_id, run.id), small, content_type="image/webp", metadata=of
            )

        async def context() -> None:
            if made.context is not None:
                where = context_key(run.workflow_id, run.id)
                await self._upload(run, where, made.context, content_type="application/json", into=self._contexts)

        metadata = object_metadata.describe(run, info, extra)
        main, *others = await asyncio.gather(
            self._upload(run, key, made.path, content_type=info.content_type, metadata=metadata),
            thumbnail(),
            context(),
            return_exceptions=True,
        )
        if isinstance(main, BaseException):
            raise main
        beside: dict[str, RunError] = {}
        for field, error in zip(_WITHOUT, others, strict=True):
            if isinstance(error, (RunError, OSError)):
                beside[field] = not_stored(error)
            elif error is not None:
                raise error
        return main, beside


def _delivered_by(run: Claimed, model: Resolved) -> dict[str, str]:
    """The part of the payload that says who made it: another than was asked for, if the model is retired or the run went
    on to a step of its fallback."""
    asked = model.requested if run.processor == run.requested else run.requested.partition(":")[2]
    return {"provider": model.provider, "model": model.model, "requestedModel": asked}
