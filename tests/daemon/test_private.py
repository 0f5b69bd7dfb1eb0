"""A daemon with IMAGE_JOBS_PRIVATE: pictures and sources open for members of their workflow, by the Storage API."""

import time
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from PIL import Image
from storage3 import AsyncStorageClient
from storage3.exceptions import StorageApiError

from tests.fakes.server import picture
from tests.support.daemon_harness import DaemonHarness, open_harness
from tests.support.postgres import Cluster, signed_in, wait_until
from tests.support.storage_project import client

pytestmark = pytest.mark.one_postgres


class Private(DaemonHarness):
    """A project whose pictures are private, with one daemon."""

    async def storage_of(self, http: httpx.AsyncClient, user: UUID | None) -> AsyncStorageClient:
        """Return the client of a user, or of nobody who is signed in."""
        claims = {"role": "authenticated", "sub": str(user), "exp": int(time.time()) + 600}
        token = None if user is None else self.project.keys.sign(claims)
        return await client(self.project.url, self.project.keys.anon_key, http, token)

    async def join(self, workflow: UUID) -> UUID:
        """Return a new member of a workflow."""
        user = uuid4()
        await self.db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", workflow, user)
        return user

    async def refine(self, user: UUID, workflow: UUID, url: str) -> str:
        """Insert a run as a user, that starts from a picture."""
        async with signed_in(self.db, user):
            return await self.db.fetchval(
                "insert into runs (kind, subject_id, status, processor, metadata)"
                " values ('image_gen', $1, 'pending', $2, $3) returning id",
                workflow,
                self.processor,
                {"promptSpec": {"basePrompt": "a red fox", "size": "64x64", "previousImage": url}},
            )


@pytest.fixture(scope="module")
async def private(postgres: Cluster) -> AsyncIterator[Private]:
    async with postgres.database() as dsn, open_harness(Private, dsn) as harness:
        await harness.db.execute("select image_jobs.set_up('images', true)")
        async with harness.run_daemon(IMAGE_JOBS_PRIVATE="1"):
            yield harness


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=20) as one:
        yield one


@pytest.fixture(scope="module")
async def made(private: Private) -> asyncpg.Record:
    """A completed run."""
    return await private.wait_for_status(await private.insert_run(prompt={"size": "64x64"}), "completed")


async def bytes_by_every_way(storage: AsyncStorageClient, http: httpx.AsyncClient, bucket: str, path: str) -> list[Any]:
    """Return what a caller gets of an object: from lists, signatures, downloads, and its plain addresses."""
    of, got = storage.from_(bucket), list[Any]()
    folder = path.partition("/")[0]
    got += [entry["name"] for entry in await of.list(folder)]
    got += [each["signedURL"] for each in await of.create_signed_urls([path], 600) if each["signedURL"]]
    for call in (of.create_signed_url(path, 600), of.download(path), of.info(path), of.copy(path, f"{folder}/x.png")):
        try:
            got.append(await call)
        except StorageApiError:
            continue
    got += [row["name"] for row in await of.remove([path])]
    for way in ("public/", "authenticated/", ""):
        url = f"{storage._base_url}object/{way}{bucket}/{path}"
        if (response := await http.get(url, headers=dict(storage._headers))).is_success:
            got.append(response.content)
    return got


async def test_member_signs_pictures_in_one_call(
    private: Private, http: httpx.AsyncClient, made: asyncpg.Record
) -> None:
    payload = made["payload"]
    assert payload["imageUrl"].startswith(f"{private.project.url}/storage/v1/object/authenticated/images/")
    assert await private.events(made["id"], "warning") == []
    assert not (await http.get(payload["imageUrl"].replace("/authenticated/", "/public/"))).is_success
    storage = await private.storage_of(http, await private.join(made["subject_id"]))
    paths = [payload["imagePath"], payload["thumbnailPath"], f"{uuid4()}/x.png"]
    image, thumbnail, other = await storage.from_("images").create_signed_urls(paths, 600)
    assert other["signedURL"] is None
    assert len((await http.get(image["signedURL"])).content) == payload["bytes"]
    assert (await http.get(thumbnail["signedURL"])).headers["content-type"] == "image/webp"
    headers = dict(storage._headers)
    response = await http.get(payload["imageUrl"], headers=headers)
    assert (response.status_code, len(response.content)) == (200, payload["bytes"])
    assert {part.strip() for part in response.headers["cache-control"].split(",")} == {"private", "max-age=600"}


