"""OpenAI from the row to the picture: a real daemon, database and storage, and a fake of the Images API.

Each test says how the run ends, what its events and its node tell, what it cost, and how many requests were made.
"""

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import httpx
import pytest

from daemon.providers.openai_models import estimate
from tests.fakes.openai_api import KEY, OpenAIAPI, cut, error_event, hang, held, moderation, status
from tests.openai_studio import FLARE, Studio, open_studio
from tests.postgres import Cluster, connect, wait_until
from tests.runs import insert_run

COST = (13 * 5 + (196 + 2 * 100) * 30) / 1e6
"""USD of what the fake counts: the prompt, the picture and two previews."""
POSSIBLE_COST = estimate(FLARE, (1024, 1024), "medium", previews=2)


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[OpenAIAPI]:
    async with OpenAIAPI() as api:
        yield api


@pytest.fixture(scope="module")
async def shared(postgres: Cluster, server: OpenAIAPI) -> AsyncIterator[Studio]:
    async with postgres.database() as dsn, open_studio(dsn, server) as studio:
        yield studio


@pytest.fixture
async def studio(shared: Studio) -> Studio:
    """One daemon for all of these tests; the API is as new, and nothing is blocked."""
    shared.api.reset()
    await shared.db.execute("delete from provider_limits where model is not null")
    await shared.db.execute("update provider_limits set blocked_until = null, per_minute = null")
    return shared


async def test_a_run_becomes_a_picture_with_its_cost_model_and_thumbnail(studio: Studio) -> None:
    run = await studio.order(styleModifiers=["watercolour"], size="1536x1024", quality="hd")
    row = await studio.until(run, "completed")

    payload = row["payload"]
    assert payload["cost"] == pytest.approx(COST)
    assert payload["model"] == payload["requestedModel"] == FLARE
    assert (payload["width"], payload["height"], payload["contentType"]) == (1536, 1024, "image/png")
    assert "error" not in payload
    async with httpx.AsyncClient() as client:
        picture = await client.get(payload["imageUrl"])
        thumbnail = await client.get(payload["thumbnailUrl"])
    assert (picture.headers["content-type"], len(picture.content)) == ("image/png", payload["bytes"])
    assert thumbnail.headers["content-type"] == "image/webp"

    assert await studio.story(run) == ["created", "claimed", "submitted", "generated", "stored", "completed"]
    (submitted,) = await studio.events(run, "submitted")
    (request,) = studio.api.requests
    assert submitted["data"]["request"] == {"endpoint": "images/generations", **request.fields}
    assert request.fields["size"] == "1536x1024"
    assert request.fields["quality"] == "high"
    (generated,) = await studio.events(run, "generated")
    assert generated["data"]["cost"] == pytest.approx(COST)
    assert generated["data"]["request_id"] == "req_1"

    node = await studio.node(run)
    assert node["status"] == "completed"
    assert (node["imageUrl"], node["thumbnailUrl"]) == (payload["imageUrl"], payload["thumbnailUrl"])


async def test_the_node_shows_a_preview_while_the_stream_goes_on(studio: Studio) -> None:
    go = asyncio.Event()
    studio.api.next(held(go))
    run = await studio.order()

    async def shown() -> str | None:
        return (await studio.node(run)).get("previewUrl")

    preview = await wait_until(shown)
    async with httpx.AsyncClient() as client:
        assert (await client.get(preview)).headers["content-type"] == "image/webp"
    assert (await studio.node(run))["progress"] > 0
    go.set()
    row = await studio.until(run, "completed")

    assert "previewUrl" not in await studio.node(run)
    assert row["payload"]["cost"] == pytest.approx(COST)
    assert len(studio.api.requests) == 1


