"""Daemons of the release before go on: what they call is still there, and what they send is still understood.

The database compares their version with `image_jobs.oldest_daemon()` when they register: one that is too old is refused with
a sentence (daemon/test_fatal.py). Until a release raises that, every call below has to work.
"""

from uuid import uuid4

import pytest

from tests.support.protocol import Db
from tests.support.runs import insert_run, run_row

pytestmark = pytest.mark.every_postgres

PROTOCOL = {
    "attach_provider_job": "text, text, character varying, bigint",
    "block_provider": "text, text, interval, text",
    "finish_cancellation": "text, text, text, boolean, jsonb",
    "heartbeat": "uuid, integer, boolean, boolean",
    "leave": "uuid",
    "publish_models": "text, jsonb",
    "register_daemon": "uuid, text, text, integer, interval, text[]",
    "session_lock_key": "uuid",
    "set_webhook_secrets": "jsonb",
    "sweep_calls": "bigint",
    "sync": "uuid, integer, boolean, jsonb, jsonb, bigint[], double precision",
    "take_cancellations": "text[], integer",
    "take_over": "uuid",
    "unmatched_deliveries": "text[], integer",
}
"""The functions of a daemon of 0.1.0 with the fewest arguments that one has called. Add to it; take nothing away."""

OLD = "0.1.0"


@pytest.mark.one_postgres
async def test_functions_of_an_older_daemon_are_there(db: Db) -> None:
    rows = await db.fetch(
        """select p.proname as name, array_to_string(array(
          select format_type(t.type, null) from unnest(p.proargtypes) with ordinality as t (type, place)
          where t.place <= p.pronargs - p.pronargdefaults), ', ') as needed, oidvectortypes(p.proargtypes) as all
        from pg_proc p where p.pronamespace = 'image_jobs'::regnamespace and p.proname = any ($1)""",
        list(PROTOCOL),
    )
    there = {row["name"]: (row["needed"], row["all"]) for row in rows}
    assert there.keys() == PROTOCOL.keys()
    broken = {
        name: (called, *there[name])
        for name, called in PROTOCOL.items()
        if not f"{called}, ".startswith(f"{there[name][0]}, ".lstrip(", "))
        or not f"{there[name][1]}, ".startswith(f"{called}, ")
    }
    assert broken == {}


@pytest.mark.one_postgres
async def test_an_older_daemon_makes_an_image(db: Db) -> None:
    """With the fewest arguments and keys: no calls, no times, no response's status, no newest claim."""
    daemon, run = uuid4(), await insert_run(db)
    await db.execute("select image_jobs.register_daemon($1, 'old', $2, 4, '30 s', '{demo}')", daemon, OLD)
    sync = "select part, run from image_jobs.sync($1, $2, true, $3, $4, $5, null)"
    (claimed,) = await db.fetch(sync, daemon, 4, [], [], [])
    entry = {"id": run, "claim": claimed["run"]["claim"]}
    await db.execute("select image_jobs.heartbeat($1, 1, false, false)", daemon)
    await db.fetch(sync, daemon, 0, [], [{**entry, "progress": 50, "events": []}], [entry["claim"]])
    assert (await run_row(db, run))["progress"] == 50
    settled = {**entry, "outcome": "completed", "payload": {"imageUrl": "https://example.com/i.png", "cost": 0.04}}
    (result,) = await db.fetch(sync, daemon, 0, [settled], [], [entry["claim"]])
    assert (result["part"], result["run"]["result"]) == ("settled", "settled")
    payload = (await run_row(db, run))["payload"]
    assert (payload["cost"], sorted(payload["timings"])) == (0.04, ["generateMs", "queuedMs", "settleMs", "storeMs"])
    assert await db.fetchval("select image_jobs.take_over($1)", daemon) == 0
    await db.execute("select image_jobs.leave($1)", daemon)
