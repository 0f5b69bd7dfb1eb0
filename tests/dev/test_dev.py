"""`image-jobs dev`, from the first start to the last trace of it."""

import re
import signal
import socket
import stat
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from shutil import rmtree

import httpx
import pytest

from daemon.database import connected
from daemon.dev.home import Home
from tests.commands import ImageJobs
from tests.devs import Dev, running
from tests.postgres import free_port

pytestmark = pytest.mark.timeout(120)

IMAGE = re.compile(r"completed\s+[\d.]+ s\s+(http://\S+)")


@pytest.fixture(scope="module")
def directory():
    """One that `nobody` can reach: pytest's own cannot be, and as root Postgres is `nobody`."""
    path = Path(tempfile.mkdtemp(prefix="image-jobs-dev-"))
    path.chmod(0o755)
    yield path
    rmtree(path)


@pytest.fixture(scope="module")
async def dev(directory: Path) -> AsyncIterator[Dev]:
    async with running(directory, free_port(), "--data", ".image-jobs") as started:
        yield started


@pytest.fixture
def image_jobs(directory: Path) -> ImageJobs:
    return ImageJobs(directory)


def environment(directory: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in (directory / ".image-jobs/env").read_text().splitlines())


async def test_a_fresh_database_makes_an_image_that_everybody_can_fetch(dev: Dev, directory: Path):
    url = (await dev.says(IMAGE))[1]
    async with httpx.AsyncClient() as client:
        answer = await client.get(url)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.content.startswith(b"\x89PNG")


async def test_the_first_screen_has_what_a_newcomer_needs(dev: Dev, directory: Path):
    said = environment(directory)
    for value in (said["DATABASE_URL"], said["SUPABASE_URL"], ".image-jobs/env", "OPENAI_API_KEY adds openai"):
        assert value in dev.text
    assert "Traceback" not in dev.text


async def test_the_environment_has_four_names_and_is_private(dev: Dev, directory: Path):
    assert list(environment(directory)) == [
        "DATABASE_URL",
        "SUPABASE_URL",
        "SUPABASE_ANON_KEY",
        "SUPABASE_SERVICE_ROLE_KEY",
    ]
    assert stat.S_IMODE((directory / ".image-jobs/env").stat().st_mode) == 0o600


async def test_commands_beside_it_need_no_environment(dev: Dev, image_jobs: ImageJobs):
    done = await image_jobs("generate", "a lighthouse", "--size", "64x64", "--out", "lighthouse.png")
    assert (done.code, done.out) == (0, "lighthouse.png\n"), done.err
    assert (image_jobs.directory / "lighthouse.png").read_bytes().startswith(b"\x89PNG")
    made = (await image_jobs("generate", "a lighthouse", "--size", "64x64", "--json")).json
    assert made["status"] == "completed"
    assert made["imageUrl"].startswith(environment(image_jobs.directory)["SUPABASE_URL"])
    assert (await image_jobs("check")).code == 0
    await dev.says(f"{made['jobId']}  completed")


async def test_doctor_has_nothing_to_cure(dev: Dev, image_jobs: ImageJobs):
    done = await image_jobs("doctor", "--json")
    assert done.code == 0, done.out
    assert {finding["name"]: finding["state"] for finding in done.json} == {
        "database": "ok",
        "listen": "ok",
        "migrations": "ok",
        "daemons": "info",
        "webhooks": "info",
        "publication": "info",
        "storage": "ok",
        "providers": "info",
    }


async def test_a_twin_is_refused_in_one_sentence(dev: Dev, image_jobs: ImageJobs):
    done = await image_jobs("dev", "--port", str(free_port()))
    assert done.code == 1
    assert f"Another image-jobs dev, process {dev.process.pid}, is using .image-jobs" in done.err
    done = await image_jobs("dev", "--fresh", "--port", str(free_port()))
    assert done.code == 1
    assert (image_jobs.directory / ".image-jobs/postgres/PG_VERSION").exists()


async def test_a_taken_port_or_a_directory_of_others_is_refused_before_anything_starts(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/thesis.txt").touch()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = await ImageJobs(tmp_path)("dev", "--fresh", "--data", "new", "--port", str(port))
    assert done.code == 1
    assert done.err.splitlines() == [
        f"image-jobs: Port {port} is taken by another program.",
        "Stop that program, or choose another port with --port.",
    ]
    assert not (tmp_path / "new/postgres").exists()
    done = await ImageJobs(tmp_path)("dev", "--fresh", "--data", "data", "--port", str(free_port()))
    assert done.code == 2
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["thesis.txt"]


async def test_a_taken_database_port_is_no_obstacle(directory: Path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with Home(directory / "elsewhere") as home:
            home.write_environment({"DATABASE_URL": f"postgresql://postgres@127.0.0.1:{taken}/postgres"})
        async with running(directory, free_port(), "--data", "elsewhere") as dev:
            await dev.says(IMAGE)
            assert home.remembered_port() != taken


async def test_it_stops_goes_on_with_its_data_survives_a_kill_and_begins_anew(directory: Path):
    data, port = directory / "story", free_port()
    arguments = ("--data", "story")

    async with running(directory, port, *arguments) as first:
        url = (await first.says(IMAGE))[1]
        first.process.send_signal(signal.SIGINT)
        assert await first.ended() == 0

    async with running(directory, port, *arguments) as second:
        dsn = re.search(r"DATABASE_URL=(\S+)", (data / "env").read_text())
        assert dsn is not None
        async with httpx.AsyncClient() as client:
            assert (await client.get(url)).status_code == 200
        async with connected(dsn[1]) as connection:
            assert await connection.fetchval("select count(*) from public.runs") == 1
            await connection.execute(
                "insert into public.runs (id, kind, subject_id, status, processor, metadata) values "
                "('job_hangs', 'image_gen', gen_random_uuid(), 'pending', 'demo:painter', $1)",
                {"promptSpec": {"basePrompt": "a long wait"}, "demo": {"hang": True}},
            )
            await second.says("job_hangs  claimed")
        second.process.send_signal(signal.SIGTERM)
        await second.says("Stopping")
        second.process.send_signal(signal.SIGINT)
        assert await second.ended() == 0

    async with running(directory, port, *arguments) as third:
        await third.says("job_hangs  claimed")  # it was handed back
        third.process.kill()
        await third.ended()
        # At once: what the killed one has left behind is waited for.
        async with running(directory, port, *arguments, "--fresh") as fourth:
            assert (await fourth.says(IMAGE))[1] != url
            fourth.daemon().kill()
            assert await fourth.ended() == 1
    assert "The daemon ended by itself, with code -9." in fourth.text