async def test_a_picture_of_our_own_is_edited(studio: Studio) -> None:
    first = await studio.until(await studio.order(), "completed")
    url = first["payload"]["imageUrl"]
    run = await studio.order(previousImage=url)
    row = await studio.until(run, "completed")

    generation, edit = studio.api.requests
    assert (generation.path, edit.path) == ("/v1/images/generations", "/v1/images/edits")
    async with httpx.AsyncClient() as client:
        assert edit.image == (await client.get(url)).content
    assert edit.image_type == "image/png"
    assert row["payload"]["imageUrl"] != url
    assert await studio.story(run) == ["created", "claimed", "submitted", "generated", "stored", "completed"]
    (submitted,) = await studio.events(run, "submitted")
    assert submitted["data"]["request"]["image"] == f"image/png, {len(edit.image)} bytes"


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
async def test_a_previous_image_inside_our_network_is_refused_before_anything_is_sent(
    studio: Studio, where: str
) -> None:
    run = await studio.order(previousImage=where)
    row = await studio.until(run, "failed")

    assert row["payload"]["code"] == "download"
    assert "promptSpec.previousImage" in row["payload"]["error"]
    assert row["payload"]["hint"]
    assert await studio.story(run) == ["created", "claimed", "failed"]
    assert studio.api.requests == []


async def test_a_refused_prompt_is_final_and_says_why(studio: Studio) -> None:
    studio.api.next(status(400, **moderation("input", "violence", "self-harm")))
    run = await studio.order()
    row = await studio.until(run, "failed")

    payload = row["payload"]
    assert payload["code"] == "content_policy"
    assert payload["error"] == "OpenAI refused the prompt (violence, self-harm)."
    assert payload["hint"] == "Rephrase the prompt."
    assert payload["details"]["categories"] == ["violence", "self-harm"]
    assert row["attempt"] == 1
    assert await studio.story(run) == ["created", "claimed", "submitted", "failed"]
    node = await studio.node(run)
    assert (node["status"], node["error"]) == ("error", payload["error"])
    assert len(studio.api.requests) == 1


async def test_a_refused_picture_is_final_although_previews_were_seen(studio: Studio) -> None:
    studio.api.next(error_event(moderation("output", "sexual"), after=2))
    run = await studio.order()
    row = await studio.until(run, "failed")

    assert row["payload"]["code"] == "content_policy"
    assert row["payload"]["details"]["stage"] == "output"
    node = await studio.node(run)
    assert node["status"] == "error"
    assert "previewUrl" not in node
    assert len(studio.api.requests) == 1


async def test_without_credit_every_run_of_the_provider_waits_and_loses_no_attempt(studio: Studio) -> None:
    studio.api.next(status(429, "insufficient_quota", type="insufficient_quota"))
    run = await studio.order()
    row = await studio.put_off(run)

    assert row["attempt"] == 0
    (retry,) = await studio.events(run, "retry")
    assert retry["data"]["code"] == "billing"
    assert "Add credit" in retry["data"]["hint"]
    assert await studio.blocked() == {("openai", None): pytest.approx(600, abs=30)}
    node = await studio.node(run)
    assert node["status"] == "pending"
    assert "out of credit" in node["message"]

    waiting = await studio.order("gpt-image-2")
    demo = await insert_run(studio.db, demo={"noop": True})
    await studio.until(demo, "completed")
    assert await studio.story(waiting) == ["created"]
    assert len(studio.api.requests) == 1

    await studio.hurry(run)
    assert (await studio.until(run, "completed"))["attempt"] == 1
    await studio.until(waiting, "completed")
    assert len(studio.api.requests) == 3


async def test_a_rate_limit_with_a_wait_closes_the_model_for_everybody_until_then(studio: Studio) -> None:
    studio.api.next(status(429, "rate_limit_exceeded", headers={"retry-after": "90"}))
    run = await studio.order()
    row = await studio.put_off(run)

    assert row["attempt"] == 0
    assert (row["due_at"] - row["updated_at"]).total_seconds() == pytest.approx(90, abs=5)
    assert await studio.blocked() == {("openai", FLARE): pytest.approx(90, abs=5)}
    (retry,) = await studio.events(run, "retry")
    assert retry["data"]["code"] == "rate_limited"

    same = await studio.order()
    other = await studio.order("gpt-image-2")
    await studio.until(other, "completed")
    assert await studio.story(same) == ["created"]
    assert [request.fields["model"] for request in studio.api.requests] == [FLARE, "gpt-image-2"]

    await studio.hurry(run)
    assert (await studio.until(run, "completed"))["attempt"] == 1
    await studio.until(same, "completed")
    assert len(studio.api.requests) == 4


