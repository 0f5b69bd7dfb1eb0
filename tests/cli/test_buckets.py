"""The two buckets as an operator meets them: `doctor` looks at both, `migrate` makes what is missing."""

from pathlib import Path

import asyncpg
import pytest

from tests.commands import ImageJobs
from tests.daemons import supabase

GONE = "Run image-jobs migrate."


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("select", ("ok", "images and images-context", "")),
        ("update storage.buckets set public = true", ("info", "images-context is public", "Make it private")),
        ("delete from storage.buckets where not public", ("info", "images-context is missing", GONE)),
        ("delete from storage.buckets where public", ("problem", "'images' does not exist", GONE)),
    ],
)
async def test_doctor_looks_at_both_buckets_and_migrate_makes_them_again(
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
        assert await db.fetchval("select count(*) from storage.buckets") == 2
