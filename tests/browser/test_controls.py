"""Controls of the canvas: nodes in sight, the keyboard alone, and fingers."""

from typing import Any
from uuid import uuid4

import pytest
from playwright.async_api import Locator, Page, expect

from tests.support.postgres import wait_until
from tests.support.window import Window, put

pytestmark = [pytest.mark.timeout(150), pytest.mark.one_postgres]

Open = Any
Box = dict[str, float]

DESK = {"viewport": {"width": 1440, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}

SMALL = """minimum => [...document.querySelectorAll("button, a[href], select, input, textarea")].filter(it => {
  const {width, height} = it.getBoundingClientRect();
  return width > 0 && !it.closest(".react-flow__minimap") && (height < minimum - 0.5 || width < minimum - 0.5);
}).map(it => `${it.className} ${it.textContent} ${JSON.stringify(it.getBoundingClientRect())}`)"""
REACH = """handle => { const {x, y, width, height} = handle.getBoundingClientRect();
  return [[-15, 0], [15, 0], [0, -15], [0, 15]].every(([right, down]) =>
    document.elementFromPoint(x + width / 2 + right, y + height / 2 + down) === handle); }"""
"""Whether a handle is hit by who misses its middle by 15 pixels."""


async def box_of(what: Locator) -> Box:
    box = await what.bounding_box()
    assert box is not None
    return dict(box)


def overlap(one: Box, other: Box) -> bool:
    return (
        one["x"] < other["x"] + other["width"]
        and other["x"] < one["x"] + one["width"]
        and one["y"] < other["y"] + other["height"]
        and other["y"] < one["y"] + one["height"]
    )


async def tapped(page: Page, what: Locator) -> None:
    """Tap the picture of a node, where no button lies."""
    box = await box_of(what)
    await page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + 50)


@pytest.mark.parametrize("screen", [pytest.param(DESK, id="1440"), pytest.param(PHONE, id="390")])
async def test_every_new_node_is_in_sight_and_over_no_other(
    url: str, open_window: Open, screen: dict[str, Any]
) -> None:
    window: Window = await open_window(f"{url}#{uuid4()}", reduced_motion="reduce", **screen)
    await window.connected_or_new()
    for number in range(1, 8):
        await window.page.get_by_role("button", name="New", exact=True).click()
        await expect(window.nodes).to_have_count(number)
        written = window.page.locator(".image-node:has(.image-node-prompt:focus)")
        await expect(written).to_be_in_viewport(ratio=1)
        await window.page.keyboard.type(f"Island {number}")
        pane, node = await box_of(window.page.locator(".pane")), await box_of(written)
        assert node["y"] >= pane["y"]
        assert node["y"] + node["height"] <= pane["y"] + pane["height"] + 1
        boxes = [await box_of(each) for each in await window.nodes.all()]
        assert not any(overlap(node, each) for each in boxes if each != node)
    await window.keep_screenshot(f"new-nodes-{screen['viewport']['width']}")


async def use_settings_and_canvases_by_keys(window: Window, night: Locator) -> None:
    """Choose another shape, and name the canvas. The focus is on the last button of the second picture."""
    page, press = window.page, window.page.keyboard.press
    await press("Shift+Tab")
    await press("Enter")
    await press("Tab")
    await press("Tab")
    await expect(night.get_by_role("combobox", name="Model picture 2")).to_be_focused()
    await press("Tab")
    shape = night.get_by_role("combobox", name="Shape picture 2")
    await expect(shape).to_be_focused()
    before = await shape.input_value()
    await press("ArrowDown")
    await expect(shape).not_to_have_value(before)

    while not await page.evaluate("document.activeElement.matches('.brand')"):
        await press("Shift+Tab")
    await press("Enter")
    await press("Tab")
    await expect(page.get_by_label("Name of this canvas")).to_be_focused()
    await page.keyboard.type("Castles")
    await press("Enter")
    await expect(page.locator(".canvases-open").first).to_have_text("Castles", timeout=20_000)
    await press("Tab")
    await expect(page.locator(".canvases-open:focus")).to_have_text("Castles")
    await press("Delete")
    await press("Escape")
    await expect(page.get_by_role("button", name="Castles: your canvases")).to_be_focused()
    await expect(window.nodes).to_have_count(2)


