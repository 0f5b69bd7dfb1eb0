"""The buckets: `doctor` checks them, `migrate` creates the missing ones."""

from pathlib import Path

import asyncpg
import pytest

from tests.support.commands import ImageJobs
from tests.support.daemons import supabase

CURE = "Run image-jobs migrate."


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("select", ("ok", "images, images-context and images-kept", "")),
        ("update storage.buckets set public = true", ("info", "images-context is public", "Make it private")),
        (
            "update storage.buckets set public = id <> 'images-context'",
            ("info", "images-kept is public", "Make it private"),
        ),
        ("delete from storage.buckets where id = 'images-kept'", ("info", "images-kept is missing", CURE)),
        ("delete from storage.buckets where id = 'images-context'", ("info", "images-context is missing", CURE)),
        ("delete from storage.buckets where public", ("problem", "'images' does not exist", CURE)),
    ],
)
async def test_doctor_checks_both_buckets_and_migrate_creates_them(
    database: str, db: "asyncpg.Connection[asyncpg.Record]", tmp_path: Path, change: str, found: tuple[str, str, str]
) -> None:
    image_jobs = ImageJobs(tmp_path)
    async with supabase(database) as project:
        async with db.transaction():
            await db.execute("select set_config('storage.allow_delete_query', 'true', true)")
            await db.execute(change)
        done = await image_jobs("doctor", "--json", **project.environment())
        (finding,) = [finding for finding in done.json if finding["name"] == "storage"]
        state, said, cure = found
        assert finding["state"] == state
        assert said in finding["message"]
        assert cure in finding["cure"]
        await image_jobs("migrate", DATABASE_URL=database)
        assert await db.fetchval("select count(*) from storage.buckets") == 3
