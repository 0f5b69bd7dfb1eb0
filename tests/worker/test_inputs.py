"""Which pictures of our storage a run may have: the daemon's reading of a URL, alone and against the database's."""

from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from daemon.errors import RunError
from daemon.fetch.client import Fetcher
from daemon.images.decoder import Decoder
from daemon.prompt import PromptSpec
from daemon.run import ClaimedRun
from daemon.storage.client import Storage
from daemon.worker.inputs import Inputs
from daemon.worker.inspector import Inspector
from tests.support.postgres import Cluster, connect

OWN = "aaaaaaaa-1111-4000-8000-000000000001"
SEEN = "aaaaaaaa-2222-4000-8000-000000000002"
OTHER = "bbbbbbbb-1111-4000-8000-000000000002"
USER = "aaaaaaaa-0000-4000-8000-00000000000a"
PROJECT = "http://127.0.0.1:9/base"
OBJECTS = f"{PROJECT}/storage/v1/object"
IMAGES = f"{OBJECTS}/public/images"
SOURCES = f"{OBJECTS}/authenticated/image-sources"
READ = "storage_unreachable"
FORBIDDEN = "input_image_forbidden"
FETCHED = "download"


def claimed(created_by: str | None = USER, source_workflow: str | None = SEEN) -> ClaimedRun:
    """Return a run of the workflow OWN."""
    run: dict[str, Any] = dict.fromkeys(("provider_job_id", "webhook", "submitted_ago", "generated", "contested"))
    run |= dict.fromkeys(("claim", "ticket", "call", "attempt", "max_attempts", "waited"), 1)
    run |= {"id": "r", "subject_id": OWN, "processor": "demo:painter", "requested": "demo:painter", "metadata": {}}
    return ClaimedRun.read(UUID(int=0), {**run, "created_by": created_by, "source_workflow": source_workflow})


async def code_of(url: str, run: ClaimedRun, folder: Path) -> str:
    """Return how the picture at `url` could not be had: refused, not read from Storage, or not fetched without a key."""
    prompt = PromptSpec.parse({"promptSpec": {"basePrompt": "a red fox", "previousImage": url}})
    quick = timedelta(milliseconds=1)
    async with Storage(PROJECT, "key", bucket="images", first_wait=quick) as storage, Fetcher([]) as fetcher:
        inputs = Inputs(storage, storage, fetcher, Inspector(Decoder(1), 1000, 1000))
        with pytest.raises(RunError) as caught:
            await inputs.previous_image(run, prompt, folder)
    assert caught.value.hint
    return caught.value.code


@pytest.mark.parametrize(
    ("url", "code"),
    [
        (f"{IMAGES}/{OWN}/a.png", READ),
        (f"{IMAGES}/{SEEN}/a.png?v=0123abcd", READ),
        (f"{OBJECTS}/authenticated/images/{SEEN}/a.png", READ),
        (f"{OBJECTS}/sign/images/{SEEN}/a.png?token=t", READ),
        (f"{IMAGES}/%61{OWN[1:]}/a%20b.png", READ),
        (f"{SOURCES}/{OWN}/a.png", READ),
        (f"{SOURCES}/{SEEN}/a%20fox.png", READ),
        (f"{SOURCES}/{OTHER}/a.png", FORBIDDEN),
        (f"{SOURCES}/a.png", FORBIDDEN),
        (f"{OBJECTS}/authenticated/%69mage-sources/{OTHER}/a.png", FORBIDDEN),
        (f"{OBJECTS}/image-sources/{OTHER}/a.png", FORBIDDEN),
        (f"{IMAGES}/{OTHER}/a.png", FORBIDDEN),
        (f"{OBJECTS}/authenticated/images/{OTHER}/a.png", FORBIDDEN),
        (f"{OBJECTS}/sign/images/{OTHER}/a.png?token=t", FORBIDDEN),
        (f"{IMAGES}/%62{OTHER[1:]}/a.png", FORBIDDEN),
        (f"{IMAGES}/{OWN}/../{OTHER}/a.png", FORBIDDEN),
        (f"{IMAGES}/{OWN}/%2e%2e/{OTHER}/a.png", FORBIDDEN),
        (f"{IMAGES}/{OWN}%2F..%2F{OTHER}/a.png", FORBIDDEN),
        (f"{IMAGES}//{OTHER}/a.png", FORBIDDEN),
        (f"{OBJECTS}//public/images/{OTHER}/a.png", FORBIDDEN),
        (f"{OBJECTS}/public/%69mages/{OTHER}/a.png", FORBIDDEN),
        (f"{OBJECTS}/public/uploads/../images/{OTHER}/a.png", FORBIDDEN),
        (f"{OBJECTS}/public/uploads/..\\images\\{OTHER}/a.png", FORBIDDEN),
        (f"{OBJECTS}/images/{OTHER}/a.png", FORBIDDEN),
        (f"{PROJECT}/storage/v1/render/image/public/images/{OTHER}/a.png", FORBIDDEN),
        (f"{IMAGES}/{OWN.upper()}/a.png", FORBIDDEN),
        (f"{IMAGES}/{OWN}-x/a.png", FORBIDDEN),
        (f"{IMAGES}/{OWN}", FORBIDDEN),
        (f"{IMAGES}/a.png", FORBIDDEN),
        (f"{IMAGES}/{OTHER}/a.png".replace("http:", "https:"), FORBIDDEN),
        (f"{IMAGES}/{OTHER}/a.png".replace("127", "u:p@127"), FORBIDDEN),
        (f"{OBJECTS}/public/uploads/{USER}/a.png", FETCHED),
        (f"http://127.0.0.2:9/base/storage/v1/object/public/images/{OTHER}/a.png", FETCHED),
        ("https://[images/storage", FETCHED),
    ],
)
async def test_users_run_reads_the_workflows_that_were_checked(url: str, code: str, tmp_path: Path) -> None:
    assert await code_of(url, claimed(), tmp_path) == code


