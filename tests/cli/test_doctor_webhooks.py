"""doctor's test delivery: through the stand-in's REST endpoint, and through misconfigured gateways."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.support.commands import ImageJobs
from tests.support.postgres import Cluster
from tests.support.servers import served
from tests.support.webhooks import KEYS, SECRET, gateway

OTHER = "another secret that is long enough"


@dataclass
class Doctor:
    """Runs doctor against a database and a URL."""

    image_jobs: ImageJobs
    database: str

    async def findings(self, url: str, **environment: str) -> list[dict[str, str]]:
        """Return the findings about webhooks. Secrets and keys must not be in the output."""
        asked = {"DATABASE_URL": self.database, "SUPABASE_URL": url, "SUPABASE_ANON_KEY": KEYS.anon_key, **environment}
        done = await self.image_jobs("doctor", "--json", **asked)
        found = [finding for finding in done.json if finding["name"] == "webhooks"]
        secrets = [KEYS.anon_key, *(value for name, value in environment.items() if "SECRET" in name)]
        assert not [secret for secret in secrets if secret in done.out + done.err]
        assert all(bool(finding["cure"]) == (finding["state"] == "problem") for finding in found)
        return found

    async def problem(self, url: str, **environment: str) -> tuple[str, str]:
        """Return the one problem of webhooks, and its cure."""
        (found,) = await self.findings(url, **{"WEBHOOK_SECRET_OPENAI": SECRET, **environment})
        assert found["state"] == "problem"
        return found["message"], found["cure"]


@pytest.fixture
async def doctor(tmp_path: Path, database: str, db: "asyncpg.Connection[asyncpg.Record]") -> AsyncIterator[Doctor]:
    """Set the secrets as a daemon would; at the end no delivery may be left."""
    await db.execute(
        "select image_jobs.set_webhook_secrets($1)", {"openai": [SECRET], "hmac": [OTHER], "midjourney": [OTHER]}
    )
    secrets = await db.fetch("select * from image_jobs.webhook_secrets order by provider")
    yield Doctor(ImageJobs(tmp_path), database)
    assert await db.fetchval("select count(*) from image_jobs.webhook_deliveries") == 0
    assert await db.fetch("select * from image_jobs.webhook_secrets order by provider") == secrets


@pytest.fixture
async def url(postgres: Cluster, database: str) -> AsyncIterator[str]:
    """Serve the stand-in."""
    async with gateway(postgres, database) as url:
        yield url


@asynccontextmanager
async def responding(
    respond: Callable[[Request], Awaitable[Response] | Response],
) -> AsyncIterator[tuple[str, list[Request]]]:
    """Serve something that is no Supabase project: its URL, and the requests it gets."""
    asked: list[Request] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        asked.append(request := Request(scope, receive))
        response = respond(request)
        await (response if isinstance(response, Response) else await response)(scope, receive, send)

    async with served(app) as url:
        yield url, asked


async def test_a_test_delivery_arrives_and_is_deleted(doctor: Doctor, url: str, db: Any) -> None:
    found = await doctor.findings(url, WEBHOOK_SECRET=f"{OTHER},{SECRET}", WEBHOOK_SECRET_OPENAI=f"{SECRET},{OTHER}")
    assert [finding["state"] for finding in found] == ["ok"] * 3
    for finding, name in zip(found, ("openai", "midjourney", "hmac"), strict=True):
        assert finding["message"].startswith(f"webhook_{name}: a test delivery arrived, in ")
        assert finding["message"].endswith(" ms.")
    assert await db.fetchval("select sum(accepted) from image_jobs.webhook_counters") == 3
    as_text = await doctor.image_jobs("doctor", DATABASE_URL=doctor.database, WEBHOOK_SECRET=SECRET)
    assert "problem  webhooks     webhook_openai was not tried: " in as_text.out


async def test_it_is_sent_to_the_address_of_providers_alone(doctor: Doctor) -> None:
    async with responding(lambda _: JSONResponse({})) as (url, asked):
        await doctor.problem(url)
    for request in asked:
        assert (request.method, request.url.path) == ("POST", "/rest/v1/rpc/webhook_openai")
        assert str(request.url.query) == f"apikey={KEYS.anon_key}"
        assert not {"apikey", "authorization", "cookie"} & set(request.headers)


async def test_without_a_secret_nothing_is_sent(doctor: Doctor) -> None:
    async with responding(lambda _: JSONResponse({})) as (url, asked):
        (found,) = await doctor.findings(url)
    assert (found["state"], found["cure"], asked) == ("info", "", [])
    assert found["message"] == "No secret is set, so none are accepted: what takes long is polled."


@pytest.mark.parametrize("secret", [OTHER, "whsec_" + "QUJD" * 8])
async def test_another_secret_in_the_database_is_reported(doctor: Doctor, url: str, secret: str) -> None:
    assert await doctor.problem(url, WEBHOOK_SECRET_OPENAI=secret) == (
        "webhook_openai refused the test delivery: the database does not have the secret of this environment.",
        "Start a daemon with this environment: it gives its secrets to the database.",
    )


async def test_a_truncated_secret_is_reported(doctor: Doctor, url: str) -> None:
    message, cure = await doctor.problem(url, WEBHOOK_SECRET_OPENAI="whsec_QUJDREVGR0hJSktMTU5")
    assert message == "The secret for webhook_openai is cut short: no base64 after whsec_."
    assert cure == "Copy it again, whole."


async def test_a_missing_anon_key_is_reported(doctor: Doctor, url: str) -> None:
    message, cure = await doctor.problem(url, SUPABASE_ANON_KEY="")
    assert message == "webhook_openai was not tried: SUPABASE_URL or SUPABASE_ANON_KEY is not set."
    assert "API settings" in cure


async def test_a_gateway_that_keeps_the_key_is_reported(doctor: Doctor, postgres: Cluster, database: str) -> None:
    """As self-hosted Kong does. The stand-in removes `apikey`, so the parameter has another name here."""

    def leaving(app: ASGIApp) -> ASGIApp:
        async def kong(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, "query_string": scope["query_string"].replace(b"apikey", b"api_key")}, receive, send)

        return kong

    async with gateway(postgres, database, leaving) as url:
        message, cure = await doctor.problem(url)
    assert message == "webhook_openai takes no key in its address: the gateway hands ?apikey= on to the API."
    assert "Edge Function of sql/README.md" in cure


async def test_a_refused_key_is_reported(doctor: Doctor) -> None:
    async with responding(lambda _: JSONResponse({"message": "Invalid API key"}, 401)) as (url, _):
        message, cure = await doctor.problem(url)
    assert message == "The gateway before webhook_openai refused the key in its address."
    assert "SUPABASE_ANON_KEY" in cure


async def test_a_missing_function_is_reported(doctor: Doctor, url: str, db: Any) -> None:
    await db.execute("drop function webhook_openai(json)")
    message, cure = await doctor.problem(url)
    assert message == "The API does not know webhook_openai."
    assert "notify pgrst, 'reload schema'" in cure


async def test_a_missing_grant_is_reported(doctor: Doctor, url: str, db: Any) -> None:
    await db.execute("revoke execute on function webhook_openai(json) from anon")
    message, cure = await doctor.problem(url)
    assert message == "The API may not call webhook_openai."
    assert "grant execute" in cure


async def test_another_project_is_reported(doctor: Doctor, postgres: Cluster) -> None:
    async with postgres.database() as other_dsn, gateway(postgres, other_dsn) as url:
        other = await asyncpg.connect(other_dsn)
        await other.execute(f"""select image_jobs.set_webhook_secrets('{{"openai": ["{SECRET}"]}}')""")
        await other.close()
        message, cure = await doctor.problem(url)
    assert message == "webhook_openai answered, but nothing arrived in this database."
    assert cure == "SUPABASE_URL and DATABASE_URL have to be of the same project."


async def test_a_redirect_is_reported_and_not_followed(doctor: Doctor) -> None:
    async with (
        responding(lambda _: JSONResponse({"received": True})) as (other_url, asked),
        responding(lambda it: RedirectResponse(f"{other_url}/x?{it.url.query}", 307)) as (url, _),
    ):
        message, cure = await doctor.problem(url)
    assert asked == []
    assert message == "webhook_openai is elsewhere (307 to 127.0.0.1), and providers follow no redirect."
    assert cure.startswith("Set SUPABASE_URL to the address that answers itself")


@pytest.mark.parametrize("status", [404, 500, 502])
async def test_another_server_at_the_address_is_reported(doctor: Doctor, status: int) -> None:
    async with responding(lambda _: PlainTextResponse("<html>" * 1000, status)) as (url, _):
        message, cure = await doctor.problem(url)
    assert message == f"webhook_openai answered with {status}."
    assert "SUPABASE_URL" in cure


async def test_an_unreachable_address_is_reported(doctor: Doctor) -> None:
    message, cure = await doctor.problem("http://127.0.0.1:1")
    assert message.startswith("webhook_openai did not answer at http://127.0.0.1:1 (")
    assert "SUPABASE_URL" in cure
