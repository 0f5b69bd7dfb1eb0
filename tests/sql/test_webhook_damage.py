"""10,000 damaged deliveries: none is accepted, and only their number is kept."""

import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import asyncpg
import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from daemon.dev.supabase.rest import bodies
from daemon.dev.supabase.rest.errors import RestError
from tests.support.postgres import Cluster, signed_in
from tests.support.protocol import Db, events, move_clock, new_daemon, run_in
from tests.support.runs import run_row
from tests.support.webhooks import KEYS, by_sql, gateway, hex_hmac, signed

NOW = datetime.now(UTC)
"""When the deliveries below are sent; for the database it is then, too."""

REFUSALS = [("401", "PT401"), ("413", "PT413")]
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.data_too_large, HealthCheck.too_slow]

BATCH = 50
"""Deliveries in one round trip; 200 of them make 10,000."""

SECRETS = {
    name: "whsec_" + base64.b64encode(f"the key of {name}, and long".encode()).decode()
    for name in ("openai", "hmac", "midjourney")
}
BODY = '{"type": "response.completed", "data": {"id": "order-1"}}'
STATE = f"job_1.{hex_hmac('job_1', SECRETS['midjourney'])}"
TOO_LARGE = json.dumps({"text": "word " * 209_716})
DEEP = '{"data":' * 10_000 + "null" + "}" * 10_000


@dataclass(frozen=True, repr=False)
class Delivery:
    """A delivery as a provider posts it, until it is damaged."""

    provider: str
    content: bytes
    headers: dict[str, str] = field(default_factory=dict[str, str])

    def __repr__(self) -> str:
        return f"<{self.provider} {self.content[:200]!r} {self.headers}>"

    def header(self, name: str, value: str | None) -> "Delivery":
        """Return the delivery with another value of a header, or without it."""
        headers = {key: text for key, text in self.headers.items() if key != name}
        return replace(self, headers=headers if value is None else headers | {name: value})


def of_openai(body: str = BODY, secret: str = SECRETS["openai"], late: float = 0) -> Delivery:
    """Make one of Standard Webhooks, as if it had been on its way for so many seconds."""
    return Delivery("openai", body.encode(), signed(body, at=NOW - timedelta(seconds=late), secret=secret))


def of_hmac(body: str = BODY, secret: str = SECRETS["hmac"]) -> Delivery:
    """Make one of the specification's scheme."""
    return Delivery("hmac", body.encode(), {"webhook-signature": hex_hmac(body, secret)})


def of_midjourney(state: object = STATE, **more: str) -> Delivery:
    """Make one as a midjourney-proxy echoes it."""
    return Delivery("midjourney", json.dumps({"id": "order-1", "state": state, "status": "SUCCESS", **more}).encode())


def changed(text: str, same: Callable[[str], str] = str) -> st.SearchStrategy[str]:
    """Change, drop or add a character; or cut, double or change the case of the text. `same`: what makes equal texts alike."""
    places = st.integers(0, len(text) - 1)
    characters = st.characters(min_codepoint=33, exclude_categories=["Cs", "Cc"])
    return st.one_of(
        st.builds(lambda n, c: text[:n] + c + text[n + 1 :], places, characters),
        st.builds(lambda n, c: text[:n] + c + text[n:], places, characters),
        places.map(lambda n: text[:n] + text[n + 1 :]),
        places.map(lambda n: text[:n]),
        st.sampled_from([text + text, text.swapcase(), text[::-1]]),
    ).filter(lambda it: same(it) != same(text))


def changed_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """Change, drop or add a byte, or cut the end; or replace the body."""
    places = st.integers(0, len(content) - 1)
    a_byte = st.binary(min_size=1, max_size=1)
    return st.one_of(
        st.builds(lambda n, b: content[:n] + b + content[n + 1 :], places, a_byte),
        st.builds(lambda n, b: content[:n] + b + content[n:], places, a_byte),
        places.map(lambda n: content[:n] + content[n + 1 :]),
        places.map(lambda n: content[:n]),
        st.sampled_from([b"", b"[]", b"7", b"null", b"{}", b"[{}]", b"\xff", b"\xef\xbb\xbf" + content, content * 2]),
        st.sampled_from([content.replace(b" ", b""), content.replace(b" ", b"  "), content + b"\r\n"]),
    ).filter(lambda it: it != content)


