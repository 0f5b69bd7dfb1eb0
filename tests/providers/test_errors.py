"""Every error that a provider can give: a sentence, and one that says what to do."""

import base64
import re
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
from google.genai.errors import APIError
from google.genai.types import GenerateContentResponse

from daemon import images
from daemon.errors import OutcomeUnknown, Refused, Retryable, RunError
from daemon.prompt import PromptSpec
from daemon.providers import google_answer, google_errors, midjourney_answer, openai_errors, stability_errors
from daemon.providers.catalogue import resolve
from daemon.providers.google_errors import GOOGLE
from daemon.providers.google_request import ContentCall
from daemon.providers.mapping import content_type
from daemon.providers.midjourney_answer import MIDJOURNEY, Task
from daemon.providers.openai_errors import OPENAI
from daemon.providers.openai_response import Response
from daemon.providers.stability_errors import STABILITY
from daemon.providers.vendor import Vendor
from tests.postgres import ROOT

BLOB = base64.b64encode(bytes(range(256)) * 20).decode()
SAID = ["", "no full stop", "Two lines\nof text.", f"What about {BLOB}?", "x y " * 1000]
MODELS = {
    OPENAI: ("gpt-image-2.5-flair", "dall-e-3"),
    GOOGLE: ("gemini-x", "imagen-3.0"),
    STABILITY: ("sd9", "sd3"),
    MIDJOURNEY: ("dall-e", "v7x"),
}


def of_the_vendor(vendor: Vendor) -> Iterator[RunError]:
    """What all have in common, in the vendor's name."""
    wait = timedelta(seconds=3)
    for said in SAID:
        yield from (vendor.by_status(status, said, {}, wait=wait, blocks="model") for status in range(300, 600))
        yield vendor.bad_image(said, {})
        yield vendor.unavailable(None, said, None, {})
        yield vendor.empty({}, said=said)
        yield vendor.refused("the prompt", {}, stage="input", categories=[said] if said else [])
    for broken in (httpx.ConnectError("x"), httpx2.ReadTimeout("x"), httpx2.RemoteProtocolError("x")):
        yield vendor.broken(broken)
    yield from (vendor.no_model(model, {}) for model in MODELS[vendor])


def of_openai(said: str) -> Iterator[RunError]:
    codes = re.findall(r'"([a-z0-9_]+)"', (ROOT / "daemon/providers/openai_errors.py").read_text())
    for code in (*codes, "something new", None):
        for status in (None, 400, 404, 429, 500):
            yield openai_errors.reported({"code": code, "message": said}, "gpt-image-2", status=status)
    for ended in (
        {"status": "failed", "error": {"code": "server_error", "message": said}},
        {"status": "failed"},
        {"status": "cancelled"},
        {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}},
        {"status": "incomplete", "incomplete_details": {"reason": said}},
        {"status": "completed", "output": [{"content": [{"text": said}]}]},
    ):
        with pytest.raises(RunError) as caught:
            Response(ended, [], None).outcome("gpt-image-2")
        yield caught.value


def of_google(said: str) -> Iterator[RunError]:
    details: list[dict[str, Any]] = [
        {"reason": "API_KEY_INVALID"},
        {"reason": "BILLING_DISABLED"},
        {"violations": [{"quotaId": "PerDay"}]},
        {},
    ]
    for detail in details:
        for status, name in ((400, "FAILED_PRECONDITION"), (404, "NOT_FOUND"), (429, "RESOURCE_EXHAUSTED"), (503, "")):
            body = {"error": {"status": name, "message": said, "details": [detail]}}
            error = APIError(status, body, httpx2.Response(status, json=body))
            yield google_errors.translate(error, "gemini-x")
    call = ContentCall("gemini-x", "a red fox", "1:1", "1K", None)
    for reason in ("IMAGE_SAFETY", "SAFETY", "PUP_LIMITED_DISABLED", "LANGUAGE", "NO_IMAGE"):
        candidate = {"finishReason": reason, "finishMessage": said}
        with pytest.raises(RunError) as caught:
            google_answer.read(GenerateContentResponse.model_validate({"candidates": [candidate]}), [], call)
        yield caught.value


