"""Fetches what goes along with a request, before anything is sent: the image to refine, and its conversation."""

from datetime import timedelta
from pathlib import Path

from daemon.errors import Refused, RunError
from daemon.fetch.client import Fetcher
from daemon.prompt import PromptSpec
from daemon.providers import Conversational, Provider, Reporter
from daemon.run import ClaimedRun
from daemon.storage.addresses import SOURCES
from daemon.storage.client import Storage
from daemon.storage.keys import conversation_key_of
from daemon.worker.inspector import Inspector

_TIMEOUT = timedelta(seconds=60)
_NOTHING_KEPT = {"storage_missing", "storage_no_bucket"}


class Inputs:
    """Fetches inputs of runs.

    Args:
        storage: Images of our own, and those that users have uploaded.
        conversations: Conversations that made them.
        fetcher: The guarded client for all other images.
        inspector: Inspects images; downloads have its limit, too.
    """

    def __init__(self, storage: Storage, conversations: Storage, fetcher: Fetcher, inspector: Inspector) -> None:
        self._storage = storage
        self._conversations = conversations
        self._fetcher = fetcher
        self._inspector = inspector

    async def previous_image(self, run: ClaimedRun, prompt: PromptSpec, workdir: Path) -> Path | None:
        """Fetch the image to refine into a file in `workdir`; return None where none is named.

        Raises:
            Refused: `input_image_forbidden`, if it lies in our storage and the run's user was not found to be allowed to see it.
            RunError: If it cannot be fetched, or is no image.
            OSError: For trouble with the disk.
        """
        url = prompt.previous_image
        if url is None:
            return None
        target = workdir / "previous"
        source = self._storage.owns(url, bucket=SOURCES)
        key = source or self._storage.owns(url)
        if (key is not None or self._storage.may_hold(url)) and not _may_read(run, key):
            raise Refused(
                "promptSpec.previousImage is of no workflow that this run may read.",
                code="input_image_forbidden",
                hint="Insert a new run with an imageUrl, or the address of a source, of a workflow that you are a member of, as it stands.",
            )
        if key is not None:
            bucket = None if source is None else SOURCES
            await self._storage.download(key, target, max_bytes=self._inspector.max_bytes, bucket=bucket)
        else:
            await self._fetcher.fetch(
                url, target, max_bytes=self._inspector.max_bytes, timeout=_TIMEOUT, what="promptSpec.previousImage"
            )
        await self._inspector.inspect_source(target)
        return target

    async def previous_conversation(
        self, run: ClaimedRun, prompt: PromptSpec, provider: Provider, workdir: Path, report: Reporter
    ) -> Path | None:
        """Fetch the conversation that made the image to refine into a file in `workdir`.

        Returns:
            None if the provider is not `Conversational`, if no conversation was kept, or if the image is not of the run's
            own workflow. Where it cannot be fetched, the image is refined without it: that is a warning, no error.

        Raises:
            OSError: For trouble with the disk.
        """
        if not isinstance(provider, Conversational) or prompt.previous_image is None:
            return None
        image = self._storage.owns(prompt.previous_image)
        key = conversation_key_of(image, run.workflow_id) if image is not None else None
        if key is None:
            return None
        target = workdir / "previous.json"
        try:
            await self._conversations.download(key, target, max_bytes=provider.max_conversation_bytes)
        except RunError as error:
            if error.code not in _NOTHING_KEPT:
                report.warning(
                    f"The image is refined without the conversation that made it: {error.message}",
                    field="previousImage",
                )
            return None
        return target


def _may_read(run: ClaimedRun, key: str | None) -> bool:
    """Return whether a run may have an object of ours, which is read with a key that opens them all.

    A user's run has those of its own workflow and of the one that was checked at insert, whatever its prompt says by now.
    """
    if run.created_by is None:
        return True
    workflows = [run.workflow_id, run.source_workflow]
    return key is not None and any(key.startswith(f"{workflow}/") for workflow in workflows if workflow)
