"""Alerts are posted once when they open and once when they close, by whichever daemon is first."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta

import pytest
from pydantic import SecretStr, ValidationError
from structlog.testing import capture_logs

from daemon.alerts import Alerts
from daemon.log import masker, secrets_of
from daemon.queue.client import Queue
from daemon.settings import Settings
from tests.fakes.server import Response
from tests.fakes.slack_api import PATH, SlackAPI
from tests.support.postgres import wait_until
from tests.support.protocol import Daemon, Db, new_daemon

SHARED_CLOCK = """
create table shared_clock (moved interval not null);
insert into shared_clock values ('0');
create or replace function image_jobs.now() returns timestamptz language sql volatile parallel safe set search_path = ''
as 'select clock_timestamp() + moved from public.shared_clock'
"""


@pytest.fixture
async def slack() -> AsyncIterator[SlackAPI]:
    """A fake of Slack."""
    async with SlackAPI() as api:
        yield api


@pytest.fixture
async def living(db: Db) -> Daemon:
    """A daemon that lives while the clock moves; the clock is that of all sessions."""
    await db.execute(SHARED_CLOCK)
    return await new_daemon(db)


@asynccontextmanager
async def senders(database: str, slack: SlackAPI, count: int = 1) -> AsyncGenerator[list[Alerts]]:
    """Yield the part that posts, of so many daemons."""
    async with AsyncExitStack() as stack:
        queues = [await stack.enter_async_context(Queue(database)) for _ in range(count)]
        yield [Alerts(queue, SecretStr(slack.address), project="example.supabase.co") for queue in queues]


async def move(db: Db, daemon: Daemon, seconds: float) -> None:
    await db.execute("update shared_clock set moved = moved + $1", timedelta(seconds=seconds))
    await daemon.beat()


async def block(db: Db, provider: str, seconds: float = 3600) -> None:
    await db.execute(
        "select image_jobs.block_provider($1, null, make_interval(secs => $2), 'Pay <your> bill & go.')",
        provider,
        seconds,
    )


async def unblock(db: Db) -> None:
    await db.execute("delete from image_jobs.provider_blocks")


def told(slack: SlackAPI) -> list[tuple[str, str]]:
    return [(notice["subject"], notice["state"]) for notice in slack.posted]


async def test_an_alert_is_posted_when_it_opens_and_closes(
    database: str, db: Db, living: Daemon, slack: SlackAPI
) -> None:
    async with senders(database, slack) as (sender,):
        await sender.send()
        assert slack.requests == []
        await block(db, "openai")
        await sender.send()
        await sender.send()
        await move(db, living, 300)
        await unblock(db)
        await sender.send()
        await move(db, living, 301)
        await sender.send()
        await sender.send()
    opened, closed = slack.posted
    assert opened["text"].startswith("WARNING example.supabase.co: openai is closed to all daemons until ")
    assert "Pay &lt;your&gt; bill &amp; go.\nDo what the reason says." in opened["text"]
    assert closed["text"].startswith("CLOSED example.supabase.co: openai is closed")
    assert closed["text"].endswith("It was open 5 minutes.")
    assert (opened["key"], closed["key"]) == (opened["id"], closed["id"])
    assert opened["id"].removesuffix(":open") == closed["id"].removesuffix(":closed")


async def test_slack_that_was_away_gets_each_alert_once(database: str, db: Db, living: Daemon, slack: SlackAPI) -> None:
    """Also one that has closed meanwhile: first that it opened, then that it closed."""
    async with senders(database, slack) as (sender,):
        slack.away = True
        await block(db, "openai")
        for _ in range(12):
            await sender.send()
            await move(db, living, 5)
        tries = len(slack.requests)
        await unblock(db)
        await block(db, "google")
        await sender.send()
        slack.away = False
        for _ in range(8):
            await move(db, living, 60)
            await sender.send()
    assert 4 <= tries <= 6  # after 0, 5, 10, 15 and 35 s, or so: pauses of 2, 4, 8, 16 s
    assert sorted(told(slack)) == [("google", "open"), ("openai", "closed"), ("openai", "open")]
    assert told(slack).index(("openai", "open")) < told(slack).index(("openai", "closed"))


async def test_an_alert_that_comes_and_goes_is_told_once(
    database: str, db: Db, living: Daemon, slack: SlackAPI
) -> None:
    """As a provider's that opens for seconds between two 429s."""
    async with senders(database, slack) as (sender,):
        for _ in range(3):
            await block(db, "openai", 120)
            await sender.send()
            await move(db, living, 121)
            await sender.send()
            await move(db, living, 120)
        assert told(slack) == [("openai", "open")]
        await move(db, living, 181)
        await sender.send()
    assert told(slack) == [("openai", "open"), ("openai", "closed")]


