"""Check of the webhooks: post a signed test delivery to the address that providers are given."""

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import time
from dataclasses import dataclass, field
from uuid import uuid4

import httpx

from daemon.cli.doctor.finding import Finding
from daemon.database import Connection
from daemon.http_clients import client as http_client
from daemon.settings import Settings

RESPONSE_TIMEOUT = 10.0
"""Seconds for a response."""

_DOOR = "Put the Edge Function of sql/README.md (Webhooks) in front, and give providers its address."


@dataclass(frozen=True, slots=True)
class Delivery:
    """A request to `webhook_<name>`. `id` is its delivery id in the inbox. The secret is in none of it."""

    id: str
    body: bytes = field(repr=False)
    headers: dict[str, str] = field(repr=False)


def sign(name: str, secret: str) -> Delivery:
    """Sign a delivery that names no provider job, as `image_jobs.verified_delivery` expects it.

    Args:
        name: openai, hmac, midjourney.
        secret: The text from the environment.

    Raises:
        ValueError: If the secret is `whsec_` and no base64.
    """
    delivery_id = f"doctor_{uuid4().hex}"
    content = {"id": delivery_id, "type": "image-jobs.test"}
    match name:
        case "hmac":
            body = json.dumps(content).encode()
            return Delivery(hashlib.sha256(body).hexdigest(), body, {"webhook-signature": _hex(secret, body)})
        case "midjourney":
            body = json.dumps({**content, "state": f"{delivery_id}.{_hex(secret, delivery_id.encode())}"}).encode()
            return Delivery(hashlib.sha256(body).hexdigest(), body, {})
        case _:
            body = json.dumps(content).encode()
            at = str(int(time.time()))
            digest = hmac.digest(_key(secret), f"{delivery_id}.{at}.".encode() + body, "sha256")
            signature = f"v1,{base64.b64encode(digest).decode()}"
            headers = {"webhook-id": delivery_id, "webhook-timestamp": at, "webhook-signature": signature}
            return Delivery(delivery_id, body, headers)


async def check_webhooks(settings: Settings, connection: Connection) -> list[Finding]:
    """Try each webhook that has a secret in these settings."""
    if not settings.webhook_secrets:
        return [Finding("webhooks", "info", "No secret is set, so none are accepted: what takes long is polled.")]
    return [await try_webhook(settings, connection, name) for name in settings.webhook_secrets]


async def try_webhook(settings: Settings, connection: Connection, name: str) -> Finding:
    """Post a test delivery to `webhook_<name>`, look for it in `image_jobs.webhook_deliveries`, and delete it.

    It goes by the public address alone, as a provider's does.

    Args:
        settings: With a secret for `name`. Secrets are written to the database by daemons, not here.
        connection: To the database in which it should arrive.
        name: openai, hmac, midjourney.
    """
    webhook = f"webhook_{name}"
    if settings.supabase_url is None or settings.anon_key is None:
        return _problem(
            f"{webhook} was not tried: SUPABASE_URL or SUPABASE_ANON_KEY is not set.",
            "Both are in the project's API settings; the anon or publishable key is part of the address for providers.",
        )
    try:
        delivery = sign(name, settings.webhook_secrets[name][0].get_secret_value())
    except binascii.Error:
        return _problem(f"The secret for {webhook} is cut short: no base64 after whsec_.", "Copy it again, whole.")
    base = settings.supabase_url.rstrip("/")
    started = time.monotonic()
    try:
        async with (
            asyncio.timeout(RESPONSE_TIMEOUT),
            http_client(timeout=RESPONSE_TIMEOUT) as client,
        ):  # it follows no redirect
            response = await client.post(
                f"{base}/rest/v1/rpc/{webhook}",
                params={"apikey": settings.anon_key.get_secret_value().strip()},
                content=delivery.body,
                headers={"content-type": "application/json", **delivery.headers},
            )
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        return _problem(
            f"{webhook} did not answer at {base} ({type(error).__name__}).",
            "Look whether the project runs, and whether SUPABASE_URL is its address.",
        )
    finally:
        milliseconds = 1000 * (time.monotonic() - started)
        arrived = await connection.fetchval("select image_jobs.delete_delivery($1, $2)", name, delivery.id)
    if arrived and response.is_success:
        return Finding("webhooks", "ok", f"{webhook}: a test delivery arrived, in {milliseconds:.0f} ms.")
    return _explain(webhook, response)


def _explain(webhook: str, response: httpx.Response) -> Finding:
    """Tell from the response why the delivery did not arrive."""
    match response.status_code, _code(response):
        case 401, "PT401":
            message = f"{webhook} refused the test delivery: the database does not have the secret of this environment."
            cure = "Start a daemon with this environment: it gives its secrets to the database."
        case 400, "PGRST100":
            message = f"{webhook} takes no key in its address: the gateway hands ?apikey= on to the API."
            cure = _DOOR
        case 404, "PGRST202":
            message = f"The API does not know {webhook}."
            cure = "See that the schema public is exposed in the API settings, then run: notify pgrst, 'reload schema'."
        case ((401 | 403), "42501"):
            message = f"The API may not call {webhook}."
            cure = "Put its rights back: grant execute on it, and usage on the schema image_jobs, to anon."
        case ((401 | 403), _):
            message = f"The gateway before {webhook} refused the key in its address."
            cure = f"See that SUPABASE_ANON_KEY is this project's. If it is, the gateway takes none there. {_DOOR}"
        case status, _ if response.is_redirect:
            message = f"{webhook} is elsewhere ({status} to {_host(response)}), and providers follow no redirect."
            cure = "Set SUPABASE_URL to the address that answers itself, and give that one to providers."
        case 200, _:
            message = f"{webhook} answered, but nothing arrived in this database."
            cure = "SUPABASE_URL and DATABASE_URL have to be of the same project."
        case status, _:
            message = f"{webhook} answered with {status}."
            cure = "See that SUPABASE_URL is the project's address, and look at the project's log."
    return _problem(message, cure)


def _code(response: httpx.Response) -> str | None:
    """PostgREST's code for an error; None if the response is not PostgREST's."""
    try:
        return response.json()["code"]
    except (ValueError, KeyError, TypeError):
        return None


def _host(response: httpx.Response) -> str:
    """The host that a redirect leads to. Its path and query are left out: they may repeat the key."""
    return response.next_request.url.host if response.next_request else "nowhere"


def _key(secret: str) -> bytes:
    text = secret.removeprefix("whsec_")
    return secret.encode() if text == secret else base64.b64decode(text, validate=True)


def _hex(secret: str, message: bytes) -> str:
    return hmac.digest(secret.encode(), message, "sha256").hex()


def _problem(message: str, cure: str) -> Finding:
    return Finding("webhooks", "problem", message, cure)
