"""OpenAI from the row to the image: a real daemon, database and storage, and a fake of the Images API.

Each test checks how the run ends, its events and its node, its cost, and the number of requests.
"""

import asyncio
from uuid import uuid4

import asyncpg
import pytest

from tests.fakes.openai_api import hang, held
from tests.support.daemon_harness import fetch
from tests.support.openai_harness import COST, FLARE, POSSIBLE_COST, OpenAIHarness
from tests.support.postgres import connect, signed_in, wait_until


async def test_run_becomes_an_image_with_cost_model_and_thumbnail(openai: OpenAIHarness) -> None:
    run = await openai.insert_run(prompt={"styleModifiers": ["watercolour"], "size": "1536x1024", "quality": "hd"})
    row = await openai.wait_for_status(run, "completed")

    payload = row["payload"]
    assert payload["cost"] == pytest.approx(COST)
    assert payload["model"] == payload["requestedModel"] == FLARE
    assert (payload["width"], payload["height"], payload["contentType"]) == (1536, 1024, "image/png")
    assert "error" not in payload
    image, thumbnail = await fetch(payload["imageUrl"]), await fetch(payload["thumbnailUrl"])
    assert (image.headers["content-type"], len(image.content)) == ("image/png", payload["bytes"])
    assert thumbnail.headers["content-type"] == "image/webp"

    assert await openai.event_names(run) == ["created", "claimed", "submitted", "generated", "stored", "completed"]
    (submitted,) = await openai.events(run, "submitted")
    (request,) = openai.api.requests
    assert submitted["data"]["request"] == {"endpoint": "images/generations", **request.fields}
    assert request.fields["size"] == "1536x1024"
    assert request.fields["quality"] == "high"
    (generated,) = await openai.events(run, "generated")
    assert generated["data"]["cost"] == pytest.approx(COST)
    assert generated["data"]["request_id"] == "req_1"

    node = await openai.node_data(run)
    assert node["status"] == "completed"
    assert (node["imageUrl"], node["thumbnailUrl"]) == (payload["imageUrl"], payload["thumbnailUrl"])


async def test_node_shows_a_preview_while_the_stream_runs(openai: OpenAIHarness) -> None:
    go = asyncio.Event()
    openai.api.next(held(go))
    run = await openai.insert_run()

    async def shown() -> str | None:
        return (await openai.node_data(run)).get("previewUrl")

    preview = await wait_until(shown)
    assert (await fetch(preview)).headers["content-type"] == "image/webp"
    assert (await openai.node_data(run))["progress"] > 0
    go.set()
    row = await openai.wait_for_status(run, "completed")

    assert "previewUrl" not in await openai.node_data(run)
    assert row["payload"]["cost"] == pytest.approx(COST)
    assert len(openai.api.requests) == 1


async def test_own_image_is_edited(openai: OpenAIHarness) -> None:
    first = await openai.wait_for_status(await openai.insert_run(), "completed")
    url = first["payload"]["imageUrl"]
    run = await openai.insert_run(prompt={"previousImage": url})
    row = await openai.wait_for_status(run, "completed")

    generation, edit = openai.api.requests
    assert (generation.path, edit.path) == ("/v1/images/generations", "/v1/images/edits")
    assert edit.image == (await fetch(url)).content
    assert edit.image_type == "image/png"
    assert row["payload"]["imageUrl"] != url
    assert await openai.event_names(run) == ["created", "claimed", "submitted", "generated", "stored", "completed"]
    (submitted,) = await openai.events(run, "submitted")
    assert submitted["data"]["request"]["image"] == f"image/png, {len(edit.image)} bytes"


async def test_users_run_edits_pictures_that_the_user_may_see(openai: OpenAIHarness) -> None:
    first = await openai.wait_for_status(await openai.insert_run(), "completed")
    theirs = first["payload"]["imageUrl"]
    openai.api.requests.clear()

    async def insert(image: str | None) -> str:
        prompt = {"basePrompt": "a red fox", "previousImage": image}
        async with signed_in(openai.db, user):
            return await openai.db.fetchval(
                "insert into runs (kind, subject_id, status, processor, metadata, due_at)"
                " values ('image_gen', $1, 'pending', $2, $3, now() + interval '1 h') returning id",
                own,
                openai.processor,
                {"promptSpec": prompt},
            )

    user, own = uuid4(), uuid4()
    changed = await insert(None)
    with pytest.raises(asyncpg.InvalidParameterValueError, match="you are no member of"):
        await insert(theirs)
    await openai.db.execute(
        "update runs set metadata = jsonb_set(metadata, '{promptSpec,previousImage}', to_jsonb($2::text)) where id = $1",
        changed,
        theirs,
    )
    await openai.make_due(changed)
    payload = (await openai.wait_for_status(changed, "failed"))["payload"]
    assert payload["code"] == "input_image_forbidden"
    assert "promptSpec.previousImage" in payload["error"]
    assert payload["hint"]
    assert await openai.event_names(changed) == ["created", "claimed", "failed"]
    assert openai.api.requests == []

    await openai.db.execute(
        "insert into workflow_members (workflow_id, user_id) values ($1, $2)", first["subject_id"], user
    )
    seen = await insert(theirs)
    await openai.make_due(seen)
    await openai.wait_for_status(seen, "completed")
    (edit,) = openai.api.requests
    assert edit.image == (await fetch(theirs)).content


