"""Storing pictures: a worker in this process, a real database and storage, and a provider of the tests."""

import asyncio
import json
import re
import shutil
import ssl
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import anyio
import httpx
import pytest

from daemon.errors import Undecodable
from daemon.providers import Generated, Reporter, Request
from daemon.worker import publisher
from daemon.worker.reporter import RunReporter
from tests.fakes.server import picture
from tests.support.node import run_script
from tests.support.postgres import ROOT, wait_until
from tests.support.runs import WORKFLOW, insert_run, run_row
from tests.support.shop import Draw, Shop, red_fox


async def test_storage_that_stays_away_fails_the_run_with_a_cure(shop: Shop) -> None:
    shop.gate.closed = True
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert (row["status"], row["payload"]["code"]) == ("failed", "storage_unavailable")
    assert "equeue" in row["payload"]["hint"]
    assert row["payload"]["details"]["uploadTries"] == shop.gate.uploads(run) >= 3
    assert shop.painter.calls == 1
    assert (await shop.events(run, "generated"))[0]["data"]["cost"] == pytest.approx(0.05)


async def test_unreadable_picture_fails_the_run_and_keeps_its_cost(shop: Shop) -> None:
    async def vanishes(request: Request, _: Reporter) -> Generated:
        return Generated(request.workdir / "gone", 0.05)

    shop.painter.draw = vanishes
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert (row["status"], row["payload"]["code"]) == ("failed", "storage_disk")
    assert "then requeue" in row["payload"]["hint"]
    assert row["payload"]["details"] == {"errno": "ENOENT"}
    assert (await shop.events(run, "generated"))[0]["data"]["cost"] == pytest.approx(0.05)
    assert shop.painter.calls == 1


async def half_a_picture(request: Request, _: Reporter) -> Generated:
    """Draw a file that breaks off."""
    path = request.workdir / "half"
    path.write_bytes(picture()[:60])
    return Generated(path, 0.05)


async def undecodable(request: Request, _: Reporter) -> Generated:
    """Return what a provider's code could not decode."""
    path = request.workdir / "response"
    path.write_bytes(picture()[:60])
    raise Undecodable("The picture cannot be read.", path, cost=0.05)


@pytest.mark.parametrize("bucket", ["there", "missing"])
@pytest.mark.parametrize("draw", [half_a_picture, undecodable])
async def test_undecodable_picture_is_kept_as_it_came(shop: Shop, tmp_path: Path, draw: Draw, bucket: str) -> None:
    if bucket == "missing":
        async with shop.db.transaction():
            await shop.db.execute("select set_config('storage.allow_delete_query', 'true', true)")
            await shop.db.execute("delete from storage.buckets where id = 'images-kept'")
    shop.painter.draw = draw
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert (row["status"], row["payload"]["code"]) == ("failed", "undecodable")
    assert row["payload"]["hint"]
    (event,) = await shop.events(run, "kept")
    bucket_of, _, key = event["data"]["keptPath"].partition("/")
    assert bucket_of == "images-kept"
    assert key.startswith(f"{row['subject_id']}/{run}-{row['claim']}")
    await shop.kept.download(key, tmp_path / "back", max_bytes=1000)
    assert (tmp_path / "back").read_bytes() == picture()[:60]
    assert not await shop.db.fetchval("select public from storage.buckets where id = 'images-kept'")
    assert shop.painter.calls == 1


async def test_undecodable_picture_that_cannot_be_kept_is_told(shop: Shop) -> None:
    shop.painter.draw = half_a_picture
    shop.gate.closed_for = "/images-kept/"
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert (row["status"], row["payload"]["code"]) == ("failed", "undecodable")
    (event,) = await shop.events(run, "incident")
    assert "could not be kept" in event["message"]


async def test_missing_thumbnail_is_a_warning(shop: Shop) -> None:
    async def in_the_way(request: Request, report: Reporter) -> Generated:
        (request.workdir / "thumbnail.webp").mkdir()
        return await red_fox(request, report)

    shop.painter.draw = in_the_way
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert row["status"] == "completed"
    assert row["payload"]["imageUrl"]
    assert row["payload"]["thumbnailUrl"] is None
    (warning,) = await shop.events(run, "warning")
    assert "no thumbnail" in warning["message"]
    assert warning["data"]["field"] == "thumbnailUrl"


async def stored_control(shop: Shop, run: str) -> str:
    metadata = await shop.db.fetchval("select metadata from storage.objects where name like $1", f"%/{run}.png")
    return metadata["cacheControl"]


async def test_private_bucket_is_not_asked_for_a_public_picture(shop: Shop) -> None:
    await shop.db.execute("update storage.buckets set public = false where id = 'images'")
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert row["status"] == "completed"
    for name, end in (("image", ".png"), ("thumbnail", ".thumb.webp")):
        path = row["payload"][f"{name}Path"]
        assert path == f"{row['subject_id']}/{run}{end}"
        assert f"/storage/v1/object/authenticated/images/{path}?v=" in row["payload"][f"{name}Url"]
    assert await shop.events(run, "warning") == []
    assert not any("/object/public/" in path for _, path in shop.gate.requests)
    assert await stored_control(shop, run) == "max-age=600, private"


