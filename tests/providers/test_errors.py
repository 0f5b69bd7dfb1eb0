"""Every error that a provider can give: a sentence, and one that says what to do."""

import base64
import json
import re
from collections.abc import Coroutine, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest

from daemon.errors import OutcomeUnknown, Refused, Retryable, RunError
from daemon.prompt import PromptSpec
from daemon.providers import stability
from daemon.providers.catalogue import resolve
from daemon.providers.errors import ErrorMessages
from daemon.providers.google import errors as google_errors
from daemon.providers.google import response as google_response
from daemon.providers.google.errors import GOOGLE
from daemon.providers.google.request import ContentCall
from daemon.providers.midjourney import response as midjourney_response
from daemon.providers.midjourney.response import MIDJOURNEY, Task
from daemon.providers.openai import errors as openai_errors
from daemon.providers.openai.background_response import BackgroundResponse
from daemon.providers.openai.errors import OPENAI
from daemon.providers.prompts import content_type
from daemon.providers.spool import Spool
from daemon.providers.stability import STABILITY
from daemon.worker.outcomes import AGAIN, Failure
from tests.support.postgres import ROOT

BLOB = base64.b64encode(bytes(range(256)) * 20).decode()
SAID = ["", "no full stop", "Two lines\nof text.", f"What about {BLOB}?", "x y " * 1000]
MODELS = {
    OPENAI: ("gpt-image-2.5-flair", "dall-e-3"),
    GOOGLE: ("gemini-x", "imagen-3.0"),
    STABILITY: ("sd9", "sd3"),
    MIDJOURNEY: ("dall-e", "v7x"),
}


def common_errors(messages: ErrorMessages) -> Iterator[RunError]:
    """Errors that all providers have in common."""
    wait = timedelta(seconds=3)
    for words in SAID:
        for status in range(300, 600):
            for own in (True, False):
                yield messages.by_status(status, words, {}, own=own, wait=wait, blocks="model")
        yield messages.bad_image(words, {})
        yield messages.unavailable(None, words, None, {})
        yield messages.empty({}, reason=words)
        yield messages.too_large_picture(50_000, {})
        yield messages.refused("the prompt", {}, stage="input", categories=[words] if words else [])
    for broken in (httpx.ConnectError("x"), httpx2.ReadTimeout("x"), httpx2.RemoteProtocolError("x")):
        yield messages.transport_error(broken)
    yield from (messages.no_model(model, {}) for model in MODELS[messages])


def failure(call: Coroutine[Any, Any, object]) -> RunError:
    """Return the error of a coroutine that waits for nothing."""
    with pytest.raises(RunError) as caught:
        call.send(None)
    return caught.value


def of_openai(words: str) -> Iterator[RunError]:
    codes = re.findall(r'"([a-z0-9_]+)"', (ROOT / "daemon/providers/openai/errors.py").read_text())
    for code in (*codes, "something new", None):
        for status in (None, 400, 404, 429, 500):
            yield openai_errors.reported({"code": code, "message": words}, "gpt-image-2", status=status)
    for ended in (
        {"status": "failed", "error": {"code": "server_error", "message": words}},
        {"status": "failed"},
        {"status": "cancelled"},
        {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}},
        {"status": "incomplete", "incomplete_details": {"reason": words}},
        {"status": "completed", "output": [{"content": [{"text": words}]}]},
    ):
        yield failure(BackgroundResponse(ended, Spool(None, max_bytes=1), None).outcome("gpt-image-2"))


def of_google(words: str) -> Iterator[RunError]:
    details: list[dict[str, Any]] = [
        {"reason": "API_KEY_INVALID"},
        {"reason": "BILLING_DISABLED"},
        {"violations": [{"quotaId": "PerDay"}]},
        {},
    ]
    for detail in details:
        for status, name in ((400, "FAILED_PRECONDITION"), (404, "NOT_FOUND"), (429, "RESOURCE_EXHAUSTED"), (503, "")):
            body = {"error": {"status": name, "message": words, "details": [detail]}}
            yield google_errors.translate(status, {}, json.dumps(body).encode(), "gemini-x")
    call = ContentCall("gemini-x", "a red fox", "1:1", "1K", None)
    for reason in ("IMAGE_SAFETY", "SAFETY", "PUP_LIMITED_DISABLED", "LANGUAGE", "NO_IMAGE"):
        candidate = {"finishReason": reason, "finishMessage": words}
        response = google_response.ContentResponse.read({"candidates": [candidate]})
        yield failure(google_response.read(response, {}, Spool(None, max_bytes=1), call))


