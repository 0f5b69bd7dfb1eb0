"""What Stability AI answers when there is no picture, and what we make of it."""

import json
from datetime import timedelta
from typing import Any, cast

import httpx

from daemon.errors import Refused, RunError
from daemon.providers.vendor import Facts, Vendor, retry_after

STABILITY = Vendor(
    "Stability AI",
    provider="stability",
    key="STABILITY_API_KEY",
    address="STABILITY_BASE_URL",
    account="platform.stability.ai/account",
)
_SHUT_OUT = timedelta(seconds=60)
"""After more than 150 requests in ten seconds, by the documentation; no header says so."""
_MODERATION = "content_moderation"
_FILTERED = "CONTENT_FILTERED"


def translate(status: int, headers: httpx.Headers, body: bytes, model: str) -> RunError:
    """Finds the error of ours for an answer that is an error.

    Args:
        status: Its status, any but 200.
        headers, body: What came with it; `{"id", "name", "errors": […]}` from the API itself.
        model: The model that was asked.
    """
    document = _parse(body)
    name = str(document.get("name") or "")
    listed = document.get("errors")
    errors = [str(error) for error in cast("list[object]", listed)] if isinstance(listed, list) else []
    said = " ".join(errors)
    request_id = document.get("id") or headers.get("x-request-id")
    facts = {"status": status, "code": name or None, "request_id": request_id}
    facts = {key: value for key, value in facts.items() if value is not None}
    if status == 403 and name == _MODERATION:
        return STABILITY.refused("the prompt", facts, stage="input", categories=[])
    if status == 400 and any(error.startswith("model:") for error in errors):
        return STABILITY.no_model(model, facts)
    if status in (400, 422) and any(error.startswith("image:") for error in errors):
        return STABILITY.bad_image(said, facts)
    wait = retry_after(headers.get("retry-after")) or (_SHUT_OUT if status == 429 else None)
    return STABILITY.by_status(status, said, facts, wait=wait, blocks="provider")


def filtered(headers: httpx.Headers, facts: Facts, cost: float | None) -> Refused | None:
    """The error for a picture that was made, paid for, and blurred; None if it was not."""
    if headers.get("finish-reason") != _FILTERED:
        return None
    return STABILITY.refused("the picture it had made", facts, stage="output", categories=[], cost=cost)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        document: object = json.loads(body)
    except ValueError:
        return {}
    return cast("dict[str, Any]", document) if isinstance(document, dict) else {}
