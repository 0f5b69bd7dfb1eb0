"""Read a response of the Responses API: the state of a background job, its image or its error."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from daemon.errors import Refused, Retryable, RunError
from daemon.providers import Charge, Generated, Waiting
from daemon.providers.base64_stream import ImageTooLarge
from daemon.providers.errors import read_job_id
from daemon.providers.lenient import Encoded, Lenient, Name, Object, Objects, Text, counted
from daemon.providers.openai.background_request import read_owner
from daemon.providers.openai.errors import OPENAI, reported
from daemon.providers.openai.models import settle, settle_mainline
from daemon.providers.pictures import NotAPicture, is_url, save_picture
from daemon.providers.salvage import Salvaged, salvage
from daemon.providers.spool import Spool
from daemon.providers.words import readable

_ENDED_EARLY = {"failed", "incomplete", "cancelled"}
_ENDED = {"completed", *_ENDED_EARLY}
_MESSAGES = {"queued": "The order waits at OpenAI", "in_progress": "OpenAI is drawing"}
_USUAL_TIERS = (None, "auto", "default")
"""Other tiers have prices of their own."""


class _Content(Lenient):
    text: Text = None
    refusal: Text = None


class _Output(Lenient):
    type: Text = None
    result: Encoded = None
    revised_prompt: Text = None
    quality: Name = None
    error: object = None
    content: Objects[_Content] = Field(default_factory=list)


class _Tool(Lenient):
    model: Text = None
    quality: Name = None


class _ToolUsage(Lenient):
    image_gen: object = None


class _Incomplete(Lenient):
    reason: Text = None


class _Body(Lenient):
    id: object = None
    status: Text = None
    model: Text = None
    error: object = None
    incomplete_details: Object[_Incomplete] = None
    output: Objects[_Output] = Field(default_factory=list)
    usage: object = None
    tool_usage: Object[_ToolUsage] = None
    service_tier: Name = None
    metadata: object = None
    tools: Objects[_Tool] = Field(default_factory=list)


class BackgroundResponse:
    """One response.

    Args:
        document: The JSON.
        spool: Its long texts.
        request_id: Of the HTTP request, for the audit trail.
    """

    def __init__(self, document: object, spool: Spool, request_id: str | None) -> None:
        self._document = document
        self._body = _Body.read(document)
        self._spool = spool
        self._request_id = request_id

    @property
    def id(self) -> str | None:
        """The provider job id; None if it is missing or malformed."""
        return read_job_id(self._body.id)

    @property
    def owner(self) -> tuple[str, int] | None:
        """The run id and ticket that it was submitted with; None if it is not ours."""
        return read_owner(self._body.metadata)

    @property
    def charge(self) -> Charge | None:
        """The charge of a response that nobody waits for any more. As where one is checked, a picture or counted tokens are
        charged, and an end without either is not. None where it has not ended, or says nothing."""
        if self._counted or any(item.result is not None for item in self._body.output):
            drawing = next((tool.model for tool in self._body.tools if tool.model), "")
            return Charge(charged=True, cost=self._cost(drawing))
        return Charge(charged=False) if self._status in _ENDED_EARLY else None

    async def outcome(self, model: str) -> Generated | Waiting:
        """Return the image, or that it is not ready. An image that is there is paid for, however the response ended.

        Returns:
            One with `original_url` has yet to be fetched from there.

        Raises:
            RunError: If it ended without one.
        """
        if (message := _MESSAGES.get(self._status)) is not None:
            return Waiting(message=message)
        cost, facts = self._cost(model), self._facts()
        calls = [item for item in self._body.output if item.type == "image_generation_call"]
        try:
            found = await self._find(calls)
        except ImageTooLarge as error:
            raise OPENAI.too_large_picture(self._spool.max_bytes, facts, cost=cost) from error
        call = next((call for call in reversed(calls) if call.result is not None), _Output())
        if found.image is not None or found.url is not None:
            quality = call.quality or next((tool.quality for tool in self._body.tools if tool.quality), None)
            path = found.image or self._spool.new_path()
            return Generated(path, cost, call.revised_prompt, found.url, facts, quality=quality)
        if self._status not in _ENDED:
            return Waiting(message="OpenAI is at work")
        if found.undecodable is not None:
            raise OPENAI.undecodable(found.undecodable, facts, cost=cost)
        error = self._failure(calls, model, facts)
        error.cost = cost
        error.charged = cost is not None or self._counted
        if isinstance(error, Retryable):
            error.accepted = True  # the job was accepted, and failed later
        raise error

    async def _find(self, calls: Sequence[_Output]) -> Salvaged:
        """Find the image of the last call that has one; where the response has ended, also one in a field that is not known."""
        url = undecodable = None
        for call in reversed(calls):
            if call.result is None:
                continue
            if call.result not in self._spool and is_url(call.result):
                url = url or call.result.strip()
                continue
            try:
                return Salvaged(await save_picture(call.result, self._spool))
            except NotAPicture as error:
                undecodable = undecodable or error.path
        if url is not None or undecodable is not None or self._status not in _ENDED:
            return Salvaged(url=url, undecodable=None if url else undecodable)
        return await salvage(self._document, self._spool) or Salvaged()

    def _failure(self, calls: Sequence[_Output], model: str, facts: Mapping[str, Any]) -> RunError:
        """Map the reason for having no image. The call of the image model has more detail than the response around it."""
        if reason := next((call.error for call in calls if call.error), None) or self._body.error:
            return reported(reason, model, facts=facts)
        why = (self._body.incomplete_details or _Incomplete()).reason
        match self._status, why:
            case "cancelled", _:
                return Refused(
                    "The order was cancelled at OpenAI.",
                    code="cancelled_there",
                    hint="Requeue the run to order it again.",
                    data=dict(facts),
                )
            case "incomplete", "content_filter":
                return OPENAI.refused("the picture it had made", facts, stage="output", categories=[])
            case "incomplete", reason:
                said = readable(reason or "no reason given", 100).rstrip(".")
                return OPENAI.unavailable(None, f"the response is incomplete ({said})", None, facts)
            case "failed", _:
                return OPENAI.unavailable(None, "", None, facts)
            case _:
                return OPENAI.empty(facts, reason=self._text)

    def _cost(self, model: str) -> float | None:
        """USD for the image and the text model; None if either is not known."""
        image = settle(model, self._image_usage)
        text = settle_mainline(self._body.model, self._body.usage)
        if image is None or text is None or self._body.service_tier not in _USUAL_TIERS:
            return None
        return round(image + text, 8)

    def _facts(self) -> dict[str, Any]:
        facts = {
            "response_id": self.id,
            "request_id": self._request_id,
            "usage": counted(self._body.usage),
            "image_usage": counted(self._image_usage),
        }
        return {name: value for name, value in facts.items() if value is not None}

    @property
    def _status(self) -> str:
        return (self._body.status or "").strip().lower()

    @property
    def _counted(self) -> bool:
        """Whether tokens were counted, which are charged."""
        return counted(self._body.usage) is not None or counted(self._image_usage) is not None

    @property
    def _image_usage(self) -> object:
        return (self._body.tool_usage or _ToolUsage()).image_gen

    @property
    def _text(self) -> str:
        """The model's text, where it called no image tool."""
        contents = [part for item in self._body.output for part in item.content]
        return " ".join(part.text or part.refusal or "" for part in contents).strip()
