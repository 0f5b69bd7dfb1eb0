"""Call the Responses API in background mode: submit a job, check it, fetch its image.

A job is a response; its id is all that has to be saved: any daemon can check it for 30 days. There is no list of responses,
so an id that was lost before it was saved is found by OpenAI's webhook alone.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing
from datetime import timedelta
from typing import Any

import httpx2
from openai import AsyncOpenAI, ConflictError, NotFoundError

from daemon.errors import Refused, Retryable, RunError
from daemon.fetch.client import Fetcher
from daemon.providers import Charge, Generated, Reporter, Request, Submitted, Waiting
from daemon.providers.body import NotUnderstood, read_body
from daemon.providers.event_stream import Document
from daemon.providers.job_checks import check_failed, look_up_failed
from daemon.providers.openai.background_request import BackgroundRequest
from daemon.providers.openai.background_response import BackgroundResponse
from daemon.providers.openai.downloads import download
from daemon.providers.openai.errors import CALL_ERRORS, OPENAI, is_missing, translate
from daemon.providers.openai.models import MAINLINE
from daemon.providers.openai.request import draw
from daemon.providers.sending import Sending
from daemon.providers.spool import Spool, TooMuch

_API = "Responses API"
_NO_SUCH_JOB = {"not_found", "invalid_request"}
"""Codes of an id that is none of this API's, or of a response that cannot be cancelled any more."""
_ONE_TRY = timedelta(0)
"""The next check is the next try, until the polling timeout."""
_STREAMED = {"X-Stainless-Raw-Response": "stream"}
"""Tells the SDK to leave the body unread, as its `with_streaming_response` does."""


