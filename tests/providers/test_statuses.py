"""Each status of each provider, with each kind of body, is of one class: free, unknown, or charged (design.md, Money)."""

import json
import re
from typing import Any

import httpx
import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import APIStatusError

from daemon.errors import OutcomeUnknown, Refused, Retryable, RunError
from daemon.providers import stability
from daemon.providers.error_body import ErrorBody
from daemon.providers.google import errors as google_errors
from daemon.providers.midjourney.response import MIDJOURNEY, is_own, submitted_job_id
from daemon.providers.openai import errors as openai_errors
from daemon.providers.openai.errors import OPENAI
from daemon.providers.sending import Sending

PAGE = b"<!DOCTYPE html><html><h1>Bad <b>gateway</b></h1></html>"
OWN: dict[str, Any] = {
    "openai": {"error": {"message": "It says why.", "type": "error", "code": None}},
    "google": {"error": {"code": 0, "message": "It says why.", "status": "SOMETHING"}},
    "stability": {"id": "1", "name": "something", "errors": ["It says why."]},
    "midjourney": {"code": 9, "description": "It says why."},
}
FOREIGN = [
    {"detail": "It says why."},
    {"error": "It says why."},
    {"message": "It says why."},
    {"detail": [{"loc": ["body", "size"], "msg": "It says why.", "type": "value_error"}]},
    {"title": "It says why.", "status": 400},
    {"id": "1", "errors": [{"message": "It says why."}]},
]
HOSTS = {
    "openai": "api.openai.com",
    "google": "generativelanguage.googleapis.com",
    "stability": "api.stability.ai",
}
UNKNOWN_ALWAYS = [408, 499, 504, *range(520, 531)]


def translated(
    provider: str, status: int, body: bytes, *, host: str = "127.0.0.1", wait: str | None = None
) -> RunError:
    headers = {} if wait is None else {"retry-after": wait}
    match provider:
        case "openai":
            request = httpx2.Request("POST", f"https://{host}/v1/images/generations")
            response = httpx2.Response(status, headers=headers, content=body, request=request)
            return openai_errors.translate(APIStatusError("", response=response, body=None), "gpt-image-2")
        case "google":
            return google_errors.translate(status, headers, body, "gemini-x", foreign="googleapis" not in host)
        case "stability":
            foreign = "stability" not in host
            return stability.translate(status, httpx.Headers(headers), body, "core", foreign=foreign)
        case _:
            document = ErrorBody.of(body, status)
            return MIDJOURNEY.by_status(status, document.reason, {"status": status}, own=is_own(document))


@pytest.mark.parametrize("provider", OWN)
@pytest.mark.parametrize("status", [500, 501, 502, 503, 507, 599])
def test_own_errors_of_5xx_are_free_and_give_attempts_back(provider: str, status: int) -> None:
    error = translated(provider, status, json.dumps(OWN[provider]).encode())
    assert isinstance(error, Retryable)
    assert (error.own_error, error.accepted, error.charged, error.status) == (True, True, False, status)
    assert "It says why." in error.message


@pytest.mark.parametrize("provider", OWN)
@pytest.mark.parametrize("status", [500, 501, 502, 503, 507, 599])
@pytest.mark.parametrize("body", [PAGE, b"", b"upstream connect error", b'{"a": 1}', b"[]", b"\xff\xfe"])
def test_gateways_responses_of_5xx_are_unknown(provider: str, status: int, body: bytes) -> None:
    error = translated(provider, status, body)
    assert isinstance(error, OutcomeUnknown)
    assert error.status == status


@pytest.mark.parametrize("provider", OWN)
@pytest.mark.parametrize("status", UNKNOWN_ALWAYS)
@pytest.mark.parametrize("own", [True, False])
def test_timeouts_of_gateways_are_unknown(provider: str, status: int, *, own: bool) -> None:
    error = translated(provider, status, json.dumps(OWN[provider]).encode() if own else PAGE)
    assert isinstance(error, OutcomeUnknown)
    assert error.status == status


@pytest.mark.parametrize("provider", OWN)
@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 415, 422, 429, 451])
@pytest.mark.parametrize("own", [True, False])
def test_requests_that_are_turned_down_are_free(provider: str, status: int, *, own: bool) -> None:
    error = translated(provider, status, json.dumps(OWN[provider]).encode() if own else PAGE)
    assert isinstance(error, Refused) or (isinstance(error, Retryable) and not error.accepted)
    assert (error.charged, error.cost, error.status) == (False, None, status)


@pytest.mark.parametrize("provider", ["openai", "google", "stability"])
@pytest.mark.parametrize("body", FOREIGN)
@pytest.mark.parametrize("status", [400, 422, 500, 503])
def test_foreign_error_objects_give_their_reason(provider: str, body: dict[str, Any], status: int) -> None:
    error = translated(provider, status, json.dumps(body).encode())
    assert "It says why." in error.message
    assert isinstance(error, Retryable if status >= 500 else Refused)


@pytest.mark.parametrize("provider", HOSTS)
@pytest.mark.parametrize("body", [FOREIGN[0], FOREIGN[2]])
def test_foreign_object_at_its_own_host_is_a_gateways(provider: str, body: dict[str, Any]) -> None:
    assert isinstance(translated(provider, 503, json.dumps(body).encode(), host=HOSTS[provider]), OutcomeUnknown)


