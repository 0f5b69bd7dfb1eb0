"""Figures come by one connection, are shared, and a database that is away is one sentence."""

import asyncio

import pytest

from daemon.errors import ImageJobsError
from daemon.pages.dashboard import figures
from daemon.pages.dashboard.figures import Figures

CONNECTIONS = "select count(*) from pg_stat_activity where application_name = 'image-jobs command' and datname = current_database()"


SLOW = """
create or replace function image_jobs.dashboard(period interval default '1 hour') returns jsonb language plpgsql as $$
begin
  perform nextval('public.looks'), pg_sleep(60);
  return '{}';
end
$$
"""


async def test_all_periods_have_figures(client):
    for period in figures.PERIODS:
        response = await client.get(f"/dashboard/api/board?period={period}")
        assert response.status_code == 200
        assert response.json()["totals"]["waiting"] == 0
        assert response.headers["content-type"] == "application/json"


async def test_looks_at_the_same_time_share_a_connection(database, db, monkeypatch):
    monkeypatch.setattr(figures, "FRESH", 60)
    async with Figures(database) as looking:
        boards = await asyncio.gather(*(looking.look("1h") for _ in range(5)))
        assert len(set(boards)) == 1  # looked at once: the time stands in it
        await looking.look("24h")
        assert await db.fetchval(CONNECTIONS) == 1


async def test_a_lost_connection_is_made_anew(database, db, monkeypatch):
    monkeypatch.setattr(figures, "FRESH", 0)
    async with Figures(database) as looking:
        await looking.look("1h")
        await db.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'image-jobs command'"
        )
        assert await looking.look("1h")


async def test_a_look_that_takes_too_long_is_not_repeated(database, db, monkeypatch):
    monkeypatch.setattr(figures, "FRESH", 0)
    monkeypatch.setattr(figures, "TIMEOUT", 5)
    await db.execute("create sequence looks")
    async with Figures(database) as looking:
        await looking.look("1h")
        await db.execute(SLOW)
        with pytest.raises(ImageJobsError, match="was lost"):
            await looking.look("1h")
    assert await db.fetchval("select last_value from looks") == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("postgres@", "nobody_here@"), "refuses the user or the password|role .* does not exist"),
        ((":", ":1"), "There is no database at|did not answer"),
    ],
    ids=["credentials", "nowhere"],
)
async def test_a_database_that_cannot_be_reached_is_a_sentence(database, change, sentence):
    old, new = change
    dsn = database.replace(old, new, 1) if old == "postgres@" else "postgresql://postgres@127.0.0.1:1/postgres"
    with pytest.raises(ImageJobsError, match=sentence):
        await Figures(dsn).look("1h")


async def test_a_database_without_our_schema_says_migrate(postgres):
    async with postgres.database(template=None) as dsn:
        with pytest.raises(ImageJobsError) as caught:
            await Figures(dsn).look("1h")
    assert caught.value.hint == "Run image-jobs migrate."
