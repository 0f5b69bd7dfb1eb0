"""The buckets: `doctor` checks them, `migrate` creates the missing ones."""

from pathlib import Path

import asyncpg
import pytest

from tests.support.commands import ImageJobs
from tests.support.daemons import supabase

CURE = "Run image-jobs migrate."
PUBLIC = "update storage.buckets set public = true where id"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("select", ("ok", "images is public", "")),
        (f"{PUBLIC} = 'images-context'", ("info", "images-context is public", "Make it private")),
        (f"{PUBLIC} = 'images-kept'", ("info", "images-kept is public", "Make it private")),
        (f"{PUBLIC} = 'image-sources'", ("problem", "image-sources is public", "Make it private")),
        ("delete from storage.buckets where id = 'images-kept'", ("info", "images-kept is missing", CURE)),
        ("delete from storage.buckets where id = 'images-context'", ("info", "images-context is missing", CURE)),
        ("delete from storage.buckets where id = 'image-sources'", ("info", "image-sources is missing", CURE)),
        ("delete from storage.buckets where public", ("problem", "'images' does not exist", CURE)),
    ],
)
async def test_doctor_checks_the_buckets_and_migrate_creates_them(
    database: str, db: "asyncpg.Connection[asyncpg.Record]", tmp_path: Path, change: str, found: tuple[str, str, str]
) -> None:
    image_jobs = ImageJobs(tmp_path)
    async with supabase(database) as project:
        async with db.transaction():
            await db.execute("select set_config('storage.allow_delete_query', 'true', true)")
            await db.execute(change)
        done = await image_jobs("doctor", "--json", **project.environment())
        finding = [finding for finding in done.json if finding["name"] == "storage"][-1]
        state, said, cure = found
        assert finding["state"] == state
        assert said in finding["message"]
        assert cure in finding["cure"]
        await image_jobs("migrate", DATABASE_URL=database)
        assert await db.fetchval("select count(*) from storage.buckets") == 4


async def test_doctor_says_the_mode_and_migrate_makes_it_private(
    database: str, db: "asyncpg.Connection[asyncpg.Record]", tmp_path: Path
) -> None:
    image_jobs = ImageJobs(tmp_path)

    async def found(**environment: str) -> dict[str, tuple[str, str]]:
        done = await image_jobs("doctor", "--json", **project.environment(**environment))
        about = [each for each in done.json if each["name"] in {"storage", "set-up"}]
        return {each["name"]: (each["state"], each["message"]) for each in about}

    private = {"IMAGE_JOBS_PRIVATE": "1"}
    async with supabase(database) as project:
        state, message = (await found(**private))["storage"]
        assert (state, "but the bucket images is public" in message) == ("problem", True)
        await image_jobs("migrate", DATABASE_URL=database, **private)
        state, message = (await found(**private))["storage"]
        assert (state, "images is private" in message) == ("ok", True)
        state, message = (await found())["storage"]
        assert (state, "though IMAGE_JOBS_PRIVATE is not set" in message) == ("info", True)
        await db.execute('drop policy "Members see the pictures of their workflows" on storage.objects')
        state, message = (await found(**private))["set-up"]
        assert (state, "members see no private pictures" in message) == ("problem", True)