@pytest.mark.parametrize("provider", OWN)
@pytest.mark.parametrize(
    ("status", "code", "cure"),
    [
        (405, "not_found", "_URL"),
        (410, "not_found", "_URL"),
        (407, "permission", "HTTPS_PROXY"),
        (431, "invalid_request", "_URL"),
        (451, "permission", "may be used"),
    ],
)
@pytest.mark.parametrize("body", [b"", b'{"detail": "No."}', PAGE])
def test_cure_fits_the_status(provider: str, status: int, code: str, cure: str, body: bytes) -> None:
    error = translated(provider, status, body)
    assert error.code == code
    assert cure in error.hint or (status == 451 and body == PAGE)
    assert "prompt" not in error.hint


@pytest.mark.parametrize("provider", OWN)
@pytest.mark.parametrize("status", [400, 401, 403, 406, 415, 418, 451])
def test_page_is_that_of_a_gateway(provider: str, status: int) -> None:
    error = translated(provider, status, PAGE)
    assert re.fullmatch(rf"A gateway in front of .* turned the request down \({status}\)\.", error.message)
    assert "_URL" in error.hint
    assert "cure" not in error.data


@pytest.mark.parametrize("has_image", [True, False])
def test_413_is_about_the_image_only_if_there_is_one(*, has_image: bool) -> None:
    with pytest.raises(Refused) as caught, OPENAI.guard(Sending(lambda: None, has_image=has_image)):
        raise translated("openai", 413, PAGE)
    assert (caught.value.code, caught.value.status) == ("too_large", 413)
    assert ("previous image" in caught.value.message) == has_image
    assert ("OPENAI_BASE_URL" in caught.value.hint) != has_image


def test_refusal_with_usage_is_charged() -> None:
    body = {**OWN["openai"], "usage": {"input_tokens": 13, "output_tokens": 100}}
    assert translated("openai", 400, json.dumps(body).encode()).charged


@pytest.mark.parametrize("provider", OWN)
@pytest.mark.parametrize("status", [400, 403, 404, 409, 413, 422, 429, 500, 502, 503, 504, 524])
@pytest.mark.parametrize("wrapped", [None, "message", "detail"])
def test_html_is_never_shown(provider: str, status: int, wrapped: str | None) -> None:
    body = (
        PAGE if wrapped is None else json.dumps({"error": {wrapped: PAGE.decode()}, "errors": [PAGE.decode()]}).encode()
    )
    error = translated(provider, status, body)
    for text in (error.message, error.hint, json.dumps(error.data)):
        assert "<" not in text
        assert "DOCTYPE" not in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["error", "code", "message", "status", "details", "retryDelay", "violations", "errors", "name", "usage"]
            )
            | st.text(max_size=3),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(provider=st.sampled_from(sorted(OWN)), status=st.integers(300, 599), body=st.binary(max_size=60) | JSON)
def test_any_error_body_has_a_class(provider: str, status: int, body: object) -> None:
    """Any status that is no success, with any bytes or any JSON, of each provider: a RunError, never another exception."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    error = translated(provider, status, text)
    assert isinstance(error, OutcomeUnknown | Refused | Retryable)
    assert error.status == status
    assert isinstance(error, OutcomeUnknown) or status not in UNKNOWN_ALWAYS


@pytest.mark.parametrize("delay", ["9" * 400 + "s", "-1s", "NaN", "1e999s", 5, None, [], {}])
def test_any_retry_delay_of_google_is_read(delay: object) -> None:
    body = {"error": {"status": "RESOURCE_EXHAUSTED", "message": "No.", "details": [{"retryDelay": delay}]}}
    error = translated("google", 429, json.dumps(body).encode())
    assert isinstance(error, Retryable)
    assert (error.code, error.accepted) == ("rate_limited", False)


SAID = "a red fox for ann@example.org"
CLOSING: dict[str, list[dict[str, Any]]] = {
    "openai": [
        {"error": {"message": SAID, "type": SAID, "param": SAID, "code": code}}
        for code in ("insufficient_quota", "billing_hard_limit_reached", "rate_limit_exceeded", SAID)
    ],
    "google": [
        {"error": {"code": 429, "message": f"{SAID}. {credit}", "status": "RESOURCE_EXHAUSTED", "details": details}}
        for credit in ("", "Your prepayment credits are depleted.")
        for details in (
            [{"retryDelay": "7s", "reason": SAID}],
            [{"violations": [{"quotaId": f"PerDay {SAID}", "description": SAID}]}],
            [{"reason": "BILLING_DISABLED"}],
        )
    ],
    "stability": [{"id": SAID, "name": SAID, "errors": [SAID]}],
    "midjourney": [{"code": 23, "description": SAID}],
}


@pytest.mark.parametrize(
    ("provider", "body"), [(provider, body) for provider, bodies in CLOSING.items() for body in bodies]
)
def test_no_providers_words_close_it_for_others(provider: str, body: dict[str, Any]) -> None:
    """The reason of a block is shown to every user: it must not have words about the prompt of one."""
    document = json.dumps(body).encode()
    errors = [translated(provider, status, document, wait="7") for status in range(400, 600)]
    if provider == "midjourney":
        with pytest.raises(Retryable) as full:
            submitted_job_id(body)
        errors.append(full.value)
    closing = [error for error in errors if isinstance(error, Retryable) and error.blocks]
    assert closing
    assert not [error.message for error in closing if SAID in error.message]
