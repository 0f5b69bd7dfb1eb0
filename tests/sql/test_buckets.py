"""The buckets: images are public to read, what providers said beside them is nobody's but the daemon's."""

import json

import asyncpg
import pytest

from tests.postgres import signed_in
from tests.runs import WORKFLOW
from tests.sql.protocol import Db

BUCKETS = "select id, public, allowed_mime_types as types from storage.buckets order by id"


async def test_there_is_one_for_images_and_one_that_is_not_public(db: Db) -> None:
    images, contexts = await db.fetch(BUCKETS)
    assert (images["id"], images["public"]) == ("images", True)
    assert all(name.startswith("image/") for name in images["types"])
    assert dict(contexts) == {"id": "images-context", "public": False, "types": ["application/json"]}


async def test_buckets_of_another_name_come_in_pairs_too_and_stay_as_they_are(db: Db) -> None:
    await db.execute("select private.make_bucket('pictures')")
    await db.execute("update storage.buckets set file_size_limit = 1 where id like 'pictures%'")
    await db.execute("select private.make_bucket('pictures')")
    rows = await db.fetch(
        "select id, public, file_size_limit from storage.buckets where id like 'pictures%' order by id"
    )
    assert [tuple(row) for row in rows] == [("pictures", True, 1), ("pictures-context", False, 1)]


@pytest.mark.parametrize("role", ["anon", "authenticated"])
@pytest.mark.parametrize("bucket", ["images", "images-context"])
async def test_no_client_gets_at_objects_of_either_by_way_of_the_tables(
    db: Db, role: str, bucket: str, member: object
) -> None:
    insert = "insert into storage.objects (bucket_id, name, metadata) values ($1, $2, $3)"
    await db.execute(insert, bucket, f"{WORKFLOW}/job_1.json", json.loads("{}"))
    async with signed_in(db, str(member) if role == "authenticated" else None, role):
        assert await db.fetchval("select count(*) from storage.objects") == 0
        assert await db.execute("update storage.objects set name = 'mine'") == "UPDATE 0"
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with signed_in(db, str(member) if role == "authenticated" else None, role):
            await db.execute(insert, bucket, f"{WORKFLOW}/job_2.json", json.loads("{}"))