def of_stability(said: str) -> Iterator[RunError]:
    for status in (400, 403, 422, 429, 500):
        for name, field in (("content_moderation", ""), ("bad_request", "model:"), ("bad_request", "image:")):
            body = f'{{"name": "{name}", "errors": ["{field} {" ".join(said.split())}"]}}'.encode()
            yield stability_errors.translate(status, httpx.Headers(), body, "sd9")
    filtered = stability_errors.filtered(httpx.Headers({"finish-reason": "CONTENT_FILTERED"}), {}, 0.08)
    assert filtered is not None
    yield filtered


def of_midjourney(said: str) -> Iterator[RunError]:
    for code in (1, 3, 4, 9, 21, 22, 23, 24, 77):
        with pytest.raises(RunError) as caught:
            midjourney_answer.order_id({"code": code, "description": said, "properties": {"bannedWord": said}})
        yield caught.value
    for reason in (f"banned {said}", f"timeout {said}", f"取消 {said}", said):
        for status in ("FAILURE", "CANCEL"):
            task = Task.read({"id": "1", "status": status, "failReason": reason, "properties": {"bannedWord": said}})
            assert task is not None
            yield task.failure()


def of_the_rest(folder: Path) -> Iterator[RunError]:
    """What is said before anybody is asked."""
    text = folder / "text"
    text.write_text("no picture")
    large = folder / "large"
    large.write_bytes(bytes(100))
    for attempt in (
        partial(resolve, "dalle:3", strict=True),
        partial(resolve, "google:imagen-3.0", strict=True),
        partial(content_type, text),
        partial(images.inspect, text, max_bytes=50, max_pixels=1),
        partial(images.inspect, large, max_bytes=50, max_pixels=1),
        partial(PromptSpec.parse, {}),
        partial(PromptSpec.parse, {"promptSpec": {"basePrompt": "x", "quality": BLOB}}),
        partial(PromptSpec.parse, {"promptSpec": {"basePrompt": "x", "size": BLOB}}),
    ):
        with pytest.raises(RunError) as caught:
            attempt()
        yield caught.value


@pytest.fixture
def errors(tmp_path: Path) -> list[RunError]:
    found = [*of_the_rest(tmp_path)]
    for vendor in MODELS:
        found += of_the_vendor(vendor)
    for said in SAID:
        found += [*of_openai(said), *of_google(said), *of_stability(said), *of_midjourney(said)]
    return found


def test_every_error_is_a_sentence_with_a_cure_and_without_base64(errors: list[RunError]) -> None:
    for error in errors:
        for text in (error.message, error.hint):
            assert re.fullmatch(r"\S[^\n]{8,}[.!?…。]", text), f"{error.code}: {text!r}"
            assert not re.search(r"[A-Za-z0-9+/=_-]{60,}", text), f"{error.code}: {text!r}"
            assert len(text) < 700
            assert "None" not in text


def test_no_code_is_left_out(errors: list[RunError]) -> None:
    written = {
        code
        for path in (ROOT / "daemon/providers").glob("*.py")
        if not path.name.startswith("demo")
        for code in re.findall(r'\bcode="(\w+)"', path.read_text())
    }
    assert len(written) > 15
    assert written - {"download"} <= {error.code for error in errors}  # that one has tests of its own: test_fetch.py


def test_a_code_has_one_policy(errors: list[RunError]) -> None:
    """Whoever reads a code knows whether asking again can help."""
    kinds: dict[str, set[type[RunError]]] = {}
    for error in errors:
        kinds.setdefault(error.code, set()).add(type(error))
    assert all(len(found) == 1 for found in kinds.values()), kinds
    final = {code for code, found in kinds.items() if found == {Refused}}
    again = {code for code, found in kinds.items() if found == {Retryable}}
    assert final >= {"authentication", "content_policy", "input_image_invalid", "invalid_request", "model_retired"}
    assert again >= {"billing", "empty_result", "provider_unavailable", "quota_daily", "rate_limited", "unreachable"}
    assert kinds["outcome_unknown"] == {OutcomeUnknown}


def test_what_was_surely_not_accepted_costs_no_attempt(errors: list[RunError]) -> None:
    free = {error.code for error in errors if isinstance(error, Retryable) and not error.accepted}
    assert free >= {"billing", "quota_daily", "rate_limited", "unreachable"}
    assert not free & {"empty_result", "invalid_image"}
