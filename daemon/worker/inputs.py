"""What goes along with a request: the image to refine, and what was said beside it, fetched before anything is sent."""

from datetime import timedelta
from pathlib import Path

from daemon.errors import Refused, RunError
from daemon.fetch import Fetcher
from daemon.prompt import PromptSpec
from daemon.providers import Provider, Recalling, Reporter
from daemon.publisher import Publisher
from daemon.queue import Claimed
from daemon.storage import Storage
from daemon.storage_keys import context_of

_TIMEOUT = timedelta(seconds=60)
_NOTHING_KEPT = {"storage_missing", "storage_no_bucket"}


class Inputs:
    """Fetches inputs of runs.

    Args:
        storage: Where images of our own lie.
        contexts: Where what providers said beside them lies.
        fetcher: The guarded client for all others.
        publisher: Says what is an image.
        max_bytes: Larger images are refused.
    """

    def __init__(
        self, storage: Storage, contexts: Storage, fetcher: Fetcher, publisher: Publisher, *, max_bytes: int
    ) -> None:
        self._storage = storage
        self._contexts = contexts
        self._fetcher = fetcher
        self._publisher = publisher
        self._max_bytes = max_bytes

    async def previous_image(self, prompt: PromptSpec, workdir: Path) -> Path | None:
        """The image to refine, as a file in `workdir`; None where none is named.

        Raises:
            RunError: If it cannot be had, or is none.
            OSError: For trouble with the disk.
        """
        url = prompt.previous_image
        if url is None:
            return None
        target = workdir / "previous"
        key = self._storage.owns(url)
        if key is not None:
            await self._storage.download(key, target, max_bytes=self._max_bytes)
        else:
            await self._fetcher.fetch(
                url, target, max_bytes=self._max_bytes, timeout=_TIMEOUT, what="promptSpec.previousImage"
            )
        try:
            await self._publisher.inspect(target)
        except RunError as error:
            raise Refused(
                f"promptSpec.previousImage cannot be used: {error.message}",
                code="input_image_invalid",
                hint="Give the URL of a PNG, JPEG or WebP image.",
            ) from error
        return target

    async def previous_context(
        self, run: Claimed, prompt: PromptSpec, provider: Provider, workdir: Path, report: Reporter
    ) -> Path | None:
        """What `provider` had said beside the image to refine, as a file in `workdir`.

        None if it does not ask for that, if nothing was kept, or if the image is not of the run's own workflow. Where it
        cannot be had, the image is refined without it: that is a warning, no error.

        Raises:
            OSError: For trouble with the disk.
        """
        if not isinstance(provider, Recalling) or prompt.previous_image is None:
            return None
        image = self._storage.owns(prompt.previous_image)
        key = context_of(image, run.workflow_id) if image is not None else None
        if key is None:
            return None
        target = workdir / "previous.json"
        try:
            await self._contexts.download(key, target, max_bytes=provider.largest_context)
        except RunError as error:
            if error.code not in _NOTHING_KEPT:
                report.warning(
                    f"The image is refined without the conversation that made it: {error.message}",
                    field="previousImage",
                )
            return None
        return target
