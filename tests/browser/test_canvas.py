"""The canvas as its user sees it: generating, failures, edits, several windows, full size, settings."""

import json
import re
from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import httpx
import pytest
from playwright.async_api import expect

from daemon.providers import models
from tests.support.postgres import wait_until
from tests.support.window import difference, put

pytestmark = pytest.mark.timeout(150)

Open = Any


async def fetch(address: str) -> bytes:
    async with httpx.AsyncClient() as client:
        return (await client.get(address)).raise_for_status().content


async def test_the_first_visit_shows_an_image(url, open_window: Open):
    window = await open_window(url.removesuffix("/canvas"))  # the root redirects to the canvas
    node = window.node("A red fox in a birch wood")
    await window.has_image(node)
    await window.connected()
    await window.counts(1, "ready")
    await window.keep_screenshot("first-visit")


async def test_an_empty_canvas_asks_for_a_prompt(window):
    await window.keep_screenshot("empty")
    await window.page.get_by_label("Prompt").fill("A quiet harbour in the fog")
    await window.page.keyboard.press("Enter")
    node = window.node("A quiet harbour in the fog")
    await expect(node.get_by_role("progressbar")).to_be_visible(timeout=4_000)  # the first member joins at once
    await window.has_image(node)


async def test_progress_grows_and_the_shown_image_is_the_stored_one(window):
    node = await window.add("A lighthouse at dusk")
    bars: list[int] = []

    def note(percent: int) -> None:
        bars.append(percent)

    await window.page.expose_function("bar", note)
    await window.page.evaluate("""() => new MutationObserver(() => {
        const bar = document.querySelector("[role=progressbar]");
        if (bar) window.bar(Number(bar.getAttribute("aria-valuenow")));
    }).observe(document.body, {subtree: true, childList: true, attributes: true})""")
    await window.page.keyboard.press("Control+Enter")
    thumbnail = await window.has_image(node)
    assert bars == sorted(bars)
    assert any(0 < each < 100 for each in bars)

    await window.button("Show at full size").first.dispatch_event("click")
    picture = window.page.locator(".lightbox img")
    await expect(picture).to_be_visible()
    await wait_until(lambda: picture.evaluate("image => image.complete && image.naturalWidth === 1024"))
    await picture.evaluate("image => { image.style.cssText = 'animation: none; border-radius: 0; box-shadow: none' }")
    stored = await fetch(str(await picture.get_attribute("src")))
    assert difference(await picture.screenshot(), stored) < 4
    assert difference(await fetch(thumbnail), stored) < 8


async def test_twelve_images_at_once(window, db):
    await put(db, window.workflow, *(f"Island number {number}" for number in range(12)), slow=2)
    await window.page.reload()
    await window.counts(0, "ready")
    await window.button("Generate all").click()
    await expect(window.page.locator("[data-forming=true][data-loaded=true]").first).to_be_visible(timeout=30_000)
    await window.keep_screenshot("twelve-under-way")
    await window.counts(12, "ready")
    for number in range(12):
        await window.has_image(window.page.locator(".image-node").nth(number))
    assert await db.fetchval("select count(*) from runs where subject_id = $1", window.workflow) == 12
    await window.keep_screenshot("twelve")


async def test_previews_are_shown_while_the_image_forms(window, db):
    await put(db, window.workflow, "Mountains under a green aurora", slow=5)
    await window.page.reload()
    node = window.node("Mountains under a green aurora")
    await node.get_by_role("button", name="Generate").click()
    preview = node.locator(".image-node-picture[data-forming=true][data-loaded=true]")
    await expect(preview.first).to_be_visible(timeout=20_000)
    assert ".preview." in str(await preview.first.get_attribute("src"))
    bar = node.get_by_role("progressbar")
    assert 0 < int(str(await bar.get_attribute("aria-valuenow"))) < 100
    await expect(node.get_by_role("status")).to_have_text(re.compile(r"Painting · \d+%"))
    await window.keep_screenshot("forming")
    assert ".thumb." in await window.has_image(node)


async def test_a_failure_shows_its_reason_and_can_be_retried(window, db):
    await put(db, window.workflow, "A dragon over the village", refuse="The painter does not paint dragons.")
    await window.page.reload()
    node = window.node("A dragon over the village")
    await node.get_by_role("button", name="Generate").click()
    await expect(node).to_have_attribute("data-status", "error", timeout=20_000)
    await expect(node).to_contain_text("The painter does not paint dragons.")
    await expect(node).to_contain_text("Rephrase the prompt.")
    await expect(window.toast).to_contain_text("The painter does not paint dragons.")
    await window.counts(1, "failed")
    await window.keep_screenshot("failure")

    await db.execute("update runs set metadata = metadata - 'demo' where subject_id = $1", window.workflow)
    await node.get_by_role("button", name="Retry").click()
    await window.has_image(node)
    assert await db.fetchval("select count(*) from runs where subject_id = $1", window.workflow) == 1


