"""The workflow of the picture to refine: who may name it, and what the daemon is told."""

from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.support.postgres import signed_in
from tests.support.protocol import Daemon, Db
from tests.support.runs import event_names, run_row

ANN = UUID("aaaaaaaa-0000-4000-8000-00000000000a")
BOB = UUID("bbbbbbbb-0000-4000-8000-00000000000b")
ANNS = UUID("aaaaaaaa-1111-4000-8000-000000000001")
BOBS = UUID("bbbbbbbb-1111-4000-8000-000000000002")
STORAGE = "https://project.supabase.co/storage/v1/object"
OF_BOB = f"{STORAGE}/public/images/{BOBS}/job_1.png"
REFUSED = "promptSpec.previousImage is of a workflow that you are no member of."


@pytest.fixture
async def db(db: Db) -> Db:
    """Give Ann and Bob a workflow each."""
    for user, workflow in ((ANN, ANNS), (BOB, BOBS)):
        async with signed_in(db, user):
            await insert(db, workflow)
    await db.execute("delete from runs")
    return db


async def insert(db: Db, workflow: UUID, image: str | None = None, **columns: Any) -> str:
    """Insert a run as whoever is signed in; return its id."""
    row = {
        "kind": "image_gen",
        "subject_id": workflow,
        "status": "pending",
        "processor": "demo:painter",
        "metadata": {"promptSpec": {"basePrompt": "a red fox", "previousImage": image}},
    } | columns
    numbers = ", ".join(f"${number}" for number in range(1, len(row) + 1))
    return await db.fetchval(f"insert into runs ({', '.join(row)}) values ({numbers}) returning id", *row.values())


async def start(db: Db, workflow: UUID, image: str) -> str:
    """Start a run by the function for clients; return its id."""
    job = await db.fetchval(
        "select start_image_job($1)",
        {
            "nodeId": "n",
            "workflowId": str(workflow),
            "provider": "demo",
            "model": "painter",
            "promptSpec": {"basePrompt": "a red fox", "previousImage": image},
        },
    )
    return job["jobId"]


async def source(db: Db, run: str) -> UUID | None:
    return (await run_row(db, run))["source_workflow"]


WRITTEN = [
    OF_BOB,
    OF_BOB + "?v=0123abcd",
    OF_BOB.replace("/public/", "/authenticated/"),
    OF_BOB.replace("/public/", "/sign/") + "?token=x",
    OF_BOB.replace("https://project.supabase.co", "HTTP://user:word@127.0.0.1:54321/base"),
    OF_BOB.replace("images", "pictures"),
    OF_BOB.replace(str(BOBS), "%62" + str(BOBS)[1:]),
    OF_BOB.replace(str(BOBS), "".join(f"%{ord(it):02X}" for it in str(BOBS))),
    OF_BOB.replace(str(BOBS), str(BOBS).upper()),
    OF_BOB.replace(f"/{BOBS}/", f"//{BOBS}//"),
    OF_BOB.replace(f"/{BOBS}/", f"%2F{BOBS}%2F"),
    OF_BOB.replace(f"/{BOBS}/", f"/{ANNS}/../{BOBS}/"),
    OF_BOB.replace(f"/{BOBS}/", f"/{ANNS}/%2e%2E/./{BOBS}/"),
    OF_BOB.replace("/storage", "/./%73torage"),
    OF_BOB.replace("/storage", "/STORAGE"),
    f"{OF_BOB}/{STORAGE}/public/images/{ANNS}/job_1.png",
]


@pytest.mark.parametrize("way", [insert, start])
async def test_picture_of_a_workflow_of_others_is_refused(db: Db, way: Any) -> None:
    for image in WRITTEN:
        with pytest.raises(asyncpg.InvalidParameterValueError) as refused:
            async with signed_in(db, ANN):
                await way(db, ANNS, image)
        assert (refused.value.message, bool(refused.value.hint)) == (REFUSED, True), image
    assert await db.fetchval("select count(*) from runs") == 0