async def test_bucket_made_private_meanwhile_is_noticed(shop: Shop) -> None:
    first = await insert_run(shop.db)
    assert "/object/public/" in (await shop.ended(first))["payload"]["imageUrl"]
    assert await stored_control(shop, first) == "max-age=31536000"
    await shop.db.execute("update storage.buckets set public = false where id = 'images'")
    second = await insert_run(shop.db)
    assert "/object/authenticated/" in (await shop.ended(second))["payload"]["imageUrl"]
    assert await shop.events(second, "warning") == []


@pytest.mark.parametrize(
    "error", [ssl.SSLError(1, "[SSL] record layer failure"), anyio.EndOfStream(), RuntimeError("a bug")], ids=repr
)
async def test_trouble_after_the_upload_fails_no_picture(
    shop: Shop, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The HTTP library lets these through as they are."""
    send = httpx.AsyncHTTPTransport.handle_async_request

    async def broken(transport: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        if "/object/public/" in request.url.path or "/bucket/" in request.url.path:
            raise type(error)(*error.args)  # anew: each one's traceback grows with every raise
        return await send(transport, request)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", broken)
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert (row["status"], row["payload"].get("code")) == ("completed", None)
    (warning,) = await shop.events(run, "warning")
    assert warning["message"] == "The public URL does not answer yet."
    assert warning["data"]["imageUrl"] == row["payload"]["imageUrl"]


class Odd:
    """A path that a bug of ours meets."""

    def __fspath__(self) -> str:
        raise RuntimeError


async def test_bug_beside_a_picture_is_a_warning(shop: Shop) -> None:
    async def odd(request: Request, report: Reporter) -> Generated:
        made: Any = await red_fox(request, report)
        return replace(made, conversation=Odd(), extra=(Odd(),))

    shop.painter.draw = odd
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert (row["status"], row["payload"].get("images")) == ("completed", None)
    warnings = await shop.events(run, "warning")
    assert {it["data"]["field"] for it in warnings} == {"context", "images"}
    assert all("Something went wrong inside the daemon." in it["message"] for it in warnings)


async def test_unreadable_further_pictures_are_a_warning(shop: Shop) -> None:
    async def one_of_two(request: Request, report: Reporter) -> Generated:
        made = await red_fox(request, report)
        return Generated(made.path, 0.05, extra=(request.workdir / "gone", made.path))

    shop.painter.draw = one_of_two
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert row["status"] == "completed"
    (path,) = row["payload"]["imagePaths"]
    assert [url.partition("?")[0].endswith(f"/{path}") for url in row["payload"]["images"]] == [True]
    assert await shop.db.fetchval("select count(*) from storage.objects where bucket_id = 'images' and name = $1", path)
    assert [warning["data"]["field"] for warning in await shop.events(run, "warning")] == ["images"]


async def test_further_private_pictures_are_signed_for_members(shop: Shop, tmp_path: Path) -> None:
    """By the code that the canvas README gives to clients."""

    async def three(request: Request, report: Reporter) -> Generated:
        made = await red_fox(request, report)
        return Generated(made.path, 0.05, extra=(made.path, made.path))

    shop.painter.draw = three
    await shop.db.execute("update storage.buckets set public = false where id = 'images'")
    row = await shop.ended(await insert_run(shop.db))
    payload = row["payload"]
    assert ["/object/authenticated/" in url for url in payload["images"]] == [True, True]
    member, stranger = uuid4(), uuid4()
    await shop.db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", WORKFLOW, member)
    (snippet,) = re.findall(
        r"```ts\n([^`]*export async function sign\(.*?)```",
        (ROOT / "daemon/dev/canvas/README.md").read_text(),
        re.DOTALL,
    )
    sign = tmp_path / "sign.ts"
    sign.write_text(snippet)
    keys = shop.project.keys
    tokens = [
        keys.sign({"role": "authenticated", "sub": str(user), "exp": int(time.time()) + 600})
        for user in (member, stranger)
    ]
    statuses = await run_script(
        Path(__file__).with_name("further_pictures.mjs"),
        SIGN=str(sign),
        URL=shop.project.url,
        KEY=keys.anon_key,
        TOKENS=json.dumps(tokens),
        PATHS=json.dumps([payload["imagePath"], *payload["imagePaths"]]),
    )
    assert statuses == [[200, 200, 200], [None, None, None]]


async def test_preview_whose_upload_hangs_is_given_up(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "PREVIEW_SECONDS", 0.5)
    took: list[float] = []

    async def forming(request: Request, report: Reporter) -> Generated:
        preview = request.workdir / "preview"
        preview.write_bytes(picture())
        shop.gate.held["POST"] = asyncio.Event()
        started = time.monotonic()
        report.preview(preview)
        await cast("RunReporter", report).shown()
        took.append(time.monotonic() - started)
        shop.gate.held.pop("POST").set()
        return await red_fox(request, report)

    shop.painter.draw = forming
    run = await insert_run(shop.db)
    assert (await shop.ended(run))["status"] == "completed"
    assert took[0] < 10


@pytest.mark.parametrize("content", [b"no picture", None])
async def test_broken_preview_is_left_out(shop: Shop, content: bytes | None) -> None:
    async def forming(request: Request, report: Reporter) -> Generated:
        preview = request.workdir / "preview"
        if content is not None:
            preview.write_bytes(content)
        report.preview(preview)
        await asyncio.sleep(0)
        return await red_fox(request, report)

    shop.painter.draw = forming
    run = await insert_run(shop.db)
    assert (await shop.ended(run))["status"] == "completed"


async def test_vanished_workdir_costs_no_outcome(shop: Shop, tmp_path: Path) -> None:
    async def cleared_away(request: Request, report: Reporter) -> Generated:
        made = await red_fox(request, report)
        moved = Path(shutil.move(request.workdir, tmp_path / "moved"))
        return Generated(moved / made.path.name, 0.05)

    shop.painter.draw = cleared_away
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert row["status"] == "completed"


async def test_adoption_without_storage_costs_no_attempt(shop: Shop) -> None:
    shop.gate.closed = True
    async with shop.db.transaction():
        run = await insert_run(shop.db)
        await shop.db.execute("select set_config('image_jobs.writer', 'daemon', true)")
        await shop.db.execute("update runs set attempt = 1 where id = $1", run)

    async def put_off() -> bool:
        return bool(await shop.events(run, "retry"))

    await wait_until(put_off)
    assert (await run_row(shop.db, run))["attempt"] == 1
    assert shop.painter.calls == 0
    shop.gate.closed = False
    row = await shop.ended(run)
    assert (row["status"], row["attempt"], shop.painter.calls) == ("completed", 2, 1)


async def test_public_metadata_names_the_call_but_no_prompt(shop: Shop) -> None:
    said = "Ein Fuchs im Schnee: ❄\x00 " * 5000

    async def worded_anew(request: Request, report: Reporter) -> Generated:
        made = await red_fox(request, report)
        return Generated(made.path, 0.05, revised_prompt=said)

    shop.painter.draw = worded_anew
    run = await insert_run(shop.db)
    row = await shop.ended(run)
    assert row["payload"]["revisedPrompt"] == said.replace("\x00", "")
    public = await shop.db.fetchval("select user_metadata from storage.objects where name like $1", f"%/{run}.png")
    assert set(public) == {"image_jobs", "request", "ticket", "call", "cost", "sha256", "width", "height", "extra"}
    assert public["image_jobs"] == run
    (call,) = await shop.db.fetch("select id, cost from image_jobs.calls")
    assert (public["call"], float(public["cost"])) == (str(call["id"]), pytest.approx(float(call["cost"])))


async def with_conversation(request: Request, report: Reporter) -> Generated:
    """Draw, with a conversation."""
    made = await red_fox(request, report)
    conversation = request.workdir / "conversation.json"
    conversation.write_text('{"said": "a fox"}')
    return Generated(made.path, 0.05, conversation=conversation)


async def test_conversation_is_passed_to_the_next_refinement(shop: Shop) -> None:
    shop.painter.draw = with_conversation
    first = await shop.ended(await insert_run(shop.db))
    again = await insert_run(shop.db, prompt={"previousImage": first["payload"]["imageUrl"]})
    assert (await shop.ended(again))["status"] == "completed"
    assert shop.painter.heard == b'{"said": "a fox"}'


@pytest.mark.parametrize("why", ["it is away", "there is too much"])
async def test_unavailable_conversation_is_a_warning(shop: Shop, why: str) -> None:
    shop.painter.draw = with_conversation
    first = await shop.ended(await insert_run(shop.db))
    if why == "it is away":
        shop.gate.closed_for = "/images-context/"
    else:
        shop.painter.max_conversation_bytes = 3
    shop.painter.draw = red_fox
    again = await insert_run(shop.db, prompt={"previousImage": first["payload"]["imageUrl"]})
    assert (await shop.ended(again))["status"] == "completed"
    assert shop.painter.heard is None
    (warning,) = await shop.events(again, "warning")
    assert warning["data"]["field"] == "previousImage"


async def test_conversation_refused_by_storage_is_a_warning(shop: Shop) -> None:
    shop.painter.draw = with_conversation
    shop.gate.closed_for = "/images-context/"
    run = await insert_run(shop.db)
    assert (await shop.ended(run))["status"] == "completed"
    (warning,) = await shop.events(run, "warning")
    assert warning["data"]["field"] == "context"
