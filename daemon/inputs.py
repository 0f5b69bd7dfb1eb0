"""What goes along with a request: the image to refine, fetched and checked before anything is sent."""

from datetime import timedelta
from pathlib import Path

from daemon.errors import Refused, RunError
from daemon.fetch import Fetcher
from daemon.prompt import PromptSpec
from daemon.publisher import Publisher
from daemon.storage import Storage

_TIMEOUT = timedelta(seconds=60)


class Inputs:
    """Fetches inputs of runs.

    Args:
        storage: Where images of our own lie.
        fetcher: The guarded client for all others.
        publisher: Says what is an image.
        max_bytes: Larger images are refused.
    """

    def __init__(self, storage: Storage, fetcher: Fetcher, publisher: Publisher, *, max_bytes: int) -> None:
        self._storage = storage
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