@pytest.mark.parametrize("way", [insert, start])
async def test_picture_of_a_workflow_of_ones_own_is_recorded(db: Db, way: Any) -> None:
    await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", BOBS, ANN)
    for image in WRITTEN:
        async with signed_in(db, ANN):
            run = await way(db, ANNS, image)
        assert await source(db, run) == BOBS, image


@pytest.mark.parametrize(
    "image",
    [
        None,
        "",
        "https://example.com",
        "https://example.com/fox.png",
        f"https://example.com/fox.png?of={OF_BOB}",
        f"https://example.com/fox.png#{OF_BOB}",
        f"{STORAGE}/public/images/a/b.png",
        f"{STORAGE}/public/images/{BOBS}",
        f"{STORAGE}/public/images/%00{BOBS}/b.png",
        f"{STORAGE}/public/images/%{BOBS}%/%zz/%F0%9F%A6%8A.png",
        f"{STORAGE}/public/images/../../..",
        f"{STORAGE}/public/uploads/{ANN}/b.png",
        f"{STORAGE}/info/images/{BOBS}/b.png",
    ],
)
async def test_picture_of_no_workflow_is_not_recorded(db: Db, image: str | None) -> None:
    async with signed_in(db, ANN):
        run = await insert(db, ANNS, image)
    assert await source(db, run) is None


async def test_long_address_is_read_in_time(db: Db) -> None:
    await db.execute("set statement_timeout = '2s'")
    for piece in ("%61", "../", "a/../", "/.", "storage/v1/object/public/."):
        async with signed_in(db, ANN):
            await insert(db, ANNS, "https://example.com/" + piece * (800_000 // len(piece)))


async def test_membership_counts_that_is_held_at_insert(db: Db, daemon: Daemon) -> None:
    await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", BOBS, ANN)
    async with signed_in(db, ANN):
        run = await insert(db, ANNS, OF_BOB)
    await db.execute("delete from workflow_members where workflow_id = $1 and user_id = $2", BOBS, ANN)
    await db.execute("update runs set status = 'cancelled' where id = $1", run)
    async with signed_in(db, ANN):
        await db.fetchval("select requeue_run($1)", run)
    claimed = await daemon.claim_one()
    assert (claimed["created_by"], claimed["source_workflow"]) == (str(ANN), str(BOBS))


async def test_workflow_of_own_picture_may_be_founded_by_the_run(db: Db) -> None:
    workflow = uuid4()
    async with signed_in(db, ANN):
        run = await insert(db, workflow, OF_BOB.replace(str(BOBS), str(workflow)))
    assert await source(db, run) == workflow


async def test_operators_are_not_asked_also_for_a_user(db: Db, daemon: Daemon) -> None:
    async with signed_in(db, role="service_role"):
        for_ann = await insert(db, ANNS, OF_BOB, created_by=ANN)
        for_nobody = await insert(db, ANNS, OF_BOB, source_workflow=ANNS)
    claimed = {run["id"]: (run["created_by"], run["source_workflow"]) for run in await daemon.claim(2)}
    assert claimed == {for_ann: (str(ANN), str(BOBS)), for_nobody: (None, str(BOBS))}


async def test_later_update_by_an_operator_widens_nothing(db: Db, daemon: Daemon) -> None:
    async with signed_in(db, ANN):
        run = await insert(db, ANNS, OF_BOB.replace(str(BOBS), str(ANNS)))
    await db.execute(
        "update runs set source_workflow = $2, metadata = jsonb_set(metadata, '{promptSpec,previousImage}', $3)"
        " where id = $1",
        run,
        BOBS,
        OF_BOB,
    )
    await db.execute("update runs set status = 'pending' where id = $1", run)
    claimed = await daemon.claim_one()
    assert claimed["metadata"]["promptSpec"]["previousImage"] == OF_BOB
    assert claimed["source_workflow"] == str(ANNS)
    assert await event_names(db, run) == ["created", "requeued", "claimed"]
