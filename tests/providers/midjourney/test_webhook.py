"""A job of a midjourney-proxy is signed and names the address of its webhooks."""

import hashlib
import hmac
import json

import pytest

from daemon.errors import Refused
from tests.support.midjourney_provider_harness import HOOKED, OURS, SECRET, STATE, THEIRS, Harness


def signed(name: str, secret: str = SECRET) -> str:
    return f"{name}.{hmac.new(secret.encode(), name.encode(), hashlib.sha256).hexdigest()}"


async def test_secret_signs_the_job_and_names_our_receiver(harness: Harness) -> None:
    await harness.set_up(**HOOKED)
    assert (await harness.submit()).webhook

    (call,) = harness.api.jobs
    assert (call.fields["state"], call.fields["notifyHook"]) == (signed(STATE), f"{OURS}an%20anon%20key%2B")
    (written,) = harness.recorder.requests
    assert written == {
        "endpoint": "mj/submit/imagine",
        **call.fields,
        "state": f"{STATE}.***",
        "notifyHook": f"{OURS}***",
    }


@pytest.mark.parametrize("missing", HOOKED)
async def test_without_secret_or_address_there_is_no_hook(missing: str, harness: Harness) -> None:
    await harness.set_up(**{name: value for name, value in HOOKED.items() if name != missing})
    assert not (await harness.submit()).webhook

    (call,) = harness.api.jobs
    assert call.fields["state"] == STATE
    assert "notifyHook" not in call.fields


@pytest.mark.parametrize("settings", [{}, HOOKED])
async def test_a_run_may_name_another_hook_which_gets_no_token_of_ours(
    settings: dict[str, str], harness: Harness
) -> None:
    await harness.set_up(**settings)
    assert not (await harness.submit(hook=THEIRS)).webhook

    (call,) = harness.api.jobs
    assert (call.fields["state"], call.fields["notifyHook"]) == (STATE, THEIRS)
    assert harness.recorder.requests == [{"endpoint": "mj/submit/imagine", **call.fields}]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.com/hook", "its URL is not https."),
        ("ftp://example.com/hook", "its URL is not https."),
        ("example.com", "its URL is not https."),
        ("https://user:pass@example.com/", "its URL has a user name or password in it."),
        ("https://127.0.0.1/hook", "127.0.0.1 is not a public address."),
        ("https://169.254.169.254/latest", "169.254.169.254 is not a public address."),
        ("https://[fd00:ec2::254]/", "fd00:ec2::254 is not a public address."),
        ("https://2130706433/", "its URL has no valid host name."),
        ("https://localhost/", "localhost is not a public address."),
        ("https://93.184.215.14:22/", "port 22 of 93.184.215.14 is not open to it."),
        ("https://[::1", "its URL is malformed."),
    ],
)
async def test_private_webhook_url_is_refused_before_submission(url: str, reason: str, harness: Harness) -> None:
    error = await harness.fail(hook=url)

    assert (type(error), error.code) == (Refused, "invalid_request")
    assert error.message == f"metadata.webhookUrl cannot be used: {reason}"
    assert "https" in error.hint
    assert harness.api.requests == []
    assert harness.recorder.requests == []


async def test_not_even_the_proxys_own_address_is_open_to_a_runs_hook(harness: Harness) -> None:
    assert isinstance(await harness.fail(hook=f"{harness.api.url}/mj/submit/imagine"), Refused)
    assert harness.api.requests == []


@pytest.mark.parametrize(
    ("state", "heard"),
    [(signed(STATE), True), (signed(STATE, "the secret before that one"), False), (STATE, False)],
)
async def test_a_job_is_found_again_whatever_key_signed_it(state: str, *, heard: bool, harness: Harness) -> None:
    await harness.set_up(**HOOKED)
    harness.api.known("999", status="IN_PROGRESS", state=state)
    harness.api.known("998", status="IN_PROGRESS", state=signed("run_1:70"))
    found = await harness.submit(attempt=2)

    assert (found.job_id, found.webhook) == ("999", heard)
    assert harness.api.jobs == []


async def test_a_webhook_is_posted_as_the_proxys_own_task(harness: Harness) -> None:
    await harness.set_up(**{**HOOKED, "SUPABASE_URL": harness.api.url})
    job_id = await harness.submit_id()
    await harness.api.happen(job_id, status="IN_PROGRESS", progress="46%")

    posted = harness.api.requests[-1]
    assert posted.path == "/rest/v1/rpc/webhook_midjourney"
    assert (posted.fields["id"], posted.fields["state"]) == (job_id, signed(STATE))
    assert SECRET not in json.dumps(posted.fields)
