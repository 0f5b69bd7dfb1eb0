"""Read a response of `generateContent`: an image, or the reason why there is none. Google refuses with status 200."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, cast

from pydantic import AliasChoices, Field

from daemon.errors import Refused, RunError
from daemon.providers import Generated
from daemon.providers.base64_stream import Base64Decoder, ImageTooLarge, NotBase64, unescaped
from daemon.providers.error_body import find_reason
from daemon.providers.errors import Facts
from daemon.providers.google.conversation import MAX_SIGNATURE_BYTES, ResponsePart, TooLargeError
from daemon.providers.google.errors import GOOGLE
from daemon.providers.google.models import estimate, made_something, settle
from daemon.providers.google.request import ContentCall
from daemon.providers.lenient import Count, Encoded, Lenient, Name, Object, Objects, Text, counted
from daemon.providers.pictures import NotAPicture, save_picture
from daemon.providers.salvage import salvage
from daemon.providers.spool import Spool

_REFUSED = {
    *("SAFETY", "PROHIBITED_CONTENT", "RECITATION", "BLOCKLIST", "SPII", "MODEL_ARMOR", "ESCALATION"),
    *("IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION"),
}
"""Finish reasons that another attempt does not change. All others but the next two are bad luck."""
_ACCOUNT_STOPPED = "PUP_LIMITED_DISABLED"
_LANGUAGE = "LANGUAGE"
_FIELDS = {
    *("candidates", "promptFeedback", "usageMetadata", "responseId", "modelVersion", "error"),
    *("prompt_feedback", "usage_metadata", "response_id"),
}


def _named(camel: str, snake: str, **options: Any) -> Any:
    """Read a field by either of its names: the API's, or that of servers which copy it from the SDK."""
    return Field(validation_alias=AliasChoices(camel, snake), **options)


class _Blob(Lenient):
    data: Encoded = None


class _Part(Lenient):
    text: Text = None
    thought: object = None
    inline_data: Object[_Blob] = _named("inlineData", "inline_data", default=None)
    thought_signature: Encoded = _named("thoughtSignature", "thought_signature", default=None)


class _Content(Lenient):
    parts: Objects[_Part] = Field(default_factory=list)


class _Rating(Lenient):
    category: Text = None
    blocked: object = None


class _Candidate(Lenient):
    index: Count = None
    content: Object[_Content] = None
    finish_reason: Text = _named("finishReason", "finish_reason", default=None)
    finish_message: Text = _named("finishMessage", "finish_message", default=None)
    safety_ratings: Objects[_Rating] = _named("safetyRatings", "safety_ratings", default_factory=list)


class _Feedback(Lenient):
    block_reason: Text = _named("blockReason", "block_reason", default=None)
    safety_ratings: Objects[_Rating] = _named("safetyRatings", "safety_ratings", default_factory=list)


class ContentResponse(Lenient):
    """A response of `generateContent`, as far as it can be read."""

    candidates: Objects[_Candidate] = Field(default_factory=list)
    prompt_feedback: Object[_Feedback] = _named("promptFeedback", "prompt_feedback", default=None)
    usage_metadata: object = _named("usageMetadata", "usage_metadata", default=None)
    response_id: Name = _named("responseId", "response_id", default=None)
    error: object = None

    @property
    def parts(self) -> Sequence[_Part]:
        """The parts of the first candidate that has a picture, else of the first. In a stream its parts come one by one."""
        by_index: dict[int | None, list[_Part]] = {}
        for candidate in self.candidates:
            by_index.setdefault(candidate.index, []).extend(candidate.content.parts if candidate.content else ())
        drawn = (parts for parts in by_index.values() if any(part.inline_data for part in parts))
        first = next(iter(by_index.values()), list[_Part]())
        return next(drawn, first)


def merge(documents: Sequence[object]) -> dict[str, Any] | None:
    """Return the documents of a stream as one response: all candidates, and of other fields what came last.

    Returns:
        None if any of them is no object, or there are none.
    """
    merged: dict[str, Any] = {}
    candidates: list[object] = []
    for document in documents:
        if not isinstance(document, dict):
            return None
        fields = cast("dict[str, Any]", document)
        merged |= fields
        listed = fields.get("candidates", [])
        candidates += cast("list[object]", listed) if isinstance(listed, list) else []
    if len(documents) > 1:
        merged["candidates"] = candidates
    return merged if documents else None


def is_response(fields: Mapping[str, Any] | None) -> bool:
    """Return whether a document is a response of this API: an empty one, or one with a field of it that has its type."""
    if fields is None or not isinstance(fields.get("candidates", []), list):
        return False
    return not fields or not _FIELDS.isdisjoint(fields)