def of_stability(words: str) -> Iterator[RunError]:
    for status in (400, 403, 422, 429, 500):
        for name, field in (("content_moderation", ""), ("bad_request", "model:"), ("bad_request", "image:")):
            body = f'{{"name": "{name}", "errors": ["{field} {" ".join(words.split())}"]}}'.encode()
            yield stability.translate(status, httpx.Headers(), body, "sd9")
    filtered = stability.filtered("CONTENT_FILTERED", {}, 0.08)
    assert filtered is not None
    yield filtered
    for document in ({"errors": [words]}, {"name": words}, {"name": "content_moderation"}, {}):
        yield stability.failed(stability.ImageDocument.read(document), {})


def of_midjourney(words: str) -> Iterator[RunError]:
    for code in (1, 3, 4, 9, 21, 22, 23, 24, 77):
        with pytest.raises(RunError) as caught:
            midjourney_response.submitted_job_id(
                {"code": code, "description": words, "properties": {"bannedWord": words}}
            )
        yield caught.value
    for reason in (f"banned {words}", f"timeout {words}", f"取消 {words}", words):
        for status in ("FAILURE", "CANCEL"):
            task = Task.read({"id": "1", "status": status, "failReason": reason, "properties": {"bannedWord": words}})
            assert task is not None
            yield task.failure()


def early_errors(folder: Path) -> Iterator[RunError]:
    """Errors that are raised before any provider is called."""
    text = folder / "text"
    text.write_text("no picture")
    for attempt in (
        partial(resolve, "dalle:3", strict=True),
        partial(resolve, "google:imagen-3.0", strict=True),
        partial(content_type, text),
        partial(PromptSpec.parse, {}),
        partial(PromptSpec.parse, {"promptSpec": {"basePrompt": "x", "quality": BLOB}}),
        partial(PromptSpec.parse, {"promptSpec": {"basePrompt": "x", "size": BLOB}}),
    ):
        with pytest.raises(RunError) as caught:
            attempt()
        yield caught.value


@pytest.fixture
def errors(tmp_path: Path) -> list[RunError]:
    found = [*early_errors(tmp_path)]
    for messages in MODELS:
        found += common_errors(messages)
    for words in SAID:
        found += [*of_openai(words), *of_google(words), *of_stability(words), *of_midjourney(words)]
    return found


def test_errors_have_a_sentence_and_a_hint_without_base64(errors: list[RunError]) -> None:
    for error in errors:
        passing = isinstance(error, Retryable | OutcomeUnknown)
        for text in (error.message, Failure.of(error).hint_with(AGAIN if passing else "")):
            assert re.fullmatch(r"\S[^\n]{8,}[.!?…。]", text), f"{error.code}: {text!r}"
            assert not re.search(r"[A-Za-z0-9+/=_-]{60,}", text), f"{error.code}: {text!r}"
            assert len(text) < 700
            assert "None" not in text


def test_every_code_is_covered(errors: list[RunError]) -> None:
    written = {
        code
        for path in (ROOT / "daemon/providers").rglob("*.py")
        if "demo" not in path.parts
        for code in re.findall(r'\bcode="(\w+)"', path.read_text())
    }
    assert len(written) > 15
    assert written - {"download", "image_too_large"} <= {
        error.code for error in errors
    }  # tests/fetch and tests/images have those


def test_a_code_has_one_policy(errors: list[RunError]) -> None:
    """A code alone says whether another attempt can help."""
    kinds: dict[str, set[type[RunError]]] = {}
    for error in errors:
        kinds.setdefault(error.code, set()).add(type(error))
    assert all(len(found) == 1 for found in kinds.values()), kinds
    final = {code for code, found in kinds.items() if found == {Refused}}
    again = {code for code, found in kinds.items() if found == {Retryable}}
    assert final >= {"authentication", "content_policy", "input_image_invalid", "invalid_request", "model_retired"}
    assert again >= {"billing", "empty_result", "provider_unavailable", "quota_daily", "rate_limited", "unreachable"}
    assert kinds["outcome_unknown"] == {OutcomeUnknown}


def test_requests_not_accepted_cost_no_attempt(errors: list[RunError]) -> None:
    free = {error.code for error in errors if isinstance(error, Retryable) and not error.accepted}
    assert free >= {"billing", "quota_daily", "rate_limited", "unreachable"}
    assert not free & {"empty_result", "invalid_image"}
