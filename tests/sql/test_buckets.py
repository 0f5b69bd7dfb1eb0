"""The buckets: images are public to read, what lies in those beside them is not; clients write into that of sources only."""

import json

import asyncpg
import pytest

from tests.support.postgres import signed_in
from tests.support.protocol import Db
from tests.support.runs import WORKFLOW

pytestmark = pytest.mark.every_postgres

BUCKETS = "select id, public, allowed_mime_types as types from storage.buckets order by id"


async def test_there_are_a_public_and_three_private_buckets(db: Db) -> None:
    sources, images, conversations, kept = await db.fetch(BUCKETS)
    assert dict(sources) == {
        "id": "image-sources",
        "public": False,
        "types": ["image/png", "image/jpeg", "image/webp"],
    }
    assert await db.fetchval("select file_size_limit from storage.buckets where id = 'image-sources'") == 20 * 1024**2
    assert (images["id"], images["public"]) == ("images", True)
    assert all(name.startswith("image/") for name in images["types"])
    assert dict(conversations) == {"id": "images-context", "public": False, "types": ["application/json"]}
    assert dict(kept) == {"id": "images-kept", "public": False, "types": None}
    assert await db.fetchval("select file_size_limit from storage.buckets where id = 'images-kept'") == 50 * 1024**2


async def test_buckets_of_another_name_belong_together_and_stay(db: Db) -> None:
    await db.execute("select image_jobs.set_up('pictures')")
    await db.execute("update storage.buckets set file_size_limit = 1 where id like 'pictures%'")
    await db.execute("select image_jobs.set_up('pictures')")
    rows = await db.fetch(
        "select id, public, file_size_limit from storage.buckets where id like 'pictures%' order by id"
    )
    assert [tuple(row) for row in rows] == [
        ("pictures", True, 1),
        ("pictures-context", False, 1),
        ("pictures-kept", False, 1),
    ]


@pytest.mark.parametrize("role", ["anon", "authenticated"])
@pytest.mark.parametrize("bucket", ["images", "images-context", "images-kept"])
async def test_clients_write_no_objects_by_the_storage_tables(db: Db, role: str, bucket: str, member: object) -> None:
    insert = "insert into storage.objects (bucket_id, name, metadata) values ($1, $2, $3)"
    await db.execute(insert, bucket, f"{WORKFLOW}/job_1.json", json.loads("{}"))
    async with signed_in(db, str(member) if role == "authenticated" else None, role):
        seen = role == "authenticated" and bucket == "images"
        assert await db.fetchval("select count(*) from storage.objects") == seen
        assert await db.execute("update storage.objects set name = 'mine'") == "UPDATE 0"
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with signed_in(db, str(member) if role == "authenticated" else None, role):
            await db.execute(insert, bucket, f"{WORKFLOW}/job_2.json", json.loads("{}"))
