"""The Storage stand-in: ranges, downloads, lists, policies, and files that must not stay."""

from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest
from storage3.exceptions import StorageApiError

from daemon.dev.supabase.keys import Keys
from tests.support.postgres import Cluster, wait_until
from tests.support.storage_project import SECRET, Replay, abort, png, running


@pytest.fixture
def keys() -> Keys:
    return Keys(SECRET, anon_key="sb_publishable_test", service_role_key="sb_secret_test")


@pytest.fixture
async def project(postgres: Cluster) -> AsyncIterator["asyncpg.Pool[asyncpg.Record]"]:
    """Connect to a database without our schema."""
    async with postgres.database(template=None) as dsn, asyncpg.create_pool(dsn, min_size=1, max_size=4) as pool:
        yield pool


@pytest.fixture
async def replay(project: "asyncpg.Pool[asyncpg.Record]", tmp_path: Path, keys: Keys) -> AsyncIterator[Replay]:
    async with running(project, tmp_path / "files", keys) as one:
        yield one


@pytest.mark.parametrize(
    ("method", "path"),
    [  # None of the recorded cases needs these.
        ("POST", "/upload/resumable"),
        ("PATCH", "/object/outputs/a.png"),
        ("GET", "/s3/outputs"),
        ("POST", "/object/list-v2/outputs"),
    ],
)
async def test_missing_features_return_501(replay: Replay, method: str, path: str) -> None:
    response = await replay.raw(method, path, b"{}", content_type="application/json")
    assert response.status_code == 501
    assert response.json()["error"] == "NotImplemented"
    assert response.json()["message"].startswith("image-jobs dev does not have ")


async def test_without_a_key_only_public_urls_work(replay: Replay) -> None:
    response = await replay.get("/bucket")
    assert response.json()["message"] == "headers must have required property 'authorization'"


async def test_a_range_is_a_part_of_the_file(replay: Replay) -> None:
    await replay.put("outputs", "digits", b"0123456789")
    for asked, part in {"bytes=2-4": "234", "bytes=7-": "789", "bytes=-3": "789", "bytes=8-99": "89"}.items():
        response = await replay.get("/object/public/outputs/digits", range=asked)
        assert (response.status_code, response.text) == (206, part)
        assert response.headers["content-range"].endswith("/10")


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("fox.png", "attachment; filename=fox.png; filename*=UTF-8''fox.png"),
        ("red fox.png", "attachment; filename=\"red fox.png\"; filename*=UTF-8''red%20fox.png"),
        ("it's (1).png", "attachment; filename=\"it's (1).png\"; filename*=UTF-8''it%27s%20%281%29.png"),
        ("狐.png", "attachment; filename=_.png; filename*=UTF-8''%E7%8B%90.png"),
    ],
)
async def test_a_download_has_its_file_name(replay: Replay, name: str, header: str) -> None:
    await replay.put("outputs", "a.png", b"1")
    response = await replay.get(f"/object/public/outputs/a.png?download={quote(name)}")
    assert response.headers["content-disposition"] == header


async def test_an_object_is_sent_again_only_if_it_has_changed(replay: Replay) -> None:
    await replay.put("outputs", "a.png", b"1")
    first = await replay.get("/object/public/outputs/a.png")
    for since, status in (
        (first.headers["last-modified"], 304),
        ("Mon, 23 Nov 2099 14:18:42 GMT", 304),
        ("Mon, 23 Nov 2020 14:18:42 GMT", 200),
        ("yesterday", 200),
    ):
        response = await replay.get("/object/public/outputs/a.png", **{"if-modified-since": since})
        assert response.status_code == status, since
    both = {"if-none-match": '"another"', "if-modified-since": "Mon, 23 Nov 2099 14:18:42 GMT"}
    assert (await replay.get("/object/public/outputs/a.png", **both)).status_code == 200