def unkeyed(delivery: Delivery) -> Delivery:
    """Sign with the empty key, as if a secret had been forgotten."""
    said = f"{delivery.headers['webhook-id']}.{delivery.headers['webhook-timestamp']}.".encode() + delivery.content
    signature = base64.b64encode(hmac.new(b"", said, hashlib.sha256).digest()).decode()
    return delivery.header("webhook-signature", f"v1,{signature}")


def other_schemes(delivery: Delivery) -> list[Delivery]:
    """Write the right signature as another scheme does."""
    name, signature = "webhook-signature", delivery.headers["webhook-signature"]
    digest = signature.removeprefix("v1,")
    written = [f"{prefix}{digest}" for prefix in ("v1a,", "v2,", "V1,", "v1=", "v1,,", "sha256=", "whsec_", "v1, ")]
    bare = [digest] if digest != signature else [f"v1,{digest}"]
    return [delivery.header(name, it) for it in (*written, *bare)]


good_openai, good_hmac = of_openai(), of_hmac()

of_any_scheme = st.one_of(
    (changed_bytes(good.content).map(lambda content, good=good: replace(good, content=content)))
    | st.sampled_from(other_schemes(good))
    | st.sampled_from([good.header(name, value) for name in good.headers for value in (None, "", "null", "ä")])
    | st.one_of(
        # Digits of a hex signature may be capitals.
        changed(text, str.lower if good is good_hmac else str).map(
            lambda value, good=good, name=name: good.header(name, value)
        )
        for name, text in good.headers.items()
    )
    for good in (good_openai, good_hmac)
)
of_one_scheme = st.one_of(
    # Signed well, and at the wrong time, also for whom this test takes minutes.
    (st.integers(302, 10**9) | st.integers(-(10**10), -660)).map(lambda late: of_openai(late=late)),
    st.sampled_from(["webhook-id", "webhook-timestamp"]).map(
        lambda name: good_openai.header(name, f"{good_openai.headers[name]}, {good_openai.headers[name]}")
    ),
    # Signed well, with a key that is none of the provider's.
    st.sampled_from(
        [
            of_openai(secret=SECRETS["hmac"]),
            of_hmac(secret=SECRETS["openai"]),
            of_hmac(secret=""),
            unkeyed(good_openai),
            replace(good_openai, provider="hmac"),
            replace(good_hmac, provider="openai"),
            replace(good_openai, provider="midjourney"),
        ]
    ),
    changed(STATE, str.lower).map(of_midjourney),
    st.sampled_from(
        [
            *(None, 7, [STATE], {"state": STATE}, "", ".", "job_1", f"{STATE}.{STATE}", f" {STATE}", f"{STATE} "),
            *(f"job_1.{hex_hmac('job_1', secret)}" for secret in ("", SECRETS["hmac"])),
        ]
    ).map(of_midjourney),
)
heavy = st.sampled_from(
    [
        of_openai(TOO_LARGE),
        of_hmac(TOO_LARGE),
        of_midjourney(text="word " * 209_716),
        *(it.header("webhook-signature", "v1,AAAA") for it in (of_openai(DEEP), of_hmac(DEEP))),
    ]
)
damaged = st.integers(0, 99).flatmap(lambda n: heavy if n == 42 else of_any_scheme | of_one_scheme)


@pytest.fixture
async def parked_run(postgres: Cluster, database: str, db: Db) -> str:
    """Park a run whose provider job all these deliveries are about."""
    since = f"{(NOW - datetime.now(UTC)).total_seconds()} s"
    await move_clock(db, since)
    await postgres.sudo(f"alter database {database.rpartition('/')[2]} set image_jobs.clock_offset = '{since}'")
    await db.execute("select image_jobs.set_webhook_secrets($1)", {name: [secret] for name, secret in SECRETS.items()})
    return await run_in(db, await new_daemon(db, "openai"), "parked", processor="openai:gpt-image-2")


def handed_over(content: bytes) -> str | None:
    """Return the text that PostgREST hands to the function; None if it refuses the body itself."""
    if content == DEEP.encode():
        return DEEP  # Python's parser is not made for this, PostgREST's is
    try:
        return bodies.read(content).text
    except RestError:
        return None


