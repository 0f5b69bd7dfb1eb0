"""status, events and list in terminals of 60, 80 and 120 columns: what they print there, word for word; nothing is cut."""

import re

import pytest

from daemon.cli.tables import fold, table
from tests.support.commands import Db, fail_run, insert_run
from tests.support.protocol import move_clock

RUN = "job_1795489358547_863642fc6f89"
WHY = "The provider has refused the prompt, since it names a person; say it in other words and try again."

PRINTED = {
    ("status", 60): """
alert    since
warning  2026-01-01 12:00:00
    midjourney is closed to all daemons until 2100-01-01
    12:00 UTC: Out of credit. Do what the reason says.
    Deleting its row of image_jobs.provider_blocks opens it
    at once.

provider    pending  running  completed  failed  oldest
demo              1        0          0       0  0:05:SS
midjourney        0        0          0       0
    blocked until 2100-01-01 12:00:00

Last hour: 0 completed, 0 failed, $0.00. Today (UTC): $0.00.
0 of 16 slots are in use.

daemon       state  runs     version
worker-7f9c  alive  0 of 16  0.1.0
    demo, google, midjourney, openai, stability

failed                          processor
job_1795489358547_863642fc6f89  demo:painter
    The provider has refused the prompt, since it names a
    person; say it in other words and try again.
""",
    ("status", 80): """
alert    since                what
warning  2026-01-01 12:00:00  midjourney is closed to all daemons until
                              2100-01-01 12:00 UTC: Out of credit. Do what the
                              reason says. Deleting its row of
                              image_jobs.provider_blocks opens it at once.

provider    pending  running  completed  failed  oldest
demo              1        0          0       0  0:05:SS
midjourney        0        0          0       0
    blocked until 2100-01-01 12:00:00

Last hour: 0 completed, 0 failed, $0.00. Today (UTC): $0.00. 0 of 16 slots are
in use.

daemon       state  runs     version  providers
worker-7f9c  alive  0 of 16  0.1.0    demo, google, midjourney, openai,
                                      stability

failed                          processor
job_1795489358547_863642fc6f89  demo:painter
    The provider has refused the prompt, since it names a person; say it in
    other words and try again.
""",
    ("status", 120): """
alert    since                what
warning  2026-01-01 12:00:00  midjourney is closed to all daemons until 2100-01-01 12:00 UTC: Out of credit. Do what the
                              reason says. Deleting its row of image_jobs.provider_blocks opens it at once.

provider    pending  running  completed  failed  oldest   note
demo              1        0          0       0  0:05:SS
midjourney        0        0          0       0           blocked until 2100-01-01 12:00:00

Last hour: 0 completed, 0 failed, $0.00. Today (UTC): $0.00. 0 of 16 slots are in use.

daemon       state  runs     version  providers
worker-7f9c  alive  0 of 16  0.1.0    demo, google, midjourney, openai, stability

failed                          processor     why
job_1795489358547_863642fc6f89  demo:painter  The provider has refused the prompt, since it names a person; say it in
                                              other words and try again.
""",
    ("list", 60): """
run                             status   age  cost
job_waiting                     pending  5 m
    demo:painter
job_1795489358547_863642fc6f89  failed   3 h
    demo:painter - test: The provider has refused the
    prompt, since it names a person; say it in other words
    and try again.
""",
    ("list", 80): """
run                             status   age  cost
job_waiting                     pending  5 m
    demo:painter
job_1795489358547_863642fc6f89  failed   3 h
    demo:painter - test: The provider has refused the prompt, since it names a
    person; say it in other words and try again.
""",
    ("list", 120): """
run                             status   age  cost  what
job_waiting                     pending  5 m        demo:painter
job_1795489358547_863642fc6f89  failed   3 h        demo:painter - test: The provider has refused the prompt, since it
                                                    names a person; say it in other words and try again.
""",
    ("events", 60): """
HH:MM:SS.fff  created        0 %
    Waiting in line.
HH:MM:SS.fff  claimed        0 %
    Attempt 1 of 3.
HH:MM:SS.fff  failed         0 %
    The provider has refused the prompt, since it names a
    person; say it in other words and try again.
""",
    ("events", 80): """
HH:MM:SS.fff  created        0 % Waiting in line.
HH:MM:SS.fff  claimed        0 % Attempt 1 of 3.
HH:MM:SS.fff  failed         0 % The provider has refused the prompt, since it
                                 names a person; say it in other words and try
                                 again.
""",
    ("events", 120): """
HH:MM:SS.fff  created        0 % Waiting in line.
HH:MM:SS.fff  claimed        0 % Attempt 1 of 3.
HH:MM:SS.fff  failed         0 % The provider has refused the prompt, since it names a person; say it in other words and
                                 try again.
""",
}


@pytest.fixture
async def queue(db: Db) -> None:
    """Put two providers into the database, one with a failed run, one that is blocked; and a daemon."""
    await move_clock(db, "-3 hours")
    await fail_run(db, await insert_run(db, RUN), WHY)
    await move_clock(db, "-5 minutes -20 seconds")
    await insert_run(db, "job_waiting")
    await db.execute(
        """
        update image_jobs.daemons set name = 'worker-7f9c', version = '0.1.0', slots = 16, lease = '1 day',
          providers = array['demo', 'google', 'midjourney', 'openai', 'stability'];
        insert into image_jobs.provider_blocks (provider, until, reason)
        values ('midjourney', '2100-01-01 12:00+00', 'Out of credit.');
        update image_jobs.provider_states set since = '2026-01-01 12:00+00'
        """
    )


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", ["status", "list", "events"])
async def test_output_fits_the_screen_and_nothing_is_cut(image_jobs, database, queue, command, columns):
    arguments = (command, RUN) if command == "events" else (command,)
    printed = await image_jobs.on_screen(columns, *arguments, TZ="UTC", DATABASE_URL=database)
    for volatile, letters in ((r"\d\d:\d\d:\d\d\.\d{3}", "HH:MM:SS.fff"), (r"\b0:05:\d\d\b", "0:05:SS")):
        printed = re.sub(volatile, letters, printed)
    lines = [line.rstrip() for line in printed.split("\n")]
    assert "\n".join(lines).strip("\n") == PRINTED[command, columns].strip("\n")
    assert max(map(len, lines)) <= columns


async def test_output_into_a_pipe_is_not_folded(image_jobs, database, queue):
    process = await image_jobs.start("list", DATABASE_URL=database, COLUMNS="")
    done = await image_jobs.end(process)
    (line,) = [line for line in done.out.splitlines() if line.startswith(RUN)]
    assert line.endswith(f"  demo:painter - test: {WHY}")


def test_a_row_without_room_for_a_table_is_a_block():
    counts = dict.fromkeys(("pending", "running", "completed", "failed", "delayed", "parked", "cancelled"), 7)
    rows = [{"provider": "stability", **counts, "oldest": "", "note": "blocked until 12:00:00"}]
    assert table(rows, 60, sentence="note")[1] == [
        "stability",
        "  pending 7   running 7   completed 7   failed 7   delayed 7",
        "  parked 7   cancelled 7",
        "  blocked until 12:00:00",
    ]
    assert len(table(rows, 110, sentence="note")[1]) == 1


def test_addresses_stay_whole_and_wide_characters_count_twice():
    address = "https://example.com/" + "a" * 80
    assert fold(f"It lies at {address} for a day", 20) == ["It lies at", address, "for a day"]
    assert fold("雪の中の赤い狐が走っている", 10) == ["雪の中の赤", "い狐が走っ", "ている"]
    assert fold("雪の中 赤い狐", 10) == ["雪の中", "赤い狐"]