async def test_a_rate_limit_without_a_wait_puts_off_that_run_alone(studio: Studio) -> None:
    studio.api.next(status(429, "rate_limit_exceeded"))
    run = await studio.order()
    row = await studio.put_off(run)

    assert row["attempt"] == 0
    assert await studio.blocked() == {}
    await studio.until(await studio.order(), "completed")

    await studio.hurry(run)
    row = await studio.until(run, "completed")
    assert row["attempt"] == 1
    assert "unknown_outcome" not in await studio.story(run)
    assert len(studio.api.requests) == 3


async def test_after_a_server_error_the_next_attempt_succeeds(studio: Studio) -> None:
    studio.api.next(status(503, "server_error", message=f"Overloaded while serving {KEY}."))
    run = await studio.order()
    await studio.put_off(run)
    await studio.hurry(run)
    row = await studio.until(run, "completed")

    assert row["attempt"] == 2
    assert row["payload"]["cost"] == pytest.approx(COST)
    (retry,) = await studio.events(run, "retry")
    assert retry["message"] == "OpenAI had a problem (503): Overloaded while serving ***."
    assert retry["data"]["code"] == "provider_unavailable"
    assert await studio.story(run) == [
        *("created", "claimed", "submitted", "retry"),
        *("claimed", "submitted", "generated", "stored", "completed"),
    ]
    assert len(studio.api.requests) == 2


async def test_a_stream_that_breaks_has_an_unknown_outcome_and_a_possible_cost(studio: Studio) -> None:
    studio.api.next(cut(after=1))
    run = await studio.order()
    await studio.put_off(run)
    await studio.hurry(run)
    row = await studio.until(run, "completed")

    assert row["attempt"] == 2
    (unknown,) = await studio.events(run, "unknown_outcome")
    assert unknown["kind"] == "error"
    assert unknown["data"]["possibleCost"] == pytest.approx(POSSIBLE_COST)
    story = await studio.story(run)
    assert story[:5] == ["created", "claimed", "submitted", "unknown_outcome", "retry"]
    assert story.count("generated") == 1
    assert "previewUrl" not in await studio.node(run)
    assert len(studio.api.requests) == 2


async def test_a_stream_that_breaks_each_time_ends_as_unknown_after_the_last_attempt(studio: Studio) -> None:
    studio.api.next(cut(after=0), cut(after=0), cut(after=0))
    run = await studio.order()
    for times in (1, 2):
        await studio.put_off(run, times)
        await studio.hurry(run)
    row = await studio.until(run, "failed")

    assert row["payload"]["code"] == "outcome_unknown"
    assert row["payload"]["attempts"] == 3
    assert row["payload"]["hint"]
    assert len(await studio.events(run, "unknown_outcome")) == 3
    assert await studio.pictures(run) == 0
    assert len(studio.api.requests) == 3


async def test_a_run_that_is_cancelled_in_mid_call_stays_cancelled_and_its_possible_cost_is_kept(
    studio: Studio,
) -> None:
    studio.api.next(hang())
    run = await studio.order()
    await wait_until(lambda: len(studio.api.requests) == 1)
    await studio.db.execute("update runs set status = 'cancelled' where id = $1", run)
    (unknown,) = await wait_until(lambda: studio.events(run, "unknown_outcome"))

    assert unknown["data"]["possibleCost"] == pytest.approx(POSSIBLE_COST)
    assert (await studio.until(run, "cancelled"))["payload"] is None
    assert await studio.story(run) == ["created", "claimed", "submitted", "cancelled", "unknown_outcome"]
    assert (await studio.node(run))["status"] == "cancelled"
    assert len(studio.api.requests) == 1


