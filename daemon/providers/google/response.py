"""What is in an answer of `generateContent`: a picture, or a reason why there is none. Google's refusals are answers too."""

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.genai.types import Candidate, GenerateContentResponse, Part, SafetyRating

from daemon.errors import Refused, RunError
from daemon.providers import Generated
from daemon.providers.google_errors import GOOGLE
from daemon.providers.google_models import estimate, settle
from daemon.providers.google_request import ContentCall
from daemon.providers.vendor import Facts

_REFUSED = {
    *("SAFETY", "PROHIBITED_CONTENT", "RECITATION", "BLOCKLIST", "SPII", "MODEL_ARMOR", "ESCALATION"),
    *("IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION"),
}
"""Finish reasons that asking again does not change. All others but the next two are bad luck."""
_ACCOUNT_STOPPED = "PUP_LIMITED_DISABLED"
_LANGUAGE = "LANGUAGE"


def read(response: GenerateContentResponse, files: Sequence[Path], call: ContentCall) -> Generated:
    """Finds the picture.

    Args:
        response: As the SDK gives it, with the numbers of pictures in the place of pictures.
        files: The pictures.
        call: What was asked.

    Raises:
        RunError: If there is none.
    """
    counted = response.usage_metadata
    usage = counted.model_dump(mode="json", by_alias=True, exclude_none=True) if counted else None
    facts: dict[str, Any] = {"response_id": response.response_id, "usage": usage}
    facts = {name: value for name, value in facts.items() if value is not None}
    cost = settle(call.model, usage)
    candidate = response.candidates[0] if response.candidates else None
    parts = _parts(candidate)
    pictures = [files[number] for part in parts if (number := _number(part)) is not None]
    if pictures and pictures[-1].stat().st_size:
        price = estimate(call.model, call.size) if cost is None else cost
        return Generated(pictures[-1], price, data=facts)
    feedback = response.prompt_feedback
    if feedback and feedback.block_reason:
        reason = str(feedback.block_reason.value)
        raise GOOGLE.refused(
            "the prompt",
            {**facts, "reason": reason},
            stage="input",
            categories=_categories(feedback.safety_ratings) or [_word(reason)],
            cost=cost,
        )
    raise _without_picture(candidate, parts, facts, cost)


def spoken(response: GenerateContentResponse) -> list[Part]:
    """What the model answered, without its thoughts."""
    return [part for part in _parts(response.candidates[0] if response.candidates else None) if not part.thought]


def _parts(candidate: Candidate | None) -> Sequence[Part]:
    return (candidate.content.parts if candidate and candidate.content else None) or []


def _number(part: Part) -> int | None:
    """Which picture is in a part; None for a text, and for a picture that belongs to the model's thoughts."""
    if part.thought or part.inline_data is None or not part.inline_data.data:
        return None
    return int(b64encode(part.inline_data.data))


def _without_picture(candidate: Candidate | None, parts: Sequence[Part], facts: Facts, cost: float | None) -> RunError:
    reason = str(candidate.finish_reason.value) if candidate and candidate.finish_reason else ""
    facts = {**facts, "reason": reason} if reason else facts
    said = (candidate.finish_message if candidate else None) or " ".join(
        part.text for part in parts if part.text and not part.thought
    )
    if reason in _REFUSED:
        return GOOGLE.refused(
            "the picture it had made" if reason.startswith("IMAGE_") else "the request",
            facts,
            stage="output",
            categories=_categories(candidate.safety_ratings if candidate else None) or [_word(reason)],
            cost=cost,
        )
    if reason == _ACCOUNT_STOPPED:
        return GOOGLE.no_permission("it is limited for breaking the Prohibited Use Policy.", facts)
    if reason == _LANGUAGE:
        return Refused(
            "Google does not draw from a prompt in this language.",
            code="invalid_request",
            hint="Translate the prompt.",
            data=dict(facts),
            cost=cost,
        )
    return GOOGLE.empty(facts, said=said, cost=cost)


def _categories(ratings: Sequence[SafetyRating] | None) -> list[str]:
    """What the rating found, as plain words."""
    blocked = [rating.category.value for rating in ratings or () if rating.blocked and rating.category]
    return [_word(str(category).removeprefix("HARM_CATEGORY_")) for category in blocked]


def _word(name: str) -> str:
    return name.removeprefix("IMAGE_").lower().replace("_", " ")