@pytest.mark.parametrize("who", ["stranger", "former member", "anonymous"])
async def test_others_get_no_byte_of_private_pictures(
    private: Private, http: httpx.AsyncClient, made: asyncpg.Record, who: str
) -> None:
    workflow = made["subject_id"]
    user = None if who == "anonymous" else uuid4()
    member = await private.storage_of(http, await private.join(workflow))
    source = f"{workflow}/{uuid4()}.png"
    await member.from_("image-sources").upload(source, picture(), {"content-type": "image/png"})
    if who == "former member":
        user = await private.join(workflow)
        assert await bytes_by_every_way(
            await private.storage_of(http, user), http, "images", made["payload"]["imagePath"]
        )
        async with signed_in(private.db, user):
            await private.db.execute("select leave_workflow($1)", workflow)
    storage = await private.storage_of(http, user)
    for bucket, path in (("images", made["payload"]["imagePath"]), ("image-sources", source)):
        assert await bytes_by_every_way(storage, http, bucket, path) == []
    with pytest.raises(StorageApiError):
        await storage.from_("image-sources").upload(f"{workflow}/b.png", picture(), {"content-type": "image/png"})
    assert await member.from_("image-sources").download(source) == picture()


async def test_run_starts_from_private_pictures_of_its_user(
    private: Private, http: httpx.AsyncClient, made: asyncpg.Record
) -> None:
    workflow = uuid4()
    user = await private.join(workflow)
    storage = await private.storage_of(http, user)
    source = f"{workflow}/my fox.png"
    await storage.from_("image-sources").upload(source, picture(), {"content-type": "image/png"})
    url = f"{private.project.url}/storage/v1/object/authenticated/image-sources/{source}".replace(" ", "%20")
    first = await private.wait_for_status(await private.refine(user, workflow, url), "completed")
    again = await private.refine(user, workflow, first["payload"]["imageUrl"])
    await private.wait_for_status(again, "completed")
    signed = (await storage.from_("images").create_signed_url(first["payload"]["imagePath"], 600))["signedURL"]
    await private.wait_for_status(await private.refine(user, workflow, signed), "completed")
    for theirs in (made["payload"]["imageUrl"], url):
        stranger = uuid4()
        with pytest.raises(asyncpg.InvalidParameterValueError, match="you are no member of"):
            await private.refine(stranger, uuid4(), theirs)


async def test_sources_take_pictures_and_are_never_replaced(private: Private, http: httpx.AsyncClient) -> None:
    workflow = uuid4()
    of = (await private.storage_of(http, await private.join(workflow))).from_("image-sources")
    path, png = f"{workflow}/a.png", {"content-type": "image/png"}
    await of.upload(path, picture(), png)
    refused: list[tuple[str, bytes, dict[str, str]]] = [
        (path, b"other", png | {"upsert": "true"}),
        (path, b"other", png),
        (f"{workflow}/b.svg", b"<svg/>", {"content-type": "image/svg+xml"}),
        (f"{workflow}/c.png", bytes(20 * 1024**2 + 1), png),
        (f"{str(workflow).upper()}/d.png", picture(), png),
        ("e.png", picture(), png),
    ]
    for name, content, options in refused:
        with pytest.raises(StorageApiError):
            await of.upload(name, content, options)
    assert [entry["name"] for entry in await of.list(str(workflow))] == ["a.png"]
    assert Image.open(BytesIO(await of.download(path))).size
    assert [row["name"] for row in await of.remove([path])] == [path]


async def test_uploads_of_a_forgotten_user_are_removed(private: Private, http: httpx.AsyncClient) -> None:
    shared, own = uuid4(), uuid4()
    user = await private.join(own)
    other = await private.join(shared)
    await private.db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", shared, user)
    png = {"content-type": "image/png"}
    for uploader, path in ((user, f"{own}/a.png"), (user, f"{shared}/b.png"), (other, f"{shared}/c.png")):
        await (await private.storage_of(http, uploader)).from_("image-sources").upload(path, picture(), png)
    await private.db.execute("select image_jobs.forget_user($1)", user)

    async def left() -> list[str] | None:
        if await private.db.fetchval("select count(*) from image_jobs.source_removals"):
            return None
        rows = await private.db.fetch(
            "select name from storage.objects where starts_with(name, $1) or starts_with(name, $2)",
            *map(str, (own, shared)),
        )
        return [row["name"] for row in rows]

    assert await wait_until(left, timeout=40) == [f"{shared}/c.png"]
