"""The protocol of midjourney-proxy: an order is submitted, asked about, and its picture fetched from where it lies."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import httpx
import structlog
from pydantic import SecretStr

from daemon import images
from daemon.destinations import Destinations
from daemon.errors import OutcomeUnknown, Retryable, RunError
from daemon.fetch import Fetcher
from daemon.providers import Generated, Reporter, Request, Submitted, Waiting
from daemon.providers.midjourney_answer import CANCELLED, FAILURE, MIDJOURNEY, MODAL, SUCCESS, Task, order_id
from daemon.providers.midjourney_hook import Hook, name_in
from daemon.providers.midjourney_models import MODELS
from daemon.providers.midjourney_request import IMAGINE, build, name_of
from daemon.providers.vendor import BROKEN, asked_in_vain, retry_after

log = structlog.stdlib.get_logger()

_DOWNLOAD_TIMEOUT = timedelta(seconds=60)
_LOOK_UP_TIMEOUT = timedelta(seconds=10)


class MidjourneyProxy:
    """Orders pictures from a midjourney-proxy. What comes is a grid of four, delivered whole and in quarters.

    Args:
        api_url: The proxy's address, with or without the `/mj` that all its paths begin with.
        api_key: Its `mj-api-secret`; None where it has none. Sent to `api_url` and nowhere else.
        hook: Where it is to send webhooks; None for nowhere: then it is asked.
        timeout: Longest silence of the proxy.
        max_bytes, max_pixels: Largest image that is accepted.
    """

    models = MODELS

    def __init__(
        self,
        api_url: str,
        api_key: SecretStr | None,
        *,
        hook: Hook | None,
        timeout: timedelta,
        max_bytes: int,
        max_pixels: int,
    ) -> None:
        self._hook = hook
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        # Pictures lie at Discord, or with the proxy itself.
        self._fetcher = Fetcher([api_url])
        # Callers name where else webhooks are to be sent, so no address of ours is open to that.
        self._outside = Destinations([])
        self._client = httpx.AsyncClient(
            base_url=api_url.rstrip("/").removesuffix("/mj"),
            headers={"mj-api-secret": api_key.get_secret_value().strip()} if api_key is not None else {},
            timeout=httpx.Timeout(timeout.total_seconds(), connect=10, pool=10),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        )

    async def aclose(self) -> None:
        """Lets go of connections."""
        await self._client.aclose()
        await self._fetcher.aclose()

    async def generate(self, request: Request, report: Reporter) -> Submitted:
        """Orders the picture, unless an earlier attempt did and could not write it down."""
        own = request.metadata.get("webhookUrl")
        hook = Hook(own) if isinstance(own, str) and own else self._hook
        call = build(request, hook, report.warning)
        if request.attempt > 1 and (found := await self._find(name_of(request))) is not None:
            # Its webhooks verify only if the key is still the one it was signed with.
            heard = hook is not None and hook.ours and found.state == hook.state(call.name)
            return Submitted(found.id, "An earlier attempt had ordered it; that order is used.", webhook=heard)
        if hook is not None and not hook.ours:
            await self._outside.check(hook.url, timeout=_LOOK_UP_TIMEOUT, what="metadata.webhookUrl")
        report.submitted(call.described(), order=True)
        body = await asyncio.to_thread(call.body)
        order = order_id(await self._ask("POST", IMAGINE, body))
        return Submitted(order, "Midjourney is drawing", webhook=hook is not None and hook.ours)

    async def check(self, job_id: str, request: Request, report: Reporter) -> Generated | Waiting:
        """Asks about the order, and fetches its picture once it is there."""
        try:
            task = Task.read(await self._ask("GET", f"mj/task/{quote(job_id, safe='')}/fetch", missing=True))
        except RunError as error:
            raise asked_in_vain(error) from error
        if task is None:
            raise MIDJOURNEY.unknown("The Midjourney proxy does not know the order any more.", taskId=job_id)
        if task.status in (FAILURE, CANCELLED):
            raise task.failure()
        if task.status != SUCCESS:
            await self._show(task, request.workdir / "preview", report)
            message = "The Midjourney proxy waits for somebody to confirm" if task.status == MODAL else None
            return Waiting(task.progress, message or "Midjourney is drawing")
        if task.image_url is None:
            raise MIDJOURNEY.empty(task.facts)
        return await self._collect(task, task.image_url, request.workdir)

    async def cancel(self, job_id: str) -> None:
        """Takes the order out of the proxy's list, where it can do that: Midjourney may draw it all the same."""
        try:
            await self._ask("POST", f"mj/task/{quote(job_id, safe='')}/cancel", missing=True)
        except RunError as error:
            raise asked_in_vain(error) from error

    async def _find(self, name: str) -> Task | None:
        """The newest order of that name that may lead to a picture."""
        try:
            document = await self._ask("GET", "mj/task/list")
        except (OutcomeUnknown, Retryable) as error:
            raise asked_in_vain(error) from error
        listed = cast("list[object]", document) if isinstance(document, list) else []
        tasks = (Task.read(entry) for entry in listed)
        found = [task for task in tasks if task is not None and name_in(task.state) == name and task.useful]
        return found[-1] if found else None

    async def _collect(self, task: Task, url: str, workdir: Path) -> Generated:
        """Fetches the grid and cuts it. Trouble with that is asked about again: the picture is there, and paid for."""
        grid = workdir / "grid"
        try:
            await self._fetcher.fetch(url, grid, max_bytes=self._max_bytes, timeout=_DOWNLOAD_TIMEOUT)
            quarters = await asyncio.to_thread(self._cut, grid, workdir)
        except Retryable as error:
            error.accepted = False
            raise
        return Generated(grid, original_url=url, extra=quarters, data=task.facts)

    def _cut(self, grid: Path, folder: Path) -> tuple[Path, ...]:
        images.inspect(grid, max_bytes=self._max_bytes, max_pixels=self._max_pixels)
        return images.quarters(grid, folder)

    async def _show(self, task: Task, to: Path, report: Reporter) -> None:
        """Shows the forming picture, if there is one and it can be had: nothing depends on it."""
        if task.image_url is None:
            return
        try:
            await self._fetcher.fetch(task.image_url, to, max_bytes=self._max_bytes, timeout=_DOWNLOAD_TIMEOUT)
        except RunError as error:
            log.info("preview.failed", error=error.message)
        else:
            report.preview(to)

    async def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, missing: bool = False
    ) -> object:
        """Sends a request; answers the JSON of its answer, None for an empty one, and for a 404 if that may be `missing`."""
        try:
            response = await self._client.request(method, path, json=body)
        except BROKEN as error:
            raise MIDJOURNEY.broken(error) from error
        if missing and response.status_code == 404:
            return None
        if not response.is_success:
            wait = retry_after(response.headers.get("retry-after"))
            facts = {"status": response.status_code}
            raise MIDJOURNEY.by_status(response.status_code, response.text, facts, wait=wait, blocks="provider")
        if not response.content.strip():
            return None
        try:
            document: object = response.json()
        except ValueError:
            raise MIDJOURNEY.unknown("The Midjourney proxy's answer is not JSON.") from None
        return document