async def test_a_picture_is_made_refined_and_opened_by_keys(window: Window, db: Any) -> None:
    page, press = window.page, window.page.keyboard.press
    await window.connected_or_new()
    await page.keyboard.type("A castle")
    await press("Enter")
    await window.has_image(window.node("A castle"))
    await page.locator("body").press("Tab")
    while not await page.evaluate("document.activeElement.matches('.react-flow__node')"):
        await press("Tab")

    await press("r")
    await expect(page.get_by_placeholder("What should change?")).to_be_focused()
    await page.keyboard.type("Now at night")
    await press("Control+Enter")
    night = window.node("Now at night")
    await window.has_image(night)
    query = "select count(*) from runs where subject_id = $1 and metadata #>> '{promptSpec,previousImage}' is not null"
    assert await db.fetchval(query, window.workflow) == 1
    await expect(page.get_by_role("group", name="Now at night starts from A castle")).to_be_attached()

    await press("Escape")  # from the prompt to its node
    await expect(page.locator(".react-flow__node:focus")).to_have_count(1)
    await press("o")
    await expect(page.get_by_role("dialog")).to_be_visible()
    await press("Delete")  # of nothing behind it
    await press("ArrowRight")
    await press("Escape")
    await expect(page.get_by_role("dialog")).to_have_count(0)
    await expect(page.locator(".react-flow__node:focus")).to_have_count(1)
    seen: list[str] = []
    for _ in range(5):
        await press("Tab")
        seen.append(
            await page.evaluate(
                "document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent"
            )
        )
    assert [each.split(":")[0] for each in seen] == [
        "Show at full size, picture 2", "Refine picture 2", "Prompt of picture 2", "Model and settings, picture 2",
        "Regenerate, picture 2",
    ]  # fmt: skip

    await use_settings_and_canvases_by_keys(window, night)


async def test_nodes_are_moved_connected_and_deleted_by_keys(window: Window, db: Any) -> None:
    page, press = window.page, window.page.keyboard.press
    await put(db, window.workflow, "A mill", "A pond", "A hill")
    await page.reload()
    await window.connected()
    nodes = page.locator(".react-flow__node")
    await expect(nodes).to_have_count(3)
    labels = [await each.locator("article").get_attribute("aria-label") for each in await nodes.all()]
    assert labels == ["A mill", "A pond", "A hill"]  # Tab goes as one reads

    await nodes.nth(0).focus()
    await press("Shift+Enter")
    await nodes.nth(1).focus()
    await press("Shift+Enter")
    await expect(page.locator("[data-selected=true]")).to_have_count(2)
    await press("ArrowDown")
    await press("Shift+ArrowDown")
    moved = "select count(*) = 2 from workflow_nodes where workflow_id = $1 and (position ->> 'y')::int > 10"
    await wait_until(lambda: db.fetchval(moved, window.workflow))

    await press("Escape")
    await nodes.nth(0).focus()
    await press("c")
    await expect(page.get_by_text("Which one starts from it?")).to_be_visible()
    await nodes.nth(2).focus()
    await press("Enter")
    await expect(page.get_by_role("group", name="A hill starts from A mill")).to_be_attached()

    for prompt in ("A mill", "A pond"):
        await window.node(prompt).locator("..").focus()
        await press("Shift+Enter")
    await press("Delete")
    await expect(window.nodes).to_have_count(1)
    await window.node("A hill").locator("..").focus()
    await press("Delete")  # what has the focus, where nothing is selected
    await expect(window.nodes).to_have_count(0)


async def test_fingers_select_several_connect_and_delete(url: str, open_window: Open, db: Any) -> None:
    window: Window = await open_window(f"{url}#{uuid4()}", **PHONE)
    page = window.page
    await put(db, window.workflow, "A mill", "A pond")
    await db.execute(
        """update workflow_nodes set position = '{"x": 0, "y": 420}' where node_data::text like '%A pond%' and workflow_id = $1""",
        window.workflow,
    )
    await page.reload()
    await window.connected()
    await expect(window.nodes).to_have_count(2)
    await wait_until(lambda: page.evaluate("document.querySelector('.image-node').getBoundingClientRect().width > 291"))
    assert await page.evaluate(SMALL, 40) == []
    assert await window.node("A mill").locator(".react-flow__handle.source").evaluate(REACH)

    mill, pond = window.node("A mill"), window.node("A pond")
    await tapped(page, mill)
    await expect(mill).to_have_attribute("data-selected", "true")
    await window.keep_screenshot("touch-selected-390")
    assert await page.evaluate(SMALL, 40) == []
    await page.get_by_role("button", name="Connect").tap()
    await tapped(page, pond)
    await expect(page.get_by_role("group", name="A pond starts from A mill")).to_be_attached()
    await page.get_by_role("button", name="Done").tap()

    await page.get_by_role("button", name="Select", exact=True).tap()
    await tapped(page, mill)
    await tapped(page, pond)
    await expect(page.get_by_text("2 selected", exact=True)).to_be_visible()
    await page.get_by_role("button", name="Delete").tap()
    await expect(window.nodes).to_have_count(0)
    await page.get_by_role("button", name="Undo").tap()
    await expect(window.nodes).to_have_count(2)


async def test_a_long_press_begins_a_selection(url: str, open_window: Open, db: Any) -> None:
    window: Window = await open_window(f"{url}#{uuid4()}", **PHONE)
    await put(db, window.workflow, "A mill")
    await window.page.reload()
    await window.connected()
    box = await box_of(window.node("A mill"))
    session = await window.page.context.new_cdp_session(window.page)
    point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + 90}
    await session.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
    await expect(window.node("A mill")).to_have_attribute("data-selected", "true", timeout=20_000)
    await expect(window.page.locator(".pane")).to_have_attribute("data-selecting", "true", timeout=20_000)
    await session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    await expect(window.page.get_by_text("1 selected")).to_be_visible()