async def post_all(db: Db, deliveries: Sequence[Delivery]) -> list[tuple[Delivery, str, object]]:
    """Post as anon those that PostgREST hands over; return the status and the code of each response."""
    handed = [(it, text) for it in deliveries if (text := handed_over(it.content)) is not None]
    async with signed_in(db, role="anon"):
        rows = await db.fetch(
            """select set_config('response.status', '', true), set_config('request.headers', d.headers, true),
              case d.provider when 'openai' then webhook_openai(d.body::json) when 'hmac' then webhook_hmac(d.body::json)
                else webhook_midjourney(d.body::json) end as said,
              current_setting('response.status') as status
            from unnest($1::text[], $2::text[], $3::text[]) as d (provider, headers, body)""",
            [it.provider for it, _ in handed],
            [json.dumps(it.headers) for it, _ in handed],
            [text for _, text in handed],
        )
    return [
        (it, row["status"], row["said"].get("code", row["said"])) for (it, _), row in zip(handed, rows, strict=True)
    ]


async def kept(db: Db) -> tuple[int, int, int]:
    """Count the deliveries that are kept, the calls that were accepted, and those that were refused."""
    row = await db.fetchrow(
        """select (select count(*) from image_jobs.webhook_deliveries), coalesce(sum(accepted + duplicates), 0)::integer,
          coalesce(sum(refused), 0)::integer from image_jobs.webhook_counters"""
    )
    assert row is not None
    return row[0], row[1], row[2]


async def test_undamaged_they_are_accepted(db: Db, parked_run: str) -> None:
    responses = await post_all(db, [of_openai(), of_hmac(), of_midjourney(), of_openai()])
    assert [response[1:] for response in responses] == [("", {"received": True, "duplicate": n == 3}) for n in range(4)]


@pytest.mark.one_postgres
@pytest.mark.timeout(300)
@settings(max_examples=10_000 // BATCH, phases=[Phase.generate], deadline=None, suppress_health_check=QUIET)
@given(deliveries=st.lists(damaged, min_size=BATCH, max_size=BATCH))
async def test_none_of_10_000_damaged_deliveries_is_accepted(
    db: Db, parked_run: str, deliveries: list[Delivery]
) -> None:
    run, trail, (_, _, refused) = await run_row(db, parked_run), await events(db, parked_run), await kept(db)
    responses = await post_all(db, deliveries)
    assert [response for response in responses if response[1:] not in REFUSALS] == []
    assert await kept(db) == (0, 0, refused + len(responses))
    assert await run_row(db, parked_run) == run
    assert await events(db, parked_run) == trail
    # A few rows for each minute and provider, however many calls.
    assert await db.fetchval("select count(*) from image_jobs.webhook_counters") <= 3 * 10 * 9


@pytest.mark.parametrize("depth", [10_000, 500_000])
async def test_too_deep_a_body_is_kept_or_refused_without_a_500(db: Db, parked_run: str, depth: int) -> None:
    body = '{"data":' + "[" * depth + "]" * depth + "}"
    try:
        response = await by_sql(db)("hmac", body, {"webhook-signature": hex_hmac(body, SECRETS["hmac"])})
    except asyncpg.StatementTooComplexError:
        assert await kept(db) == (0, 0, 0)  # PostgREST returns the whole class 54 with 413
    else:
        assert response == (200, {"received": True, "duplicate": False})


@pytest.fixture
async def http(postgres: Cluster, database: str, parked_run: str) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client as a provider before the gateway."""
    async with gateway(postgres, database) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        yield client


@pytest.mark.one_postgres
@settings(max_examples=200, deadline=None, suppress_health_check=QUIET)
@given(delivery=damaged, twice=st.booleans())
async def test_over_http_only_the_documented_responses_are_sent(
    db: Db, http: httpx.AsyncClient, delivery: Delivery, twice: bool
) -> None:
    headers = [(name.title(), value.encode()) for name, value in delivery.headers.items()]
    response = await http.post(
        f"/rest/v1/rpc/webhook_{delivery.provider}?apikey={KEYS.anon_key}",
        content=delivery.content,
        headers=[("content-type", "application/json"), *headers, *(headers if twice else ())],
    )
    said = response.status_code, response.json()["code"]
    if handed_over(delivery.content) is None or delivery.content == DEEP.encode():
        assert said == (400, "PGRST102" if delivery.content else "22P02")
    else:
        assert said in {(401, "PT401"), (413, "PT413")}
    assert (await kept(db))[:2] == (0, 0)
