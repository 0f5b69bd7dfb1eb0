"""store: from a picture on disk to a public URL.

Checks what the provider made, puts it into storage with its thumbnail, makes sure that the URL answers, and words the
settlement. A picture that has been made is paid for: nothing here ever asks for another one.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import structlog

from daemon import images
from daemon.errors import RunError
from daemon.heartbeat import Heartbeat
from daemon.images import ImageInfo
from daemon.providers import Generated
from daemon.providers.catalogue import Resolved
from daemon.queue import Claimed
from daemon.reporter import event
from daemon.storage import ClaimGone, Storage, extra_key, object_key, preview_key, thumbnail_key
from daemon.turns import Turns

log = structlog.stdlib.get_logger()


class Publisher:
    """Stores pictures of runs.

    Args:
        storage: Supabase Storage.
        turns: Asked right before each upload whether the claim still holds.
        heartbeat: No upload begins without a fresh lease.
        max_bytes, max_pixels: Larger pictures are refused.
    """

    def __init__(
        self, storage: Storage, turns: Turns, heartbeat: Heartbeat, *, max_bytes: int, max_pixels: int
    ) -> None:
        self._storage = storage
        self._turns = turns
        self._heartbeat = heartbeat
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels

    async def inspect(self, image: Path) -> ImageInfo:
        """What the file is; raises `RunError` if it is not an image we take."""
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
            thumbnail = workdir / "thumbnail.webp"
            await asyncio.to_thread(images.thumbnail, made.path, thumbnail)
            # Before the picture itself: where that lies, an adoption finds them, too.
            extra, missing = await self._upload_extra(run, made)
            tries, small = await self._upload_both(run, key, made, thumbnail, info, extra=extra)
        except ClaimGone:
            return {"outcome": "released", "events": [], "if_lost": unused}
        except RunError as error:
            payload = {"error": error.message, "code": error.code, "hint": error.hint, "details": error.data}
            return {
                "outcome": "failed",
                "payload": payload,
                "events": [event("store_failed", error.message, kind="error", **error.data)],
                "if_lost": unused,
            }
        url = await self._storage.public_url(key, info.sha256[:8])
        events = [event("stored", "The image is in storage.", uploadTries=tries, bytes=info.bytes)]
        if small is not None:
            events.append(event("warning", f"The image has no thumbnail: {small.message}", field="thumbnailUrl"))
        events += [
            event("warning", f"A further picture is missing: {error.message}", field="images") for error in missing
        ]
        if not await self._storage.is_public(url):
            events.append(event("warning", "The public URL does not answer yet.", imageUrl=url))
        store_ms = round(1000 * (time.monotonic() - started))
        payload = {
            "imageUrl": url,
            "thumbnailUrl": await self._thumbnail_url(run, info.sha256) if small is None else None,
            "originalUrl": _without_query(made.original_url),
            "revisedPrompt": made.revised_prompt,
            "width": info.width,
            "height": info.height,
            "contentType": info.content_type,
            "bytes": info.bytes,
            "model": model.model,
            "requestedModel": model.requested,
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
        for extension in images.EXTENSIONS:
            key = object_key(run.workflow_id, run.id, extension)
            found = await self._storage.find(key)
            if found is None or found.metadata.get("request") != request_hash(run):
                continue
            if found.metadata.get("ticket") != str(run.ticket):
                continue
            version = found.metadata.get("sha256", "")[:8]
            payload = {
                "imageUrl": await self._storage.public_url(key, version),
                "thumbnailUrl": await self._thumbnail_url(run, version),
                "width": int(found.metadata.get("width", 0)) or None,
                "height": int(found.metadata.get("height", 0)) or None,
                "contentType": found.content_type,
                "bytes": found.size,
                "model": model.model,
                "requestedModel": model.requested,
                "cost": float(cost) if (cost := found.metadata.get("cost")) else None,
                "timings": {"queuedMs": round(1000 * run.waited.total_seconds())},
                **await self._images(found.metadata.get("extra", "").split(), version),
            }
            message = "An earlier attempt had stored the image already; it is used."
            return {
                "outcome": "completed",
                "payload": payload,
                "events": [event("adopted", message, imageUrl=payload["imageUrl"])],
            }
        return None

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

    async def _thumbnail_url(self, run: Claimed, version: str) -> str:
        return await self._storage.public_url(thumbnail_key(run.workflow_id, run.id), version)

    async def _images(self, keys: Sequence[str], version: str) -> dict[str, Any]:
        """The part of the payload that lists further pictures; nothing where there are none."""
        urls = [await self._storage.public_url(key, version[:8]) for key in keys]
        return {"images": urls} if urls else {}

    async def _ours(self, run: Claimed) -> bool:
        await self._heartbeat.wait_fresh()
        return await self._turns.confirm(run)

    async def _upload_extra(self, run: Claimed, made: Generated) -> tuple[list[str], list[RunError]]:
        """Uploads further pictures side by side; answers the keys of those that arrived, and what kept others away."""

        async def upload(number: int, image: Path) -> str:
            info = await self.inspect(image)
            key = extra_key(run.workflow_id, run.id, number, info.extension)
            await self._storage.upload(key, image, content_type=info.content_type, may_write=lambda: self._ours(run))
            return key

        keys: list[str] = []
        missing: list[RunError] = []
        uploads = (upload(number, image) for number, image in enumerate(made.extra, 1))
        for result in await asyncio.gather(*uploads, return_exceptions=True):
            match result:
                case str():
                    keys.append(result)
                case RunError():
                    missing.append(result)
                case _:
                    raise result
        return keys, missing

    async def _upload_both(
        self, run: Claimed, key: str, made: Generated, thumbnail: Path, info: ImageInfo, *, extra: Sequence[str]
    ) -> tuple[int, RunError | None]:
        """Uploads picture and thumbnail side by side; answers the tries that the picture took, and what kept the
        thumbnail away: a picture that is stored is not thrown away for want of one."""

        async def ours() -> bool:
            return await self._ours(run)

        metadata = {
            "request": request_hash(run),
            "ticket": str(run.ticket),
            "sha256": info.sha256,
            "width": str(info.width),
            "height": str(info.height),
            "cost": "" if made.cost is None else str(made.cost),
            "extra": " ".join(extra),
        }
        main, small = await asyncio.gather(
            self._storage.upload(key, made.path, content_type=info.content_type, metadata=metadata, may_write=ours),
            self._storage.upload(
                thumbnail_key(run.workflow_id, run.id), thumbnail, content_type="image/webp", may_write=ours
            ),
            return_exceptions=True,
        )
        if isinstance(main, BaseException):
            raise main
        if isinstance(small, RunError):
            return main, small
        if isinstance(small, BaseException):
            raise small
        return main, None


def request_hash(run: Claimed) -> str:
    """What makes two requests the same: processor and prompt."""
    text = json.dumps([run.processor, run.metadata.get("promptSpec")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _without_query(url: str | None) -> str | None:
    """A provider's URL without its query, which is often a signature."""
    return None if url is None else urlunsplit(urlsplit(url)._replace(query="", fragment=""))