class OpenAIBackground:
    """Generate images in the background with OpenAI, or with a server that has its Responses API.

    Args:
        client: Connects to that server.
        fetcher: Fetches images that the server returns as a URL.
        download_deadline: How long such an image of a submission is asked for again; that of a job, by each check once.
        webhook: Whether the database has a secret to verify OpenAI's webhooks with.
        max_bytes: Largest image that is accepted.
    """

    def __init__(
        self, client: AsyncOpenAI, fetcher: Fetcher, *, webhook: bool, download_deadline: timedelta, max_bytes: int
    ) -> None:
        self._client = client
        self._fetcher = fetcher
        self._download_deadline = download_deadline
        self._webhook = webhook
        self._max_bytes = max_bytes

    async def submit(self, request: Request, report: Reporter) -> Generated | Submitted:
        """Submit a job. A server without background mode may return the image at once."""
        drawing = draw(request, report.warning)
        report.warning(
            "In background mode a language model words the prompt anew; revisedPrompt is what was drawn.",
            field="mode",
            feature="rewritten",
        )
        background = BackgroundRequest(drawing, request.run_id, request.ticket)
        sending = Sending(
            lambda: report.submitted(background.described(), estimate=drawing.estimate(), deferred=True),
            has_image=drawing.image is not None,
        )
        with OPENAI.guard(sending), sending.in_sdk():
            try:
                response = await self._send(background, self._spool(request))
            except CALL_ERRORS as error:
                raise _submit_failed(error, request.model, sent=sending.sent) from error
            outcome = await response.outcome(request.model)
        if isinstance(outcome, Generated):
            return await self._fetched(outcome, self._download_deadline)
        if response.id is None:
            raise OPENAI.unknown("OpenAI's answer does not name the order.")
        if request.metadata.get("webhookUrl"):
            report.warning(
                "OpenAI has webhooks per project, not per order; webhookUrl is not used.",
                field="webhookUrl",
                feature="unsupported",
            )
        return Submitted(response.id, outcome.message, webhook=self._webhook)

    async def check(self, job_id: str, request: Request) -> Generated | Waiting:
        """Check a job; return its image once it is done."""
        response = await self._look_up(job_id, self._spool(request), is_absent=is_missing)
        if response is None:
            raise OPENAI.unknown("OpenAI does not know the order any more.", response_id=job_id)
        outcome = await response.outcome(request.model)
        if not isinstance(outcome, Generated):
            return outcome
        try:
            return await self._fetched(outcome, _ONE_TRY)
        except Refused as error:
            if not isinstance(error.__cause__, Retryable):
                raise
            raise check_failed(error.__cause__) from error

    async def _fetched(self, made: Generated, deadline: timedelta) -> Generated:
        """Fetch the image of a compatible server that returned its address."""
        if made.original_url is not None:
            await download(
                self._fetcher, made.original_url, made.path, self._max_bytes, deadline, cost=made.cost, data=made.data
            )
        return made

    async def cancel(self, job_id: str) -> Charge | None:
        """Cancel a job. One that has ended, or is not there, is no error. Return what OpenAI says about its charge."""
        try:
            async with self._responses.cancel(job_id) as response:
                cancelled = await _read(response.http_response, Spool(None, max_bytes=sys.maxsize))
            return cancelled.charge
        except RunError:
            return None  # it is cancelled, and what its response says cannot be read
        except CALL_ERRORS as error:
            failure = translate(error, MAINLINE, api=_API)
            if failure.code not in _NO_SUCH_JOB and not isinstance(error, ConflictError):
                raise look_up_failed(failure) from error
        ended = await self._look_up(job_id, Spool(None, max_bytes=sys.maxsize))
        return None if ended is None else ended.charge

    async def owner(self, job_id: str) -> tuple[str, int] | None:
        """Return the run id and ticket that a job was submitted with; None if it is not ours, or not there."""
        response = await self._look_up(job_id, Spool(None, max_bytes=sys.maxsize))
        return None if response is None else response.owner

    @property
    def _responses(self) -> Any:
        return self._client.responses.with_streaming_response

    def _spool(self, request: Request) -> Spool:
        return Spool(request.workdir, max_bytes=self._max_bytes)

    async def _send(self, request: BackgroundRequest, spool: Spool) -> BackgroundResponse:
        # Not by `responses.create`: that takes the image as one text and makes another one of it.
        body = request.body()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **_STREAMED}
        response = await self._client.post(
            "/responses", cast_to=httpx2.Response, content=body, options={"headers": headers}
        )
        try:
            return await _read(response, spool)
        finally:
            await response.aclose()

    async def _look_up(
        self, job_id: str, spool: Spool, *, is_absent: Callable[[Exception], bool] | None = None
    ) -> BackgroundResponse | None:
        """Retrieve a response by its id; None if there is none. Its trouble is none of the job's (see `check_failed`).

        Args:
            job_id: The id.
            spool: Takes the image.
            is_absent: Returns whether an error says that there is none; by default, also an id that is refused is none.
        """
        sending = Sending(lambda: None)
        try:
            with OPENAI.guard(sending), sending.in_sdk():
                return await self._find(job_id, spool, is_absent or _is_refused_id)
        except RunError as error:
            raise check_failed(error) from error

    async def _find(
        self, job_id: str, spool: Spool, is_absent: Callable[[Exception], bool]
    ) -> BackgroundResponse | None:
        retrieval: AbstractAsyncContextManager[Any] = self._responses.retrieve(job_id)
        try:
            async with retrieval as response:
                return await _read(response.http_response, spool)
        except CALL_ERRORS as error:
            if is_absent(error):
                return None
            raise translate(error, MAINLINE, api=_API) from error


def _is_refused_id(error: Exception) -> bool:
    return translate(error, MAINLINE, api=_API).code in _NO_SUCH_JOB


async def _read(response: httpx2.Response, spool: Spool) -> BackgroundResponse:
    try:
        async with aclosing(read_body(response.aiter_raw(), spool)) as parts:
            async for part in parts:
                if isinstance(part, Document) and (fields := part.unwrapped()[0].fields) is not None:
                    return BackgroundResponse(fields, spool, response.headers.get("x-request-id"))
    except (NotUnderstood, TooMuch) as error:
        raise OPENAI.unknown("OpenAI's answer cannot be read.") from error
    raise OPENAI.unknown("OpenAI's answer has another shape than it should.")


def _submit_failed(error: Exception, model: str, *, sent: bool) -> RunError:
    """Map an error of the submission. A server without the Responses API, or the model in between, has hints of its own."""
    if isinstance(error, NotFoundError) and MAINLINE in error.message:
        return Refused(
            f"OpenAI has no {MAINLINE} for this account, by which it draws in the background.",
            code="permission",
            hint="Leave metadata.mode out: the Images API needs no such model.",
            data={"request_id": error.request_id},
        )
    failure = translate(error, model, api=_API, sent=sent)
    if failure.code == "not_found":
        failure.hint = f"Leave metadata.mode out: this server may have the Images API. {failure.hint}"
    return failure
