"""A body is what was signed, so it reaches the verifier, and the inbox, byte for byte."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import OpenAI
from standardwebhooks import Webhook

from tests.support.postgres import Cluster
from tests.support.protocol import Db
from tests.support.webhooks import SECRET, Post, by_http, by_sql, gateway, hex_hmac, signed

BODIES = [
    ' {"data" :\t{"id":"order-1"} }  ',
    '{\r\n"data": {"id": "order-1"}\r\n}\r\n',
    '\n\n{"b":1.0,"a":2,"a":3,"a":{"a":4,"a":5}}',
    '{"n":123456789012345678901234567890,"e":2e+05,"E":-0.0E-0,"f":1.000000000000000000000000000000000001}',
    '{"n":' + "9" * 900 + "}",
    '{"text":"\\u00e9 \\ud83e\\udd8a \\/ \\u0000 \\b\\f\\n\\r\\t\\"\\\\","raw":"é 🦊 \x7f \u2028"}',
    '{"":null,"null":"","[]":[],"\\u0000":{}}',
]

TOO_MUCH_FOR_JSONB = ['{"n":1e999999}', '{"text":"\\ud800"}', '{"n":' + "[" * 3000 + "]" * 3000 + "}"]


@pytest.fixture
async def secrets(db: Db) -> None:
    await db.execute(
        "select image_jobs.set_webhook_secrets($1)", {"openai": [SECRET], "hmac": [SECRET], "midjourney": [SECRET]}
    )


@pytest.fixture(params=["sql", "http"])
async def post(request: pytest.FixtureRequest, postgres: Cluster, database: str, db: Db) -> AsyncIterator[Post]:
    """Yield a function that posts, as PostgREST calls SQL and through a gateway."""
    if request.param == "sql":
        yield by_sql(db)
    else:
        async with gateway(postgres, database) as url, httpx.AsyncClient(timeout=20) as http:
            yield by_http(http, url)


async def bodies_kept(db: Db) -> list[str | None]:
    return [row["body"] for row in await db.fetch("select body from image_jobs.webhook_deliveries")]


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("body", BODIES)
async def test_package_sdk_and_database_agree_about_a_body(db: Db, post: Post, body: str) -> None:
    headers = signed(body)
    Webhook(SECRET).verify(body, headers)
    OpenAI(api_key="none").webhooks.verify_signature(body, headers, secret=SECRET)
    assert await post("openai", body, headers) == (200, {"received": True, "duplicate": False})
    assert await bodies_kept(db) == [body]


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("body", BODIES)
async def test_the_hex_scheme_signs_the_same_bytes(db: Db, post: Post, body: str) -> None:
    assert (await post("hmac", body, {"webhook-signature": hex_hmac(body)}))[0] == 200
    assert await bodies_kept(db) == [body]


@pytest.mark.usefixtures("secrets")
async def test_midjourney_state_is_found_among_odd_bytes(db: Db, post: Post) -> None:
    state = f"run_1.{hex_hmac('run_1')}"
    body = f'{{"n":1.0,\r\n "state" : "{state}" ,"prompt":"\\u00e9 é"}}\n'
    assert (await post("midjourney", body, {}))[0] == 200
    assert await bodies_kept(db) == [body]


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("body", TOO_MUCH_FOR_JSONB)
async def test_a_signed_body_that_jsonb_cannot_hold_is_received(db: Db, body: str) -> None:
    assert (await by_sql(db)("openai", body, signed(body)))[0] == 200
    assert await bodies_kept(db) == [body]


NAMED = """{"state":"%s","job_id":"run","type":"done",%s,"data":{"id":"order-1","job_id":"x"}}"""


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize(
    "odd",
    [
        '"t":"\\u0000"', '"t":"\\ud800"', '"t":"\\uDFFF\\ud83e\\udd8a\\u0000"', '"t":"\\\\\\u0000"', '"\\u0000\\u0000":0',
        '"n":1e999999', '"t":"\\\\u0000\\ud83e"',
    ],
)  # fmt: skip
@pytest.mark.parametrize("provider", ["hmac", "openai", "midjourney"])
async def test_any_signed_body_names_its_job(db: Db, provider: str, odd: str) -> None:
    body = NAMED % (f"run.{hex_hmac('run')}", odd)
    headers = {"webhook-signature": hex_hmac(body)} if provider == "hmac" else signed(body)
    assert (await by_sql(db)(provider, body, headers))[0] == 200
    kept = await db.fetchrow("select provider_job_id, type, body from image_jobs.webhook_deliveries")
    assert kept is not None
    assert tuple(kept) == ("order-1", "done", body)


@pytest.mark.usefixtures("secrets")
async def test_a_mebibyte_is_received_and_a_byte_more_is_not(db: Db, post: Post) -> None:
    full = json.dumps({"text": ("word " * 209_715)[: 1_048_576 - len('{"text": ""}')]})
    assert len(full) == 1_048_576
    assert (await post("openai", full, signed(full)))[0] == 200
    assert await bodies_kept(db) == [full]
    status, said = await post("openai", full + " ", signed(full + " ", message="msg_2"))
    assert (status, said["code"]) == (413, "PT413")
    assert await bodies_kept(db) == [full]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.one_postgres
@pytest.mark.usefixtures("secrets")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.dictionaries(st.text(max_size=10), values, max_size=5),
    as_ascii=st.booleans(),
    indent=st.sampled_from([None, 1, "\t"]),
    between=st.text(" \t\r\n", max_size=3),
)
async def test_any_body_in_any_writing_keeps_its_bytes(
    db: Db, value: dict[str, Any], as_ascii: bool, indent: int | str | None, between: str
) -> None:
    body = json.dumps(value, ensure_ascii=as_ascii, indent=indent, separators=(between + ",", ":" + between)) + between
    headers = signed(body)
    OpenAI(api_key="none").webhooks.verify_signature(body, headers, secret=SECRET)
    await db.execute("delete from image_jobs.webhook_deliveries")
    assert (await by_sql(db)("openai", body, headers))[0] == 200
    assert await bodies_kept(db) == [body]