async def test_a_refused_insert_is_shown_in_a_toast(window, db):
    await put(db, window.workflow, "A field")
    await db.execute(
        'update workflow_nodes set node_data = node_data || \'{"model": "a b"}\' where workflow_id = $1',
        window.workflow,
    )
    await window.page.reload()
    await window.button("Generate").first.click()
    await expect(window.toast).to_contain_text("processor must name a provider and a model.")
    window.console_errors.clear()  # the browser's own line about the status 400


async def test_the_wait_for_a_retry_counts_down(window, db):
    await put(db, window.workflow, "Snow on the pass", throttle=4, times=1)
    await window.page.reload()
    node = window.node("Snow on the pass")
    await node.get_by_role("button", name="Generate").click()
    await expect(node).to_contain_text("The painter asks us to slow down. Trying again in 3 s.", timeout=10_000)
    await window.keep_screenshot("waiting")
    await expect(node).to_contain_text("Trying again in 1 s.")
    await window.has_image(node)


async def test_a_hanging_run_can_be_cancelled(window, db):
    await put(db, window.workflow, "A wait without end", hang=True)
    await window.page.reload()
    node = window.node("A wait without end")
    await node.get_by_role("button", name="Generate").click()
    await expect(node).to_have_attribute("data-status", "running", timeout=10_000)
    await node.get_by_role("button", name="Cancel").click()
    await expect(node.get_by_role("status")).to_have_text("Cancelled", timeout=10_000)
    await expect(node.get_by_role("button", name="Generate")).to_be_enabled()
    assert await db.fetchval("select status from runs where subject_id = $1", window.workflow) == "cancelled"


async def test_two_windows_show_the_same(url, window, open_window: Open, db):
    await put(db, window.workflow, "A bridge")
    await window.page.reload()
    await window.connected()
    other = await open_window(f"{url}#{window.workflow}")
    await other.connected()
    added = await window.add("A boat under the bridge")
    there = other.node("A boat under the bridge")
    await expect(there).to_be_visible()
    await window.page.keyboard.press("Control+Enter")
    assert await window.has_image(added) == await other.has_image(there)

    place = await there.bounding_box()
    await window.drag(added.locator(".image-node-frame"), (1000, 720))
    await wait_until(lambda: moved(there, place))


async def moved(node: Any, before: Any) -> bool:
    now = await node.bounding_box()
    return abs(now["x"] - before["x"]) > 20 or abs(now["y"] - before["y"]) > 20


async def test_dragging_writes_the_position_alone(window, db):
    await put(db, window.workflow, "A windmill", slow=3)
    await window.page.reload()
    node = window.node("A windmill")
    await node.get_by_role("button", name="Generate").click()
    await expect(node).to_have_attribute("data-status", "running")
    await window.drag(node.locator(".image-node-frame"), (400, 500))
    place = "select position from workflow_nodes where workflow_id = $1"
    await wait_until(lambda: settled(db, place, window.workflow))
    image = await window.has_image(node)
    data = await db.fetchval("select node_data from workflow_nodes where workflow_id = $1", window.workflow)
    assert (data["status"], data["thumbnailUrl"]) == ("completed", image)


async def settled(db: Any, query: str, workflow: str) -> bool:
    return (await db.fetchval(query, workflow)) != {"x": 0, "y": 0}


async def test_a_non_member_sees_nothing_and_can_change_nothing(url, window, open_window: Open, db):
    await put(db, window.workflow, "Something private")
    stranger = await open_window(f"{url}?as={uuid4()}#{window.workflow}")
    await expect(stranger.page.get_by_role("heading", name="You have no access to this canvas.")).to_be_visible()
    await expect(stranger.page.locator(".connection")).to_have_text("No access")
    await expect(stranger.page.get_by_label("Prompt")).to_have_count(0)
    await expect(stranger.button("Share")).to_have_count(0)
    await expect(stranger.page.get_by_role("button", name="New", exact=True)).to_have_count(0)
    await stranger.page.keyboard.press("n")
    await expect(stranger.nodes).to_have_count(0)
    assert await db.fetchval("select count(*) from workflow_nodes where workflow_id = $1", window.workflow) == 1
    assert await db.fetchval("select count(*) from runs where subject_id = $1", window.workflow) == 0
    stranger.console_errors.clear()  # the browser's own lines about the status 403


async def test_reloading_during_a_run_loses_nothing(window, db):
    await put(db, window.workflow, "A long road", slow=4)
    await window.page.reload()
    await window.button("Generate").first.click()
    await expect(window.page.get_by_role("progressbar")).to_be_visible(timeout=10_000)
    await window.page.reload()
    await expect(window.page.get_by_role("progressbar")).to_be_visible()
    await window.has_image(window.node("A long road"))


