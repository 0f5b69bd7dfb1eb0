"""The feed of events in dev's terminal."""

from uuid import uuid4

from daemon.database import connected
from daemon.dev.feed import Feed

INSERT = """
insert into public.runs (id, kind, subject_id, status, processor, metadata)
values ($1, 'image_gen', $2, 'pending', 'demo:painter', $3)"""
SPEC = {"promptSpec": {"basePrompt": "a fox\nin the snow, " * 9}}


async def test_each_new_event_is_printed_once(database, db, capsys):
    await db.execute(INSERT, "job_before", uuid4(), SPEC)
    async with connected(database) as connection:
        feed = Feed(connection)
        await feed.poll()
        await db.execute(INSERT, "job_1", uuid4(), SPEC)
        daemon = uuid4()
        await db.execute("select image_jobs.register_daemon($1, 'test', '0', 9, '30 s', '{demo}')", daemon)
        await db.execute("select part from image_jobs.sync($1, 9, true, '[]', '[]', null, null)", daemon)
        await feed.poll()
        await feed.poll()
        await db.execute("update public.runs set status = 'cancelled' where id = 'job_1'")
        await feed.poll()
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in told] == [
        ["job_1", "claimed"],
        ["job_before", "claimed"],
        ["job_1", "cancelled"],
    ]
    assert '"a fox in the snow' in told[0]
    assert "attempt 1" in told[0]
    assert max(map(len, told)) < 120


async def test_an_event_that_commits_late_is_printed(database, db, capsys, postgres):
    async with connected(database) as connection, connected(database) as slow:
        for run_id in ("job_slow", "job_fast"):
            await db.execute(INSERT, run_id, uuid4(), SPEC)
        feed = Feed(connection)
        await feed.poll()
        async with slow.transaction():
            await slow.execute("update public.runs set status = 'cancelled' where id = 'job_slow'")
            await db.execute("update public.runs set status = 'cancelled' where id = 'job_fast'")
            await feed.poll()
        await feed.poll()
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["job_fast", "job_slow"]
