"""The cost of webhook calls that nobody has authenticated: O(bytes), and one counter for all unknown names."""

import time
from typing import Any

import pytest

from tests.support.protocol import Db
from tests.support.runs import insert_run
from tests.support.webhooks import SECRET, by_sql, signed

pytestmark = pytest.mark.one_postgres

BODY = '{"type": "response.completed", "data": {"id": "order-1"}}'


@pytest.fixture(autouse=True)
async def secrets(db: Db) -> None:
    await db.execute(
        "select image_jobs.set_webhook_secrets($1)", {name: [SECRET] for name in ("openai", "hmac", "midjourney")}
    )


async def refused_in(db: Db, body: str, signature: str, provider: str = "openai") -> float:
    """Return the least seconds of several calls that are refused."""
    headers, best = signed(body) | {"webhook-signature": signature}, float("inf")
    for _ in range(5):
        began = time.perf_counter()
        status, _ = await by_sql(db)(provider, body, headers)
        best = min(best, time.perf_counter() - began)
        assert status == 401
    return best


def body_of(size: int) -> str:
    return '{"x": "' + "y" * (size - 9) + '"}'


@pytest.mark.parametrize("provider", ["openai", "hmac"])
async def test_the_cost_of_a_forged_call_grows_with_its_bytes(db: Db, provider: str) -> None:
    quarter = await refused_in(db, body_of(2**18), "v1,AAAA", provider)
    assert await refused_in(db, body_of(2**20), "v1,AAAA", provider) < 9 * quarter + 0.01


@pytest.mark.parametrize("provider", ["openai", "hmac", "midjourney"])
@pytest.mark.parametrize("escape", [r"\u0000", r"\ud800"])
async def test_a_forged_call_is_not_mended_for_jsonb(db: Db, provider: str, escape: str) -> None:
    plain = await refused_in(db, body_of(2**19), "v1,AAAA", provider)
    assert await refused_in(db, '{"x": "' + escape * (2**19 // 6) + '"}', "v1,AAAA", provider) < 5 * plain + 0.02


@pytest.mark.parametrize("signatures", [10, 11, 999])
async def test_more_signatures_cost_no_more(db: Db, signatures: int) -> None:
    body = body_of(2**20)
    one = await refused_in(db, body, "v1,A")
    assert await refused_in(db, body, " ".join(["v"] * signatures)) < 2 * one + 0.01


async def test_ten_signatures_are_looked_at_and_no_more(db: Db) -> None:
    headers = signed(BODY)
    right = headers["webhook-signature"]
    eleven = headers | {"webhook-signature": " ".join(["v1,AAAA"] * 10 + [right])}
    assert (await by_sql(db)("openai", BODY, eleven))[0] == 401
    ten = headers | {"webhook-signature": " ".join(["v1,AAAA"] * 9 + [right])}
    assert (await by_sql(db)("openai", BODY, ten))[0] == 200


async def receive(db: Db, provider: str | None, body: str = BODY) -> Any:
    return await db.fetchval("select receive_webhook($1, '{}', $2)", provider, body)


async def test_unknown_providers_are_counted_as_one(db: Db) -> None:
    for number in range(50):
        assert (await receive(db, f"name-{number}"))["code"] == "PT401"
    assert (await receive(db, "openai-" * 100, "x" * 2_000_000))["code"] == "PT413"
    assert (await receive(db, None))["code"] == "PT401"
    await db.execute("insert into image_jobs.models (provider, model) values ('stability', 'core')")
    for known in ("openai", "midjourney", "stability"):
        await receive(db, known)
    rows = await db.fetch(
        "select provider, sum(refused)::int as n from image_jobs.webhook_counters group by 1 order by 1"
    )
    assert {row["provider"]: row["n"] for row in rows} == {"midjourney": 1, "openai": 1, "stability": 1, "unknown": 52}


async def test_an_unknown_provider_matches_no_run(db: Db) -> None:
    run = await insert_run(db)
    assert (await receive(db, "unknown", f'{{"job_id": "{run}"}}'))["code"] == "PT401"
    assert not await db.fetchval("select exists (select from image_jobs.webhook_deliveries)")