@pytest.mark.parametrize(
    "where",
    [
        "https://127.0.0.1/secret.png",
        "https://169.254.169.254/latest/meta-data.png",
        "https://[fd00:ec2::254]/latest/meta-data.png",
        "https://2852039166/latest/meta-data.png",
        "https://localhost/secret.png",
    ],
)
async def test_previous_image_in_our_network_is_refused(openai: OpenAIHarness, where: str) -> None:
    run = await openai.insert_run(prompt={"previousImage": where})
    row = await openai.wait_for_status(run, "failed")

    assert row["payload"]["code"] == "download"
    assert "promptSpec.previousImage" in row["payload"]["error"]
    assert row["payload"]["hint"]
    assert await openai.event_names(run) == ["created", "claimed", "failed"]
    assert openai.api.requests == []


async def test_cancelling_during_the_call_keeps_the_possible_cost(
    openai: OpenAIHarness,
) -> None:
    openai.api.next(hang())
    run = await openai.insert_run()
    await wait_until(lambda: len(openai.api.requests) == 1)
    await openai.cancel(run)
    (unknown,) = await openai.wait_for_event(run, "unknown_outcome")

    assert unknown["data"]["possibleCost"] == pytest.approx(POSSIBLE_COST)
    assert (await openai.wait_for_status(run, "cancelled"))["payload"] is None
    assert await openai.event_names(run) == ["created", "claimed", "submitted", "cancelled", "unknown_outcome"]
    assert (await openai.node_data(run))["status"] == "cancelled"
    assert len(openai.api.requests) == 1


async def test_cancelling_during_the_upload_keeps_the_cost_once(
    openai: OpenAIHarness,
) -> None:
    await openai.db.execute("delete from image_jobs.calls")
    other = await connect(openai.project.dsn)
    async with other.transaction():
        await other.execute("lock table storage.objects in exclusive mode")  # the upload waits for this
        run = await openai.insert_run()
        await openai.wait_for_event(run, "generated")
        await openai.cancel(run)
        await wait_until(lambda: [line for line in openai.daemon.logged("run.finished") if line["run_id"] == run])
    await other.close()

    assert await openai.event_names(run) == ["created", "claimed", "submitted", "generated", "cancelled"]
    costs = await openai.db.fetchrow(
        "select images, cost, possible_cost from image_jobs.run_costs where provider = 'openai'"
    )
    assert (costs["images"], float(costs["cost"]), costs["possible_cost"]) == (1, pytest.approx(COST), None)
    assert len(openai.api.requests) == 1


async def test_image_is_adopted_with_its_cost_after_a_lost_settlement(openai: OpenAIHarness) -> None:
    run = await openai.insert_run()
    first = await openai.wait_for_status(run, "completed")
    await openai.undo_settlement(run)
    row = await openai.wait_for_status(run, "completed")

    assert row["attempt"] == 2
    for name in ("imageUrl", "thumbnailUrl", "width", "height", "bytes", "contentType", "model", "cost"):
        assert row["payload"][name] == first["payload"][name]
    assert (await openai.event_names(run))[-3:] == ["claimed", "adopted", "completed"]
    assert len(openai.api.requests) == 1


async def test_retired_model_is_replaced_and_both_are_named(openai: OpenAIHarness) -> None:
    run = await openai.insert_run("openai:dall-e-3")
    row = await openai.wait_for_status(run, "completed")

    assert row["processor"] == "openai:dall-e-3"
    assert (row["payload"]["requestedModel"], row["payload"]["model"]) == ("dall-e-3", FLARE)
    (warning,) = await openai.events(run, "warning")
    assert warning["message"].startswith(f"dall-e-3 was retired on 2026-05-12; {FLARE} is used instead")
    assert warning["data"] == {"field": "model", "requested": "dall-e-3", "effective": FLARE}
    (request,) = openai.api.requests
    assert request.fields["model"] == FLARE


async def test_unknown_mode_is_a_warning(openai: OpenAIHarness) -> None:
    run = await openai.insert_run(mode="turbo")
    await openai.wait_for_status(run, "completed")

    (warning,) = await openai.events(run, "warning")
    assert warning["message"] == "mode 'turbo' is unknown; the image is made at once."
    assert warning["data"]["field"] == "mode"
    assert [request.path for request in openai.api.requests] == ["/v1/images/generations"]


async def test_failed_download_is_repeated_without_a_new_image(
    openai: OpenAIHarness,
) -> None:
    openai.api.compatible = openai.api.only_urls = True
    openai.api.bad_downloads = 1
    run = await openai.insert_run("openai:flux-dev", prompt={"size": "512x512"})
    row = await openai.wait_for_status(run, "completed")

    payload = row["payload"]
    assert payload["originalUrl"] == f"{openai.api.url}/files/picture.png"
    assert payload["revisedPrompt"] == "As it was drawn"
    assert payload["cost"] is None
    assert (len(openai.api.requests), openai.api.downloads) == (1, 2)
