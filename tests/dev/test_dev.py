"""`image-jobs dev`: start, first screen, commands beside it, restarts, kills."""

import re
import signal
import socket
import stat
import tempfile
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any
from uuid import uuid4

import httpx
import pytest
from supabase import AsyncClient, AsyncClientOptions, acreate_client

from daemon.database import connected
from daemon.dev.home import Home
from daemon.dev.supabase.gateway import is_free
from tests.support.commands import STATE, ImageJobs
from tests.support.dev_process import Dev, running
from tests.support.postgres import free_port, wait_until

pytestmark = pytest.mark.timeout(120)

IMAGE = re.compile(r"completed\s+[\d.]+ s\s+(http://\S+)")


@pytest.fixture(scope="module")
def directory():
    """A directory that the user `nobody` can reach, unlike pytest's: as root, Postgres runs as `nobody`."""
    path = Path(tempfile.mkdtemp(prefix="image-jobs-dev-"))
    path.chmod(0o755)
    yield path
    rmtree(path)


@pytest.fixture
def another_directory():
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


async def test_a_fresh_database_makes_a_public_image(dev: Dev, directory: Path):
    url = (await dev.says(IMAGE))[1]
    async with httpx.AsyncClient() as client:
        response = await client.get(url)
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    assert response.content.startswith(b"\x89PNG")


async def test_the_first_screen_has_what_a_newcomer_needs(dev: Dev, directory: Path):
    values = environment(directory)
    for value in (values["DATABASE_URL"], values["SUPABASE_URL"], ".image-jobs/env", "OPENAI_API_KEY adds openai"):
        assert value in dev.text
    assert "Traceback" not in dev.text


async def test_the_first_screen_has_a_dashboard_that_opens(dev: Dev):
    url, token = (await dev.says(r"Dashboard +(http://\S+/dashboard)#(\S+)")).groups()
    async with httpx.AsyncClient() as client:
        assert (await client.get(url)).status_code == 200
        refused = await client.get(f"{url}/api/board", headers={"origin": "https://evil.example"})
        board = await client.get(f"{url}/api/board", headers={"authorization": f"Bearer {token}"})
    assert refused.status_code == 403
    assert [daemon["state"] for daemon in board.json()["daemons"]] == ["alive"]


async def test_the_environment_is_private_and_has_every_name(dev: Dev, directory: Path):
    values = environment(directory)
    assert list(values) == [
        "DATABASE_URL",
        "SUPABASE_URL",
        "SUPABASE_ANON_KEY",
        "SUPABASE_SERVICE_ROLE_KEY",
        *("VITE_SUPABASE_URL", "VITE_SUPABASE_PUBLISHABLE_KEY", "VITE_SUPABASE_ANON_KEY"),
        *("NEXT_PUBLIC_SUPABASE_URL", "NEXT_PUBLIC_SUPABASE_PUBLISHABLE_KEY", "NEXT_PUBLIC_SUPABASE_ANON_KEY"),
    ]
    public = {value for name, value in values.items() if name.startswith(("VITE_", "NEXT_"))}
    assert public == {values["SUPABASE_URL"], values["SUPABASE_ANON_KEY"]}
    assert stat.S_IMODE((directory / ".image-jobs/env").stat().st_mode) == 0o600


async def test_an_application_signs_in_on_the_same_port(dev: Dev, directory: Path):
    values = environment(directory)
    async with httpx.AsyncClient(headers={"apikey": values["VITE_SUPABASE_PUBLISHABLE_KEY"]}) as client:
        session = (await client.post(f"{values['VITE_SUPABASE_URL']}/auth/v1/signup", json={})).json()
        client.headers["authorization"] = f"Bearer {session['access_token']}"
        user = (await client.get(f"{values['VITE_SUPABASE_URL']}/auth/v1/user")).json()
    assert (user["id"], user["is_anonymous"]) == (session["user"]["id"], True)


async def test_commands_anywhere_find_the_dev_that_runs(dev: Dev, directory: Path, tmp_path: Path):
    done = await ImageJobs(tmp_path)("check", XDG_STATE_HOME=str(directory / STATE))
    assert done.code == 0
    assert done.err == f"Using {directory}/.image-jobs/env, written by image-jobs dev.\n"