async def read(response: ContentResponse, documents: object, spool: Spool, call: ContentCall) -> Generated:
    """Find the image: the last that is no thought, else the last that is, else one in a field that is not known.

    Args:
        response: The response.
        documents: The JSON that it was read from.
        spool: Its long texts.
        call: The request.

    Raises:
        RunError: If there is none.
    """
    usage = counted(response.usage_metadata)
    facts: dict[str, Any] = {"response_id": response.response_id, "usage": usage}
    facts = {name: value for name, value in facts.items() if value is not None}
    cost = settle(call.model, response.usage_metadata)
    found = [(part.thought is True, part.inline_data.data) for part in response.parts if part.inline_data]
    undecodable: NotAPicture | None = None
    for data in (data for is_thought in (False, True) for thought, data in reversed(found) if thought is is_thought):
        if data is None:
            continue
        try:
            picture = await save_picture(data, spool)
        except NotAPicture as error:
            undecodable = undecodable or error
        except ImageTooLarge as error:
            raise GOOGLE.too_large_picture(spool.max_bytes, facts, cost=cost) from error
        else:
            return Generated(picture, _paid(cost, call), data=facts, seed=call.seed)
    if undecodable is not None:
        raise GOOGLE.undecodable(undecodable.path, facts, cost=cost) from undecodable
    try:
        salvaged = await salvage(documents, spool)
    except ImageTooLarge as error:
        raise GOOGLE.too_large_picture(spool.max_bytes, facts, cost=cost) from error
    if salvaged is not None and salvaged.image is not None:
        return Generated(salvaged.image, _paid(cost, call), data=facts, seed=call.seed)
    if salvaged is not None and salvaged.undecodable is not None:
        raise GOOGLE.undecodable(salvaged.undecodable, facts, cost=cost)
    error = _without_picture(response, facts)
    error.cost, error.charged = cost, made_something(response.usage_metadata)
    raise error


def _paid(cost: float | None, call: ContentCall) -> float | None:
    """Return the cost of a picture: that of the table, where nothing was counted."""
    return estimate(call.model, call.size) if cost is None else cost


def conversation_parts(response: ContentResponse, spool: Spool) -> list[ResponsePart]:
    """Return the parts of a response, without the model's thoughts.

    Raises:
        TooLargeError: If the signatures are too large.
    """
    return [
        ResponsePart(part.text, part.inline_data is not None, _signature(part.thought_signature, spool))
        for part in response.parts
        if part.thought is not True
    ]


def _signature(text: str | None, spool: Spool) -> bytes | None:
    if text is None:
        return None
    decoded = BytesIO()
    decoder = Base64Decoder(decoded, max_bytes=MAX_SIGNATURE_BYTES)
    try:
        if (path := spool.path(text)) is None:
            decoder.feed(text.encode("utf-8", "replace"))
        else:
            with path.open("rb") as file:
                for block in unescaped(file):
                    decoder.feed(block)
        decoder.finish()
    except ImageTooLarge as error:
        raise TooLargeError from error
    except NotBase64:
        return None
    return decoded.getvalue()


def _without_picture(response: ContentResponse, facts: Facts) -> RunError:
    feedback = response.prompt_feedback
    if feedback is not None and (blocked := feedback.block_reason):
        return GOOGLE.refused(
            "the prompt",
            {**facts, "reason": _short(blocked)},
            stage="input",
            categories=_categories(feedback.safety_ratings) or [_word(blocked)],
        )
    if response.error and not response.candidates:
        return GOOGLE.unavailable(None, find_reason(response.error), None, facts)
    ended = (candidate for candidate in response.candidates if candidate.finish_reason)
    candidate = next(ended, response.candidates[0] if response.candidates else _Candidate())
    reason = candidate.finish_reason or ""
    facts = {**facts, "reason": _short(reason)} if reason else facts
    if reason in _REFUSED:
        return GOOGLE.refused(
            "the picture it had made" if reason.startswith("IMAGE_") else "the request",
            facts,
            stage="output",
            categories=_categories(candidate.safety_ratings) or [_word(reason)],
        )
    if reason == _ACCOUNT_STOPPED:
        return GOOGLE.no_permission("it is limited for breaking the Prohibited Use Policy.", facts)
    if reason == _LANGUAGE:
        return Refused(
            "Google does not draw from a prompt in this language.",
            code="invalid_request",
            hint="Translate the prompt.",
            data=dict(facts),
        )
    said = " ".join(part.text for part in response.parts if part.text and part.thought is not True)
    return GOOGLE.empty(facts, reason=candidate.finish_message or said)


def _categories(ratings: Sequence[_Rating]) -> list[str]:
    """Return the blocked categories as plain words."""
    blocked = [rating.category for rating in ratings if rating.blocked is True and rating.category]
    return [_word(category.removeprefix("HARM_CATEGORY_")) for category in blocked]


def _word(name: str) -> str:
    return _short(name).removeprefix("IMAGE_").lower().replace("_", " ")


def _short(name: str) -> str:
    return name[:60]
