"""A response of the Responses API: what has become of an order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from daemon.errors import Refused, Retryable, RunError
from daemon.providers import Generated, Waiting
from daemon.providers.openai_errors import OPENAI, reported
from daemon.providers.openai_models import settle, settle_mainline
from daemon.providers.openai_order import read_owner
from daemon.providers.vendor import as_object, order_name

_ENDED = {"completed", "failed", "incomplete", "cancelled"}
_WORDS = {"queued": "The order waits at OpenAI", "in_progress": "OpenAI is drawing"}
_USUAL_TIERS = (None, "auto", "default")
"""Others have prices of their own."""


@dataclass(frozen=True, slots=True)
class Response:
    """What was answered.

    Args:
        document: The JSON, with numbers in place of pictures.
        files: Where the pictures are.
        request_id: Of the question, for the audit trail.
    """

    document: Mapping[str, Any]
    files: Sequence[Path]
    request_id: str | None

    @property
    def id(self) -> str | None:
        """By which the order is found again."""
        return order_name(self.document.get("id"))

    @property
    def owner(self) -> tuple[str, int] | None:
        """The run and the ticket it was ordered for; None if it is none of ours."""
        return read_owner(self.document.get("metadata"))

    def outcome(self, model: str) -> Generated | Waiting:
        """The picture, or that it is not there yet. A picture that is there is paid for, however the response ended.

        Raises:
            RunError: If it ended without one.
        """
        status = self.document.get("status")
        if status not in _ENDED:
            return Waiting(message=_WORDS.get(str(status), "OpenAI is at work"))
        cost, facts = self._cost(model), self._facts()
        calls = [item for item in self._output if item.get("type") == "image_generation_call"]
        for call in reversed(calls):
            picture = self._picture(call)
            if picture is not None:
                revised = call.get("revised_prompt")
                return Generated(picture, cost, revised if isinstance(revised, str) else None, data=facts)
        error = self._failure(calls, model, facts)
        error.cost = cost
        if isinstance(error, Retryable):
            error.accepted = True  # it had been taken, and came to nothing
        raise error

    def _failure(self, calls: Sequence[Mapping[str, Any]], model: str, facts: Mapping[str, Any]) -> RunError:
        """Why there is no picture. The call of the image model knows more than the response around it."""
        told = next((call["error"] for call in calls if call.get("error")), None) or self.document.get("error")
        if told:
            return reported(told, model, facts=facts)
        match self.document.get("status"), as_object(self.document.get("incomplete_details")).get("reason"):
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
                return OPENAI.unavailable(None, f"the response is incomplete ({reason})", None, facts)
            case "failed", _:
                return OPENAI.unavailable(None, "", None, facts)
            case _:
                return OPENAI.empty(facts, said=self._text)

    def _picture(self, call: Mapping[str, Any]) -> Path | None:
        number = call.get("result")
        if not isinstance(number, str) or not number.isdigit():
            return None
        picture = self.files[int(number)]
        return picture if picture.stat().st_size else None

    def _cost(self, model: str) -> float | None:
        """USD for the picture and the words; None if either is not known."""
        document = self.document
        picture = settle(model, as_object(document.get("tool_usage")).get("image_gen"))
        words = settle_mainline(document.get("model"), document.get("usage"))
        if picture is None or words is None or document.get("service_tier") not in _USUAL_TIERS:
            return None
        return round(picture + words, 8)

    def _facts(self) -> dict[str, Any]:
        facts = {
            "response_id": self.id,
            "request_id": self.request_id,
            "usage": self.document.get("usage"),
            "image_usage": as_object(self.document.get("tool_usage")).get("image_gen"),
        }
        return {name: value for name, value in facts.items() if value is not None}

    @property
    def _output(self) -> list[dict[str, Any]]:
        return _objects(self.document.get("output"))

    @property
    def _text(self) -> str:
        """What the model said instead of having a picture drawn."""
        contents = [part for item in self._output for part in _objects(item.get("content"))]
        return " ".join(str(part.get("text") or part.get("refusal") or "") for part in contents).strip()


def _objects(value: object) -> list[dict[str, Any]]:
    listed = cast("list[object]", value) if isinstance(value, list) else []
    return [as_object(entry) for entry in listed]
