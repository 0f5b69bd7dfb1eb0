"""The Responses API in the background: a picture is ordered, asked about, and fetched when it is there.

The order's id is all that has to be kept: any daemon finds the response again for 30 days. There is no list of responses,
so an id that was lost before it was written down comes back by OpenAI's webhook alone.
"""

import sys
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx2
from openai import AsyncOpenAI, ConflictError, NotFoundError

from daemon.errors import Refused, RunError
from daemon.providers import Generated, Reporter, Request, Submitted, Waiting
from daemon.providers.base64_stream import Base64Stream, BrokenImage, ImageTooLarge
from daemon.providers.openai_answer import read_document
from daemon.providers.openai_errors import BROKEN, OPENAI, translate
from daemon.providers.openai_models import MAINLINE
from daemon.providers.openai_order import Order
from daemon.providers.openai_request import draw
from daemon.providers.openai_response import Response
from daemon.providers.vendor import asked_in_vain

_API = "Responses API"
_NOTHING_THERE = {"not_found", "invalid_request"}
"""What a question about a response comes to if it is gone, was never there, or cannot be cancelled any more."""
_STREAMED = {"X-Stainless-Raw-Response": "stream"}
"""Tells the SDK to leave the answer's body unread, as its `with_streaming_response` does."""


class OpenAIBackground:
    """Orders pictures from OpenAI, or from a server that speaks its Responses API.

    Args:
        client: Speaks to that server.
        webhook: Whether OpenAI's webhooks are verified here.
        max_bytes: Largest image that is accepted.
    """

    def __init__(self, client: AsyncOpenAI, *, webhook: bool, max_bytes: int) -> None:
        self._client = client
        self._webhook = webhook
        self._max_bytes = max_bytes

    async def order(self, request: Request, report: Reporter) -> Generated | Submitted:
        """Orders the picture. A server that knows no background may have it ready at once."""
        drawing = draw(request, report.warning)
        report.warning(
            "In background mode a language model words the prompt anew; revisedPrompt is what was drawn.",
            field="mode",
            feature="rewritten",
        )
        order = Order(drawing, request.run_id, request.ticket)
        report.submitted(order.described(), estimate=drawing.estimate(), order=True)
        with self._images(request) as images:
            try:
                response = await self._send(order, images)
            except BROKEN as error:
                raise _not_taken(error, request.model) from error
            outcome = response.outcome(request.model)
        if isinstance(outcome, Generated):
            return outcome
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
        """Asks about the order, and fetches its picture once it is there."""
        with self._images(request) as images:
            try:
                response = await self._find(job_id, images)
            except RunError as error:
                raise asked_in_vain(error) from error
            if response is None:
                raise OPENAI.unknown("OpenAI does not know the order any more.", response_id=job_id)
            return response.outcome(request.model)

    async def cancel(self, job_id: str) -> None:
        """Has the order stopped. Nothing happens to one that has ended, or is not there."""
        try:
            async with self._responses.cancel(job_id):
                pass  # the answer is the response, perhaps with its picture: nobody reads it
        except BROKEN as error:
            told = translate(error, MAINLINE, api=_API)
            if told.code not in _NOTHING_THERE and not isinstance(error, ConflictError):
                raise asked_in_vain(told) from error

    async def owner(self, job_id: str) -> tuple[str, int] | None:
        """The run and the ticket that the order was made for; None if it is none of ours, or not there."""
        with Base64Stream(None, max_bytes=sys.maxsize, key="result") as images:
            try:
                response = await self._find(job_id, images)
            except RunError as error:
                raise asked_in_vain(error) from error
        return None if response is None else response.owner

    @property
    def _responses(self) -> Any:
        return self._client.responses.with_streaming_response

    def _images(self, request: Request) -> Base64Stream:
        return Base64Stream(request.workdir, max_bytes=self._max_bytes, key="result")

    async def _send(self, order: Order, images: Base64Stream) -> Response:
        # Not by `responses.create`: that takes the image as one text and makes another one of it.
        body = order.body()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **_STREAMED}
        answer = await self._client.post(
            "/responses", cast_to=httpx2.Response, content=body, options={"headers": headers}
        )
        try:
            return await _read(answer, images)
        finally:
            await answer.aclose()

    async def _find(self, job_id: str, images: Base64Stream) -> Response | None:
        """Asks for a response; None if there is none of that id."""
        asking: AbstractAsyncContextManager[Any] = self._responses.retrieve(job_id)
        try:
            async with asking as answer:
                return await _read(answer.http_response, images)
        except BROKEN as error:
            told = translate(error, MAINLINE, api=_API)
            if told.code in _NOTHING_THERE:
                return None
            raise told from error


async def _read(answer: httpx2.Response, images: Base64Stream) -> Response:
    try:
        document = await read_document(answer.aiter_bytes(), images)
    except ImageTooLarge as error:
        raise Refused(str(error), code="image_too_large", hint="Ask for a smaller size, or raise the limit.") from error
    except BrokenImage as error:
        raise OPENAI.unknown(f"OpenAI's answer is damaged: {error}") from error
    return Response(document, images.files, answer.headers.get("x-request-id"))


def _not_taken(error: Exception, model: str) -> RunError:
    """What an order that was not taken means for the run."""
    if isinstance(error, NotFoundError) and MAINLINE in error.message:
        return Refused(
            f"OpenAI has no {MAINLINE} for this account, by which it draws in the background.",
            code="permission",
            hint="Leave metadata.mode out: the Images API needs no such model.",
            data={"request_id": error.request_id},
        )
    told = translate(error, model, api=_API)
    if told.code == "not_found":
        told.hint = f"Leave metadata.mode out: this server may have the Images API. {told.hint}"
    return told
