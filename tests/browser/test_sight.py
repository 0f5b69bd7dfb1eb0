"""The eye at the canvas: nothing covers a button, frames keep their shape, every script is read and saved."""

import re
from contextlib import suppress
from typing import Any
from uuid import UUID, uuid4

import pytest
from playwright.async_api import TimeoutError as Late
from playwright.async_api import expect

from tests.support.window import Window, put

pytestmark = [pytest.mark.timeout(150), pytest.mark.one_postgres]

Open = Any

COVERED = """() => { const covers = [...document.querySelectorAll(".toast, .react-flow__minimap")].map(it => it.getBoundingClientRect());
  return [...document.querySelectorAll(".image-node :is(button, textarea), .header button, .bar button")]
    .filter(it => !it.matches(".image-node-open")).filter(it => { const at = it.getBoundingClientRect();
      return at.width > 0 && covers.some(box => at.left < box.right && box.left < at.right && at.top < box.bottom && box.top < at.bottom); })
    .map(it => it.textContent); }"""
"""The buttons that a toast or the minimap lies over."""

CLEAR = f"""() => {{ const isClear = document.querySelector(".react-flow__minimap") !== null && ({COVERED})().length === 0;
  window.clearSince = isClear ? (window.clearSince ?? performance.now()) : undefined;
  return isClear && performance.now() - window.clearSince > 500; }}"""
"""Whether the minimap has been there for half a second, and covers no button: it moves once the canvas has come to rest."""

SCREENS = [pytest.param(1440, 900, id="1440"), pytest.param(390, 844, id="390")]


@pytest.mark.parametrize(("width", "height"), SCREENS)
async def test_equal_failures_are_one_toast_that_covers_no_button(
    url: str, open_window: Open, db: Any, width: int, height: int
) -> None:
    window: Window = await open_window(f"{url}#{uuid4()}", viewport={"width": width, "height": height})
    await put(db, window.workflow, *(f"A dragon, number {number}" for number in range(10)), refuse="No dragons here.")
    await window.page.reload()
    await window.connected()
    await window.button("Generate all").click()
    await expect(window.toast.locator(".toast-count")).to_have_text(re.compile("^10 "), timeout=40_000)
    await expect(window.toast).to_have_count(1)
    await expect(window.toast).to_contain_text("No dragons here.")
    assert await window.page.evaluate(COVERED) == []
    await window.keep_screenshot(f"equal-failures-{width}")


async def test_the_minimap_is_there_when_needed_and_covers_no_button(window: Window, db: Any) -> None:
    await put(db, window.workflow, *(f"Island number {number}" for number in range(18)))
    await window.page.reload()
    await window.connected()
    overview = window.page.locator(".react-flow__minimap")
    await expect(overview).to_have_count(0)  # all is seen
    await window.page.mouse.move(720, 400)
    for _ in range(3):
        await window.page.mouse.wheel(0, -240)
    await window.page.keyboard.down("Space")  # to drag the canvas, wherever nodes lie
    for step in range(8):
        with suppress(Late):
            await window.page.wait_for_function(CLEAR, timeout=3_000)
            break
        await window.page.mouse.move(720, 400)
        await window.page.mouse.down()
        await window.page.mouse.move(620 - 10 * step, 340, steps=4)
        await window.page.mouse.up()
    await window.page.keyboard.up("Space")
    await window.page.wait_for_function(CLEAR)
    await window.keep_screenshot("overview")


async def test_a_frame_keeps_the_shape_of_its_picture(window: Window, db: Any) -> None:
    await put(db, window.workflow, "A castle")
    await window.page.reload()
    await window.connected()
    node = window.node("A castle")
    await node.get_by_role("button", name="Generate").click()
    await window.has_image(node)
    frame = node.locator(".image-node-frame")

    async def ratio() -> float:
        box = await frame.bounding_box()
        assert box is not None
        return round(box["width"] / box["height"], 2)

    assert await ratio() == 1
    await node.get_by_role("button", name="Model and settings").click()
    await node.get_by_label("Shape").select_option("ratio 16:9")
    await expect(node.get_by_label("Shape")).to_have_value("ratio 16:9")
    assert await ratio() == 1  # nothing of it is cut off
    await node.get_by_role("button", name="Regenerate").click()
    await expect(frame).to_have_css("aspect-ratio", re.compile(r"1\.7"), timeout=40_000)


async def test_prompts_of_every_script_are_read_and_name_downloads(window: Window, db: Any) -> None:
    arabic, japanese = "ثعلب أحمر في غابة ثلجية", "雪の森の赤い狐 / 朝の光"
    await put(db, window.workflow, arabic, japanese)
    await window.page.reload()
    await window.connected()
    await window.button("Generate all").click()
    await window.counts(2, "ready")
    direction = "it => getComputedStyle(it).direction"
    assert await window.node(arabic).get_by_label("Prompt").evaluate(direction) == "rtl"
    assert await window.node(japanese).get_by_label("Prompt").evaluate(direction) == "ltr"
    names: set[str] = set()
    for prompt in (arabic, japanese):
        await window.node(prompt).get_by_role("button", name="Show at full size").dispatch_event("click")
        box = window.page.get_by_role("dialog")
        await expect(box.locator(".facts")).to_contain_text("free")
        if prompt == arabic:
            left = "it => { const text = new Range(); text.selectNodeContents(it); return text.getBoundingClientRect().left; }"
            starts = [await box.locator(each).evaluate(left) for each in ("figcaption [dir=auto]", ".facts")]
            assert abs(starts[0] - starts[1]) < 2  # one block, also in a wide window
            await window.keep_screenshot("right-to-left")
        async with window.page.expect_download() as download:
            await box.get_by_role("link", name="Download").click()
        names.add((await download.value).suggested_filename)
        await window.page.keyboard.press("Escape")
    assert names == {"ثعلب-أحمر-في-غابة-ثلجية.png", "雪の森の赤い狐-朝の光.png"}


async def test_nothing_moves_for_who_asked_for_less_motion(url: str, open_window: Open, db: Any) -> None:
    window: Window = await open_window(f"{url}#{uuid4()}", reduced_motion="reduce")
    await put(db, window.workflow, "A castle", hang=True)
    await window.page.reload()
    await window.connected()
    await window.button("Generate").first.click()
    await expect(window.page.get_by_role("progressbar")).to_be_visible(timeout=20_000)
    moving = """document.getAnimations().filter(it => it.effect.getComputedTiming().duration > 0).map(it => it.effect.target?.className)"""
    assert await window.page.evaluate(moving) == []
    await window.button("Cancel, picture 1").click()
    await expect(window.node("A castle")).to_have_attribute("data-status", "cancelled", timeout=20_000)
    assert await db.fetchval("select count(*) from runs where subject_id = $1", UUID(window.workflow)) == 1