async def test_deleting_a_node_can_be_undone(window, db):
    await put(db, window.workflow, "A pier")
    await window.page.reload()
    node = window.node("A pier")
    await node.get_by_role("button", name="Generate").click()
    image = await window.has_image(node)
    await node.locator("..").click(position={"x": 4, "y": 4})
    await window.page.keyboard.press("Delete")
    await expect(node).to_have_count(0)
    await wait_until(lambda: deleted(db, window.workflow))
    await window.button("Undo").click()
    assert await window.has_image(node) == image
    await window.page.reload()
    assert await window.has_image(node) == image


async def deleted(db: Any, workflow: str) -> bool:
    return await db.fetchval("select not exists (select from workflow_nodes where workflow_id = $1)", workflow)


async def test_full_size_shows_facts_a_download_and_the_next_one(window, db):
    await put(db, window.workflow, "A castle", "A cottage")
    await window.page.reload()
    await window.button("Generate all").click()
    await window.counts(2, "ready")
    await window.button("Show at full size").first.dispatch_event("click")
    box = window.page.get_by_role("dialog")
    await expect(box.locator(".facts")).to_contain_text(re.compile("512 . 512"))
    await expect(box.locator(".facts")).to_contain_text("free")
    first = str(await box.locator("img").get_attribute("src"))
    link = str(await box.get_by_role("link", name="Download").get_attribute("href"))
    assert parse_qs(urlsplit(link).query)["download"][0].endswith(".png")
    async with window.page.expect_download() as download:
        await box.get_by_role("link", name="Download").click()
    assert (await download.value).suggested_filename in ("a-castle.png", "a-cottage.png")
    await window.keep_screenshot("full-size")
    await window.page.keyboard.press("ArrowRight")
    await expect(box.locator("img")).not_to_have_attribute("src", first)
    await window.page.keyboard.press("Escape")
    await expect(box).to_have_count(0)


async def test_every_setting_of_the_model_reaches_the_run(window, db):
    node = await window.add("A tower")
    await node.get_by_role("button", name="Model and settings").click()
    await expect(node.get_by_label("Model", exact=True)).to_contain_text("painter · free · 2 s")
    await node.get_by_label("Shape").select_option("ratio 16:9")
    await node.get_by_label("Seed").fill("7")
    await node.get_by_label("Without").fill("people")
    await window.keep_screenshot("settings")
    await node.get_by_role("button", name="Generate").click()
    await window.has_image(node)
    spec = await db.fetchval("select metadata -> 'promptSpec' from runs where subject_id = $1", window.workflow)
    assert spec == {"basePrompt": "A tower", "aspectRatio": "16:9", "seed": 7, "negativePrompt": "people"}


async def test_settings_offer_only_features_of_the_model(window, db):
    """Models of other providers are published here without a key for them."""
    for name in ("openai", "google"):
        offered = [{"provider": name, "model": each.name, **asdict(each)} for each in models(name)]
        await db.execute(
            "select image_jobs.publish_models($1, $2::text::jsonb)", name, json.dumps(offered, default=str)
        )
    await window.page.reload()
    node = await window.add("A tower")
    await node.get_by_role("button", name="Model and settings").click()
    model, quality = node.get_by_label("Model", exact=True), node.get_by_label("Quality")
    assert "imagen-4.0-generate-001" not in await model.inner_text()  # retired

    await model.select_option("openai:gpt-image-2.5-flare")
    await expect(quality.locator("option")).to_have_text(["Low", "Standard", "High", "Very high", "Highest"])
    await expect(node.get_by_label("Seed")).to_have_count(0)
    await quality.select_option("max")
    await window.keep_screenshot("qualities")
    await model.select_option("openai:gpt-image-2")  # has no such quality: back to the usual one
    await expect(quality.locator("option")).to_have_text(["Low", "Standard", "High"])
    await expect(quality).to_have_value("standard")

    await quality.select_option("hd")
    await model.select_option("google:gemini-3-pro-image")
    await expect(quality.locator("option")).to_have_text(["Standard", "High"])
    await expect(quality).to_have_value("hd")
    shapes = await node.get_by_label("Shape").locator("option").all_inner_texts()
    assert "16:9" in shapes
    assert "2K" not in shapes
    await model.select_option("demo:painter")
    await expect(quality).to_have_count(0)
    await expect(node.get_by_label("Seed")).to_be_visible()

    await model.select_option("google:gemini-3-pro-image")
    await quality.select_option("hd")
    await node.get_by_role("button", name="Generate").click()
    query = "select metadata #>> '{promptSpec,quality}' from runs where subject_id = $1"
    assert await wait_until(lambda: db.fetchval(query, window.workflow)) == "hd"
    await db.execute("delete from image_jobs.models where provider <> 'demo'")


async def test_the_theme_follows_the_system_until_one_is_chosen(url, open_window: Open):
    window = await open_window(f"{url}#{uuid4()}", color_scheme="dark")
    page = window.page.locator("html")
    await expect(page).to_have_css("color-scheme", "dark")
    await window.button("Switch to light").click()
    await expect(page).to_have_css("color-scheme", "light")
    await window.page.reload()
    await expect(page).to_have_css("color-scheme", "light")
