"""Webhooks signed as providers do, posted in two ways: by SQL as PostgREST calls it, and over HTTP."""

import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import asyncpg
import httpx
from standardwebhooks import Webhook
from starlette.types import ASGIApp

from daemon.dev.supabase.gateway import one_port
from daemon.dev.supabase.keys import Keys
from daemon.dev.supabase.rest import rest_app
from tests.support.postgres import Cluster, signed_in
from tests.support.servers import served

SECRET = "whsec_" + base64.b64encode(b"a key of the tests, 32 bytes long").decode()
KEYS = Keys(
    "a secret of the tests that is long enough", anon_key="sb_publishable_test", service_role_key="sb_secret_test"
)

Response = tuple[int, Any]
"""The status, and the body as JSON."""

Post = Callable[[str, str, Mapping[str, str]], Awaitable[Response]]
"""Post a body with headers to a provider's webhook."""


def signed(body: str, *, at: datetime | None = None, message: str = "msg_1", secret: str = SECRET) -> dict[str, str]:
    """The headers of Standard Webhooks for a body."""
    at = at or datetime.now(UTC)
    signature = Webhook(secret).sign(message, at, body)
    return {"webhook-id": message, "webhook-timestamp": str(int(at.timestamp())), "webhook-signature": signature}


def hex_hmac(text: str, secret: str = SECRET) -> str:
    """HMAC-SHA256 in hex, of the scheme `hmac`: the secret's text is the key."""
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


def by_sql(db: "asyncpg.Connection[asyncpg.Record]") -> Post:
    """Post as PostgREST does: a transaction as anon, headers in a setting, the raw body as the one unnamed json."""

    async def post(provider: str, body: str, headers: Mapping[str, str]) -> Response:
        async with signed_in(db, role="anon"):
            await db.execute("select set_config('request.headers', $1, true)", json.dumps(dict(headers)))
            response = await db.fetchval(f"select webhook_{provider}($1::text::json)", body)
            status = await db.fetchval("select current_setting('response.status', true)")
        return int(status or 200), response

    return post


@asynccontextmanager
async def gateway(
    postgres: Cluster, dsn: str, behind: Callable[[ASGIApp], ASGIApp] = lambda app: app
) -> AsyncIterator[str]:
    """Serve the stand-in's REST endpoint for the database at `dsn`, behind `behind`. Yields its URL."""
    authenticator = postgres.server.dsn(dsn.rpartition("/")[2], user="authenticator")
    async with (
        asyncpg.create_pool(authenticator, min_size=1, max_size=4) as pool,
        served(behind(one_port({"/rest/v1": rest_app(pool, KEYS)}))) as url,
    ):
        yield url


def by_http(http: httpx.AsyncClient, url: str) -> Post:
    """Post as a provider does, which knows a URL and nothing else."""

    async def post(provider: str, body: str, headers: Mapping[str, str]) -> Response:
        response = await http.post(
            f"{url}/rest/v1/rpc/webhook_{provider}?apikey={KEYS.anon_key}",
            content=body.encode(),
            headers={"content-type": "application/json", **headers},
        )
        return response.status_code, response.json()

    return post