async def test_a_run_that_is_cancelled_while_its_picture_is_stored_has_cost_what_it_cost_and_once(
    studio: Studio,
) -> None:
    await studio.db.execute("delete from run_events")
    other = await connect(studio.project.dsn)
    async with other.transaction():
        await other.execute("lock table storage.objects in exclusive mode")  # the upload waits for this
        run = await studio.order()
        await wait_until(lambda: studio.events(run, "generated"))
        await studio.db.execute("update runs set status = 'cancelled' where id = $1", run)
        await wait_until(lambda: [line for line in studio.daemon.logged("run.finished") if line["run_id"] == run])
    await other.close()

    assert await studio.story(run) == ["created", "claimed", "submitted", "generated", "cancelled"]
    costs = await studio.db.fetchrow("select images, cost, possible_cost from run_costs where provider = 'openai'")
    assert (costs["images"], float(costs["cost"]), costs["possible_cost"]) == (1, pytest.approx(COST), None)
    assert len(studio.api.requests) == 1


async def test_a_picture_whose_settlement_was_lost_is_adopted_with_its_cost_and_not_made_again(studio: Studio) -> None:
    run = await studio.order()
    first = await studio.until(run, "completed")
    async with studio.db.transaction():
        # As a take-over leaves it that came between the upload and the settlement.
        await studio.db.execute("select set_config('image_jobs.hand', 'daemon', true)")
        await studio.db.execute(
            """update runs set status = 'pending', payload = null, finished_at = null, due_at = now(), rank = 0
            where id = $1""",
            run,
        )
    row = await studio.until(run, "completed")

    assert row["attempt"] == 2
    for name in ("imageUrl", "thumbnailUrl", "width", "height", "bytes", "contentType", "model", "cost"):
        assert row["payload"][name] == first["payload"][name]
    assert (await studio.story(run))[-3:] == ["claimed", "adopted", "completed"]
    assert len(studio.api.requests) == 1


async def test_a_retired_model_is_replaced_by_its_successor_and_both_are_named(studio: Studio) -> None:
    run = await studio.order("dall-e-3")
    row = await studio.until(run, "completed")

    assert row["processor"] == "openai:dall-e-3"
    assert (row["payload"]["requestedModel"], row["payload"]["model"]) == ("dall-e-3", FLARE)
    (warning,) = await studio.events(run, "warning")
    assert warning["message"].startswith(f"dall-e-3 was retired on 2026-05-12; {FLARE} is used instead")
    assert warning["data"] == {"field": "model", "requested": "dall-e-3", "effective": FLARE}
    (request,) = studio.api.requests
    assert request.fields["model"] == FLARE


async def test_a_mode_that_nobody_knows_is_warned_of_and_the_image_is_made_at_once(studio: Studio) -> None:
    run = await insert_run(studio.db, processor=f"openai:{FLARE}", workflow=uuid4(), mode="turbo")
    await studio.until(run, "completed")

    (warning,) = await studio.events(run, "warning")
    assert warning["message"] == "mode 'turbo' is unknown; the image is made at once."
    assert warning["data"]["field"] == "mode"
    assert [request.path for request in studio.api.requests] == ["/v1/images/generations"]


async def test_a_picture_that_a_compatible_server_points_to_is_fetched_again_but_not_made_again(
    studio: Studio,
) -> None:
    studio.api.compatible = studio.api.answer_with_url = True
    studio.api.bad_downloads = 1
    run = await studio.order("flux-dev", size="512x512")
    row = await studio.until(run, "completed")

    payload = row["payload"]
    assert payload["originalUrl"] == f"{studio.api.url}/files/picture.png"
    assert payload["revisedPrompt"] == "As it was drawn"
    assert payload["cost"] is None
    assert (len(studio.api.requests), studio.api.downloads) == (1, 2)