async def test_a_given_address_wins_over_the_dev_that_runs(dev: Dev, image_jobs: ImageJobs):
    done = await image_jobs("status", DATABASE_URL="postgresql://nobody@127.0.0.1:1/nothing")
    assert done.code == 1
    assert "Using" not in done.err


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
        "connections": "ok",
        "webhooks": "info",
        "schema": "ok",
        "set-up": "ok",
        "keys": "ok",
        "realtime": "info",
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


async def test_a_taken_port_is_refused_with_another_one(dev: Dev, directory: Path, tmp_path: Path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = await ImageJobs(tmp_path)("dev", "--fresh", "--data", "new", "--port", str(port))
    assert done.code == 1
    refused, cure = done.err.splitlines()
    assert refused == f"image-jobs: Port {port} is taken by another program."
    choice = re.fullmatch(r"Stop that program .*, or choose another port: image-jobs dev --port (\d+)\.", cure)
    assert choice is not None
    assert is_free(int(choice[1]))
    assert not (tmp_path / "new/postgres").exists()
    port = environment(directory)["SUPABASE_URL"].rpartition(":")[2]
    done = await ImageJobs(tmp_path)("dev", "--port", port, XDG_STATE_HOME=str(directory / STATE))
    owner = f"another image-jobs dev, process {dev.process.pid}, with its data in {directory}/.image-jobs"
    assert f"Port {port} is taken by {owner}." in done.err
    assert f"Use that one, which is at http://127.0.0.1:{port}, stop it, or choose" in done.err


async def test_a_directory_with_other_files_is_refused(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/thesis.txt").touch()
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
        async with running(directory, free_port(), "--data", "elsewhere", "--realtime-limit", "9") as dev:
            await dev.says(IMAGE)
            assert "Realtime drops what goes beyond 9 messages a second over a minute." in dev.text
            assert home.remembered_port() != taken


async def test_data_survives_stops_and_kills_until_fresh(directory: Path):
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


async def test_private_pictures_open_for_members_alone(another_directory: Path):
    """The mode by IMAGE_JOBS_PRIVATE, with the official client as a member, as another user, and as nobody."""
    directory = another_directory
    async with (
        running(directory, free_port(), "--data", ".image-jobs", IMAGE_JOBS_PRIVATE="1") as private,
        httpx.AsyncClient(timeout=20) as http,
    ):
        assert re.search(r"Pictures\s+private", private.text)
        assert environment(directory)["IMAGE_JOBS_PRIVATE"] == "1"
        url = (await private.says(IMAGE))[1]
        assert "/object/authenticated/images/" in url
        assert (await http.get(url)).status_code == 400
        saved = await ImageJobs(directory)("generate", "a red fox", "--size", "64x64", "--out", "fox.png")
        assert (saved.code, (directory / "fox.png").read_bytes()[:4]) == (0, b"\x89PNG")
        values = environment(directory)
        options = AsyncClientOptions(httpx_client=http, auto_refresh_token=False, persist_session=False)
        signed: list[list[Any]] = []
        for _ in range(2):
            client = await acreate_client(values["SUPABASE_URL"], values["SUPABASE_ANON_KEY"], options)
            await client.auth.sign_in_anonymously()
            if not signed:
                request = {"workflowId": str(uuid4()), "promptSpec": {"basePrompt": "a fox", "size": "64x64"}}
                request |= {"nodeId": "n", "provider": "demo", "model": "painter"}
                run = (await client.rpc("start_image_job", {"request": request}).execute()).data["jobId"]
                payload = await wait_until(partial(payload_of, client, run), timeout=40)
            paths = [payload["imagePath"], payload["thumbnailPath"]]
            signed.append(await client.storage.from_("images").create_signed_urls(paths, 600))
        assert [(await http.get(each["signedURL"])).status_code for each in signed[0]] == [200, 200]
        assert [each["signedURL"] for each in signed[1]] == [None, None]


async def payload_of(client: AsyncClient, run: str) -> dict[str, Any] | None:
    """Return what a completed run has, as its user reads it; None before."""
    (row,) = (await client.table("runs").select("status,payload").eq("id", run).execute()).data
    return row["payload"] if row["status"] == "completed" else None