async def test_two_daemons_post_an_alert_once(database: str, db: Db, living: Daemon, slack: SlackAPI) -> None:
    providers = ("demo", "google", "midjourney", "openai", "stability")
    async with senders(database, slack, 2) as (one, other):
        for provider in providers:
            await block(db, provider)
        go = slack.hold()
        sending = asyncio.create_task(one.send())
        await wait_until(lambda: bool(slack.requests))
        await other.send()
        assert len(slack.requests) == 1
        go.set()
        await sending
        await asyncio.gather(one.send(), other.send())
    assert sorted(told(slack)) == [(provider, "open") for provider in providers]


async def test_a_killed_daemons_notice_is_posted_by_another(
    database: str, db: Db, living: Daemon, slack: SlackAPI
) -> None:
    async with senders(database, slack, 2) as (killed, other):
        await block(db, "openai")
        go = slack.hold()
        dying = asyncio.create_task(killed.send())
        await wait_until(lambda: bool(slack.requests))
        dying.cancel()
        go.set()
        await other.send()
        assert len(slack.requests) == 1
        await move(db, living, 61)
        await other.send()
    assert len({request.headers["idempotency-key"] for request in slack.requests}) == 1
    assert len(slack.requests) == 2


async def test_the_next_daemon_tells_that_there_was_none(
    database: str, db: Db, living: Daemon, slack: SlackAPI
) -> None:
    async with senders(database, slack, 2) as (first, second):
        await first.send()
        await db.execute("update shared_clock set moved = moved + interval '10 min'")  # nobody beats
        await new_daemon(db)
        await second.send()
        await second.send()
        await db.execute("select image_jobs.leave(id) from image_jobs.daemons")  # a deploy
        await new_daemon(db)
        await second.send()
    assert [(notice["name"], notice["state"]) for notice in slack.posted] == [
        ("no_daemon", "open"),
        ("no_daemon", "closed"),
    ]
    assert "It was open 10 minutes." in slack.posted[1]["text"] or "It was open 9 minutes." in slack.posted[1]["text"]


async def test_a_service_that_takes_text_alone_gets_that(
    database: str, db: Db, living: Daemon, slack: SlackAPI
) -> None:
    slack.text_alone = True
    async with senders(database, slack) as (sender,):
        await block(db, "openai")
        await sender.send()
        await block(db, "google")
        await sender.send()
    assert [sorted(notice) for notice in slack.posted] == [["key", "text"]] * 2
    assert len(slack.requests) == 3


async def test_the_address_is_in_no_log_and_no_redirect_goes(
    database: str, db: Db, living: Daemon, slack: SlackAPI
) -> None:
    async with senders(database, slack) as (sender,):
        await block(db, "openai")
        slack.next(Response(307, headers={"location": slack.url + "/stolen"}))
        with capture_logs() as lines:
            for _ in range(2):
                await sender.send()
                await move(db, living, 60)
    assert told(slack) == [("openai", "open")]
    assert [request.path for request in slack.requests] == [PATH] * 2
    assert [line.get("reason") for line in lines] == ["HTTP 307", None]
    assert PATH not in str(lines)
    settings = Settings.model_validate({"IMAGE_JOBS_ALERT_URL": slack.address})
    assert masker(secrets_of(settings))(f"POST {slack.address} failed") == "POST *** failed"


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("http://hooks.example.com/secretpath", "it has to be https"),
        ("hooks.example.com/secretpath", "it begins with neither https:// nor http://"),
        ("https://hooks.example.com/secret path", "white space"),
    ],
)
def test_an_address_in_the_clear_is_refused(address: str, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint) as refused:
        Settings.model_validate({"IMAGE_JOBS_ALERT_URL": address})
    assert "secret" not in str(refused.value).replace("is a secret", "")


def test_this_machine_and_https_are_taken() -> None:
    for address in ("http://127.0.0.1:9/x", "http://localhost:9/x", "https://hooks.slack.com/services/T/B/x?y=z"):
        settings = Settings.model_validate({"IMAGE_JOBS_ALERT_URL": address})
        assert settings.alert_url is not None
        assert settings.alert_url.get_secret_value() == address
        assert "x" not in str(settings.alert_url)
