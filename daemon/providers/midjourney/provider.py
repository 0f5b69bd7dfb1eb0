"""Call a midjourney-proxy: submit a job, check it, download its image from the URL it names."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import httpx
import structlog
from pydantic import SecretStr

from daemon.errors import Retryable, RunError
from daemon.fetch.client import Fetcher, NotAnImage
from daemon.fetch.destinations import Destinations
from daemon.http_clients import client
from daemon.providers import Generated, Reporter, Request, Submitted, Waiting
from daemon.providers.base64_stream import ImageTooLarge
from daemon.providers.body import NotUnderstood, read_body
from daemon.providers.error_body import ErrorBody, find_reason, read_error
from daemon.providers.errors import TRANSPORT_ERRORS
from daemon.providers.event_stream import Document
from daemon.providers.job_checks import check_failed, look_up_failed
from daemon.providers.midjourney.addresses import resolved
from daemon.providers.midjourney.models import MODELS
from daemon.providers.midjourney.request import IMAGINE, build, seed_of
from daemon.providers.midjourney.response import (
    CANCELLED,
    FAILURE,
    MIDJOURNEY,
    MODAL,
    SUCCESS,
    Task,
    is_own,
    submitted_job_id,
    unwrapped,
)
from daemon.providers.midjourney.webhook import Webhook, job_name_in
from daemon.providers.pictures import NotAPicture, is_url, save_picture
from daemon.providers.sending import Sending
from daemon.providers.spool import Spool, TooMuch
from daemon.providers.waits import retry_after
from daemon.providers.words import readable

log = structlog.stdlib.get_logger()

_DOWNLOAD_TIMEOUT = timedelta(seconds=60)
_ONE_TRY = timedelta(0)
"""The next check is the next try, until the polling timeout."""
_MOST_LISTED = 32_000_000
"""Bytes of the list of all jobs."""
_LOOK_UP_TIMEOUT = timedelta(seconds=10)
Missing = Callable[[ErrorBody], bool]
"""Returns whether the body of a 404 says that there is nothing."""


class MidjourneyProxy:
    """Generate images by a midjourney-proxy. The result is a grid of four, returned whole; the worker cuts it.

    Args:
        api_url: The proxy's address, with or without the `/mj` that all its paths begin with.
        api_key: Its `mj-api-secret`; None where it has none. Sent to `api_url` and nowhere else.
        price: USD that an image costs the operator; None where unknown: Midjourney has subscriptions, no prices.
        webhook: The address for its webhooks; None for none: then jobs are polled.
        timeout: Longest silence of the proxy.
        max_bytes: Largest image that is accepted.
    """

    def __init__(
        self,
        api_url: str,
        api_key: SecretStr | None,
        *,
        price: float | None = None,
        webhook: Webhook | None,
        timeout: timedelta,
        max_bytes: int,
    ) -> None:
        self.models = tuple(replace(model, price=price) for model in MODELS)
        self._price = price
        self._webhook = webhook
        self._max_bytes = max_bytes
        # Images are stored at Discord, or by the proxy itself.
        self._fetcher = Fetcher([api_url])
        # `metadata.webhookUrl` is a user-supplied URL: nothing is allow-listed (SSRF).
        self._outside = Destinations([])
        self._api_url = api_url
        self._client = client(
            base_url=api_url.rstrip("/").removesuffix("/mj"),
            headers={"mj-api-secret": api_key.get_secret_value().strip()} if api_key is not None else {},
            timeout=httpx.Timeout(timeout.total_seconds(), connect=10, pool=10),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()
        await self._fetcher.aclose()

    async def check_key(self) -> None:
        """Ask for a job that is not there: nothing is drawn, and the list of all jobs may be long."""
        await self._call("GET", "mj/task/0/fetch", sending=Sending(lambda: None))

    async def generate(self, request: Request, report: Reporter) -> Submitted:
        """Submit a job, unless an earlier attempt did and its id was never saved."""
        url = request.metadata.get("webhookUrl")
        webhook = Webhook(url) if isinstance(url, str) and url else self._webhook
        call = build(request, webhook, report.warning)
        if request.attempt > 1 and (found := await self._find(call.name)) is not None:
            # Its webhooks verify only if the key is still the one it was signed with.
            verified = webhook is not None and webhook.ours and found.state == webhook.state(call.name)
            return Submitted(found.id, "An earlier attempt had ordered it; that order is used.", webhook=verified)
        if webhook is not None and not webhook.ours:
            await self._outside.check(webhook.url, timeout=_LOOK_UP_TIMEOUT, what="metadata.webhookUrl")
        body = await asyncio.to_thread(call.body)
        sending = Sending(
            lambda: report.submitted(call.described(), estimate=self._price, deferred=True),
            has_image=request.previous_image is not None,
        )
        with MIDJOURNEY.guard(sending):
            document = await self._call("POST", IMAGINE, body, sending=sending)
            job = submitted_job_id(None if document is None else document.value)
        return Submitted(job, "Midjourney is drawing", webhook=webhook is not None and webhook.ours)

    async def check(self, job_id: str, request: Request, report: Reporter) -> Generated | Waiting:
        """Check a job; download its image once it is done."""
        spool = Spool(request.workdir, max_bytes=self._max_bytes)
        path = f"mj/task/{quote(job_id, safe='')}/fetch"
        # Asked twice, as an empty body may be that of a proxy which begins or ends: the next attempt draws, and is charged, anew.
        document = await self._status(path, spool) or await self._status(path, spool)
        if document is None:
            raise MIDJOURNEY.unknown("The Midjourney proxy does not know the order any more.", taskId=job_id)
        task = Task.read(document.value)
        if task is None:
            said = readable(find_reason(document.value)) or "no reason given."
            raise check_failed(MIDJOURNEY.unknown(f"The Midjourney proxy does not tell how the order stands: {said}"))
        if task.status in (FAILURE, CANCELLED):
            raise task.failure()
        if task.status != SUCCESS:
            await self._preview(task, request.workdir / "preview", report)
            message = "The Midjourney proxy waits for somebody to confirm" if task.status == MODAL else None
            return Waiting(task.progress, message or "Midjourney is drawing")
        if task.image_url is None:  # it is written after the status
            raise check_failed(MIDJOURNEY.empty(task.facts))
        made = await self._download(task, task.image_url, spool, request.workdir)
        return replace(made, seed=seed_of(request.prompt))

    async def cancel(self, job_id: str) -> None:
        """Remove a job from the proxy's list, where it can do that: Midjourney may draw it all the same."""
        await self._ask("POST", f"mj/task/{quote(job_id, safe='')}/cancel", missing=_is_no_page)

    async def _status(self, path: str, spool: Spool) -> Document | None:
        """Return what the proxy says about a job; None if it does not know it."""
        return await self._ask("GET", path, spool=spool, missing=_is_unknown_job, failed=check_failed)

    async def _find(self, name: str) -> Task | None:
        """Return the newest job of a name that has an image or may still get one."""
        document = await self._ask("GET", "mj/task/list", spool=Spool(None, max_bytes=0, most_rest=_MOST_LISTED))
        found = unwrapped(document.value) if document is not None else None
        listed = cast("list[object]", found) if isinstance(found, list) else []
        tasks = (Task.read(entry) for entry in listed)
        useful = [task for task in tasks if task is not None and job_name_in(task.state) == name and task.useful]
        return useful[-1] if useful else None

    async def _download(self, task: Task, url: str, spool: Spool, workdir: Path) -> Generated:
        """Download the grid. A failure costs no attempt: the image is there, and paid for."""
        image = workdir / "grid"
        address = url if is_url(url) else None
        try:
            if address is None:
                try:
                    image = await save_picture(url, spool)
                except NotAPicture as error:  # JPEG in base64 begins with a slash, as an address of the proxy's does
                    address = resolved(url, self._api_url)
                    if address is None:
                        raise MIDJOURNEY.undecodable(error.path, task.facts) from error
            if address is not None:
                await self._fetcher.fetch_result(address, image, max_bytes=self._max_bytes, deadline=_ONE_TRY)
        except ImageTooLarge as error:
            raise MIDJOURNEY.too_large_picture(self._max_bytes, task.facts) from error
        except NotAnImage as error:
            raise Retryable(error.message, code=error.code, hint="", accepted=False, data=task.facts) from error
        except Retryable as error:
            error.accepted = False
            raise
        return Generated(image, self._price, original_url=address, grid=task.grid, data=task.facts)

    async def _preview(self, task: Task, to: Path, report: Reporter) -> None:
        """Publish the forming image, if there is one. Never raises: nothing depends on a preview."""
        address = task.image_url
        if address is not None and not is_url(address):
            address = resolved(address, self._api_url)
        if address is None:
            return
        try:
            await self._fetcher.fetch(address, to, max_bytes=self._max_bytes, timeout=_DOWNLOAD_TIMEOUT)
        except RunError as error:
            log.info("preview.failed", error=error.message)
        else:
            report.preview(to)

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        spool: Spool | None = None,
        missing: Missing | None = None,
        failed: Callable[[RunError], RunError] = look_up_failed,
    ) -> Document | None:
        """Send a request that costs nothing: whatever comes of it, jobs stay as they are (`failed` maps its error)."""
        sending = Sending(lambda: None)
        try:
            with MIDJOURNEY.guard(sending):
                return await self._call(method, path, sending=sending, spool=spool, missing=missing)
        except RunError as error:
            raise failed(error) from error

    async def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        sending: Sending,
        spool: Spool | None = None,
        missing: Missing | None = None,
    ) -> Document | None:
        """Send a request; return the JSON of its response, None for an empty one, and for a 404 that says so by `missing`."""
        extensions = {"trace": sending.trace}
        spool = spool or Spool(None, max_bytes=self._max_bytes)
        try:
            async with self._client.stream(method, path, json=body, extensions=extensions) as response:
                sending.came(response.status_code)
                if not response.is_success:
                    error = ErrorBody.of(await read_error(response.aiter_raw()), response.status_code)
                    if response.status_code == 404 and missing is not None and missing(error):
                        return None
                    raise _refusal(response, error)
                async with aclosing(read_body(response.aiter_raw(), spool)) as parts:
                    part = await anext(parts, None)
        except TRANSPORT_ERRORS as error:
            raise MIDJOURNEY.transport_error(error, sent=sending.sent) from error
        except (NotUnderstood, TooMuch, ImageTooLarge):
            part = False
        if part is None:
            return None
        if not isinstance(part, Document):
            raise MIDJOURNEY.unknown("The Midjourney proxy's answer is not JSON.")
        return part


def _is_no_page(body: ErrorBody) -> bool:
    """Return whether a 404 is none of a gateway: a proxy without the endpoint, or without the job."""
    return not body.is_page


def _is_unknown_job(body: ErrorBody) -> bool:
    """Return whether a 404 is the proxy's own. Other JSON is that of a server in front of it, which says nothing about a job."""
    return is_own(body) or (body.document is None and not body.is_page)


def _refusal(response: httpx.Response, body: ErrorBody) -> RunError:
    status = response.status_code
    wait = retry_after(response.headers.get("retry-after"))
    return MIDJOURNEY.by_status(status, body.reason, {"status": status}, own=is_own(body), wait=wait, blocks="provider")