async def test_a_private_object_without_a_key_looks_missing(replay: Replay) -> None:
    await replay.put("private", "a.png", b"1")
    await replay.put("outputs", "a.png", b"1")
    for headers in ({}, {"authorization": "Bearer garbage"}):
        response = await replay.get("/object/private/a.png", **headers)
        assert (response.status_code, response.json()["code"]) == (400, "NoSuchBucket")
        assert (await replay.get("/object/outputs/a.png", **headers)).content == b"1"
    response = await replay.get("/object/authenticated/private/a.png")
    assert response.json()["message"] == "headers must have required property 'authorization'"


async def test_signing_in_a_missing_bucket_finds_no_object(replay: Replay) -> None:
    with pytest.raises(StorageApiError, match="Object not found"):
        await replay.service.from_("nowhere").create_signed_url("a.png", 60)


async def test_a_signed_address_without_its_token_says_so(replay: Replay) -> None:
    response = await replay.get("/object/sign/outputs/a.png")
    message = "querystring must have required property 'token'"
    assert response.status_code == 400
    assert response.json() == {"statusCode": "400", "error": "Error", "message": message, "code": "InvalidRequest"}


async def test_transformations_are_off_as_on_a_free_project(replay: Replay) -> None:
    response = await replay.get("/render/image/public/outputs/a.png?width=100")
    message = "Route GET:/render/image/public/outputs/a.png?width=100 not found"
    assert response.status_code == 404
    assert response.json() == {"statusCode": "404", "error": "Not Found", "message": message}


async def test_a_folder_is_listed_page_by_page(replay: Replay) -> None:
    for key in ("f/a", "f/b/1", "f/b/2", "f/c", "g"):
        await replay.put("outputs", key, b"1")
    page = await replay.outputs.list_v2({"prefix": "f/", "limit": 2, "with_delimiter": True})
    assert ([each.key for each in page.objects], [each.name for each in page.folders]) == (["a"], ["f/b/"])
    page = await replay.outputs.list_v2({"prefix": "f/", "limit": 2, "with_delimiter": True, "cursor": page.nextCursor})
    assert ([each.key for each in page.objects], page.hasNext) == (["c"], False)
    assert [each["name"] for each in await replay.outputs.list()] == ["f", "g"]
    newest = {"limit": 1, "sortBy": {"column": "created_at", "order": "desc"}}
    assert [each["name"] for each in await replay.outputs.list("f", newest)] == ["c"]


async def test_no_file_is_left_of_aborted_or_removed_uploads(
    replay: Replay, project: "asyncpg.Pool[asyncpg.Record]", tmp_path: Path
) -> None:
    def files() -> int:
        return sum(path.is_file() for path in (tmp_path / "files").rglob("*"))

    await abort(replay)
    with pytest.raises(StorageApiError):
        await replay.put("limited", "a.gif", png(1000), **{"content-type": "image/gif"})
    await wait_until(lambda: files() == 0)
    await replay.put("outputs", "a.png", png(1000))
    await replay.put("outputs", "a.png", png(2000), upsert="true")
    assert files() == 1
    await replay.outputs.remove(["a.png"])
    assert files() == 0
    assert await project.fetchval("select count(*) from storage.objects") == 0


async def test_policies_of_the_database_apply(replay: Replay, project: "asyncpg.Pool[asyncpg.Record]") -> None:
    await project.execute(
        """create policy "own folder" on storage.objects to authenticated
        using (bucket_id = 'private') with check (bucket_id = 'private' and (storage.foldername(name))[1] = 'mine')"""
    )
    mine = replay.user.from_("private")
    await mine.upload("mine/a.png", b"1", {"content-type": "image/png"})
    assert await mine.download("mine/a.png") == b"1"
    with pytest.raises(StorageApiError, match="row-level security"):
        await mine.upload("yours/a.png", b"1", {"content-type": "image/png"})
    with pytest.raises(StorageApiError, match="Object not found"):
        await replay.anon.from_("private").download("mine/a.png")