@pytest.mark.parametrize(("workflow", "code"), [(OWN, READ), (SEEN, FORBIDDEN), ("None", FORBIDDEN)])
async def test_users_run_without_a_check_reads_its_own(workflow: str, code: str, tmp_path: Path) -> None:
    assert await code_of(f"{IMAGES}/{workflow}/a.png", claimed(source_workflow=None), tmp_path) == code


@pytest.mark.parametrize("key", [f"{OTHER}/a.png", "a.png"])
async def test_run_of_an_operator_reads_all_of_the_bucket(key: str, tmp_path: Path) -> None:
    run = claimed(created_by=None, source_workflow=None)
    assert await code_of(f"{IMAGES}/{key}", run, tmp_path) == READ
    assert await code_of(f"{OBJECTS}/public/uploads/../images/{key}", run, tmp_path) == FETCHED


FOLDERS = (OWN, OTHER, OTHER.upper(), "%62" + OTHER[1:], OTHER[:-1] + "%32", OTHER.replace("-", "%2D"), OTHER + "%2f")
PARTS = (
    *("/", "//", "/./", "/../", "..", "%2F", "%2f", "%2E%2E/", "%", "%25", "%00", "%ff", "%C3%A9", "\\", "?", "#", "@"),
    *(
        "storage/v1/object",
        "/STORAGE/v1/object/",
        "public",
        "sign",
        "authenticated",
        "images",
        "image-sources",
        "%69mages",
        "a.png",
        "é",
    ),
    *FOLDERS,
)
STARTS = (
    *(PROJECT, PROJECT + "/x/..", PROJECT.replace("base", "%62ase"), "https://example.com"),
    *(
        IMAGES + "/",
        OBJECTS + "/authenticated/images/",
        OBJECTS + "/sign/images/",
        IMAGES.replace("http", "HTTP") + "/",
    ),
)
ADDRESSES = st.builds(
    "{}{}{}{}".format,
    st.sampled_from([f"{OBJECTS}/{way}/images/" for way in ("public", "authenticated", "sign")] + [f"{SOURCES}/"])
    | st.sampled_from(STARTS),
    st.sampled_from(FOLDERS + PARTS),
    st.sampled_from(("/a.png", "/", "")),
    st.lists(st.sampled_from(PARTS), max_size=4).map("".join),
)


async def test_database_checks_whatever_the_daemon_would_read(postgres: Cluster) -> None:
    """Domain: addresses of storage made of every part one has, in any sequence, in all spellings that a server may take for it."""
    found: list[str] = []

    @settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(ADDRESSES)
    @example(f"{IMAGES}/{OWN}/storage/v1/object/sign/images/{OTHER}/a.png")
    @example(f"{IMAGES}/{OTHER}/%2e%2e/{OWN}/a.png")
    def collect(url: str) -> None:
        found.append(url)

    collect()
    async with postgres.database() as dsn:
        connection = await connect(dsn)
        checked = [
            row[0]
            for row in await connection.fetch(
                "select image_jobs.pictured_workflow(u.url)::text from unnest($1::text[]) with ordinality u (url, place)"
                " order by u.place",
                found,
            )
        ]
        await connection.close()
    read = 0
    async with Storage(PROJECT, "key", bucket="images") as storage:
        for url, workflow in zip(found, checked, strict=True):
            key = storage.owns(url) or storage.owns(url, bucket="image-sources") or ""
            folder, _, name = key.partition("/")
            if name and folder in {OWN, OTHER}:
                read += 1
                assert workflow == folder, url
            elif name:
                assert workflow is None or workflow == folder.lower(), url
    assert read > 20
