"""generate: its run, its exit codes, its choice of a model."""

import signal
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

from daemon.cli.console import dollars
from tests.support.commands import end_run, fail_run
from tests.support.postgres import wait_until
from tests.support.servers import served

DAEMON = uuid4()


async def test_ctrl_c_ends_generate_and_keeps_the_run(image_jobs, database, db):
    process = await image_jobs.start("generate", "a fox", "--seed", "7", "--ratio", "16:9", DATABASE_URL=database)
    assert process.stderr is not None
    line = (await process.stderr.readline()).decode()
    assert "No daemon is running" in line
    process.send_signal(signal.SIGINT)
    done = await image_jobs.end(process)
    (run,) = await db.fetch("select * from public.runs")
    assert done.code == 1
    assert f"image-jobs cancel {run['id']}" in done.err
    assert (run["status"], run["processor"]) == ("pending", "demo:painter")
    assert run["metadata"]["promptSpec"] == {"basePrompt": "a fox", "seed": 7, "aspectRatio": "16:9"}


async def test_a_cancelled_run_is_exit_code_1(image_jobs, database, db):
    process = await image_jobs.start("generate", "a fox", "--json", DATABASE_URL=database)
    run_id = await wait_until(lambda: db.fetchval("select id from public.runs"))
    await db.execute("update public.runs set status = 'cancelled'")
    done = await image_jobs.end(process)
    assert done.code == 1
    assert f"{run_id} was cancelled." in done.err
    assert done.json == {"jobId": run_id, "status": "cancelled", "file": None, "warnings": []}


async def test_a_failed_run_prints_its_error_and_hint(image_jobs, database, db):
    process = await image_jobs.start("generate", "a fox", DATABASE_URL=database)
    run_id = await wait_until(lambda: db.fetchval("select id from public.runs"))
    await fail_run(db, run_id, "The painter has run out of red.")
    done = await image_jobs.end(process)
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[-2:] == ["image-jobs: The painter has run out of red.", "Try another prompt."]


WARNING = "The public address of the image does not answer yet."
ENDED = """
update runs set payload = payload || '{"cost": 0.0525, "possibleCost": 0.4}' where id = $1"""


async def test_generate_prints_warnings_and_the_cost(image_jobs, database, db):
    process = await image_jobs.start("generate", "a fox", DATABASE_URL=database)
    run_id = await wait_until(lambda: db.fetchval("select id from public.runs"))
    events = ({"event": "warning", "message": WARNING}, {"event": "progress", "message": "Half."})
    async with db.transaction():
        for payload in events:
            await db.execute("insert into run_events (run_id, kind, payload) values ($1, 'log', $2)", run_id, payload)
        await fail_run(db, run_id, "The painter has run out of red.")
        await db.execute(ENDED, run_id)
    done = await image_jobs.end(process)
    assert done.err.splitlines()[-4:-2] == [
        f"Warning: {WARNING}",
        "Cost: $0.0525. Of other calls the outcome is not known: up to $0.40 more.",
    ]
    assert "Half." not in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a fox", "--out", "/proc/x"), "/proc/x cannot be written"),
        (("a fox", "--out", "x" * 300), "x cannot be written (File name too long)."),
        (("a fox", "--out", f"{'x' * 300}/y"), "/y cannot be written (File name too long)."),
        (("fox\udcff",), "Argument 2 is no UTF-8 text."),
        (("x" * 40_000,), "PROMPT has more than 32,000 characters."),
        (("x" * 20_000,), "There is a word in it that looks like base64"),
    ],
    ids=["proc", "long name", "long directory", "bytes", "too long", "one word"],
)
async def test_a_mistake_costs_a_sentence_and_no_run(image_jobs, database, db, arguments, said):
    done = await image_jobs("generate", *arguments, DATABASE_URL=database)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 2)
    assert said in done.err
    assert await db.fetchval("select count(*) from runs") == 0


async def test_an_image_is_saved_below_a_path_with_spaces(image_jobs, database, db):
    async def picture(scope: object, receive: object, send: Callable[..., Any]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a picture"})

    (image_jobs.directory / "my pictures").mkdir()
    out = "my pictures/a red fox.png"
    async with served(picture) as server:
        process = await image_jobs.start("generate", "a fox", "--out", out, DATABASE_URL=database)
        run_id = await wait_until(lambda: db.fetchval("select id from public.runs"))
        await end_run(db, run_id, outcome="completed", payload={"imageUrl": f"{server}/a.png"})
        done = await image_jobs.end(process)
    assert (done.code, done.out) == (0, f"{out}\n")
    assert done.err.splitlines()[-1] == "Cost: not known."
    assert (image_jobs.directory / out).read_bytes() == b"a picture"


@pytest.mark.parametrize(
    ("amount", "text"), [(0, "$0.00"), (0.04, "$0.04"), (0.0525, "$0.0525"), (12, "$12.00"), (0.00004, "$0.00")]
)
def test_dollars_have_two_to_four_digits(amount, text):
    assert dollars(amount) == text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--size", "big"), "promptSpec.size cannot be read."),
        (("--processor", "painter"), "processor must name a provider and a model."),
        (("--image", "data:image/png;base64,AAAA"), "base64"),
        (("--out", "no/such/dir/fox.png"), "There is no directory"),
    ],
)
async def test_a_refused_insert_is_exit_code_2(image_jobs, database, db, arguments, says):
    done = await image_jobs("generate", "a fox", *arguments, DATABASE_URL=database)
    assert done.code == 2
    assert says in done.err
    assert await db.fetchval("select count(*) from public.runs") == 0


async def test_generate_uses_a_model_of_a_living_daemon(image_jobs, database, db):
    await db.execute("select image_jobs.register_daemon(gen_random_uuid(), 'x', '0', 1, '1 hour', array['openai'])")
    await db.execute(
        """insert into image_jobs.models (provider, model, price, retired) values
        ('openai', 'dear', 0.2, null), ('openai', 'cheap', 0.01, null), ('openai', 'gone', 0.001, '2020-01-01'),
        ('nobody', 'free', 0, null)"""
    )
    process = await image_jobs.start("generate", "a red fox", DATABASE_URL=database)
    try:
        await wait_until(lambda: db.fetchval("select processor = 'openai:cheap' from runs"))
    finally:
        process.send_signal(signal.SIGINT)
        await image_jobs.end(process)


async def test_generate_says_why_its_run_waits(image_jobs, database, db):
    """The operator pauses the provider and goes on; then the last daemon leaves."""
    await db.execute("select image_jobs.register_daemon($1, 'x', '0', 1, '1 hour', array['demo'])", DAEMON)
    await db.execute("insert into image_jobs.provider_limits (provider, paused) values ('demo', true)")
    process = await image_jobs.start("generate", "a red fox", "--processor", "demo:painter", DATABASE_URL=database)
    assert process.stderr is not None
    assert (await process.stderr.readline()).decode().startswith("Demo is paused.")
    await db.execute("update image_jobs.provider_limits set paused = false")
    await db.execute("select image_jobs.leave($1)", DAEMON)
    assert (await process.stderr.readline()).decode().startswith("No images are made at the moment.")
    process.send_signal(signal.SIGINT)
    await image_jobs.end(process)
