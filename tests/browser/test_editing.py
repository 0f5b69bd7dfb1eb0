"""Undo, redo, the clipboard, duplicates: what a person who edits takes for granted, and what it must not do."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from playwright.async_api import Locator, expect

from tests.support.node import run_script
from tests.support.postgres import ROOT, wait_until
from tests.support.window import Window, put

pytestmark = pytest.mark.timeout(150)

NODE_AT = {"x": 4, "y": 4}
"""Where a click selects a node."""
OVERLAPS = """() => {
  const boxes = [...document.querySelectorAll(".image-node")].map(each => each.getBoundingClientRect());
  return boxes.filter((one, index) => boxes.slice(index + 1).some(other =>
    one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom)).length;
}"""
"""How many nodes lie over another one."""


@pytest.fixture(scope="module")
async def outcomes() -> Any:
    """Run all scenarios of the script, and return what came of each."""
    script = Path(__file__).with_name("editing.mjs")
    return await run_script(script, CANVAS=str(ROOT / "daemon/dev/canvas"))


def test_every_edit_goes_back_and_forth(outcomes: Any) -> None:
    """A drag of two is one step, and so is a deletion with its edge; no run is started or cancelled."""
    assert outcomes["every edit, back and forth"] == [7, True, True, ["remove", "n1", True], False]


def test_typing_without_a_pause_is_one_step(outcomes: Any) -> None:
    assert outcomes["typing"] == ["n1,A pier at dusk,,,0", "n1,A pier,,,0", "n1,,,,0"]


def test_room_is_made_of_unused_pictures_alone(outcomes: Any) -> None:
    """Short pages, a node deleted between two of them, a clock that is ahead, and requests that fail remove nothing."""
    refused = ["No room was made: the server cannot be reached, or refuses.", []]
    found = [[2, ["w/0", "w/1"]], [1, ["w/0"]]]
    assert outcomes["room for own pictures"] == [[0, []], [0, []], [0, []], *found, *[refused] * 4]


def test_undo_names_the_pictures_that_it_brings_back(outcomes: Any) -> None:
    assert [set(each) for each in outcomes["own pictures that undo brings back"]] == [set(), {"w/1"}, {"w/1"}]


def test_an_edit_after_an_undo_ends_what_was_undone(outcomes: Any) -> None:
    assert outcomes["an edit after an undo"] == [False, ["n1,A boat,,,0"]]


def test_the_undo_of_a_deletion_is_done_once(outcomes: Any) -> None:
    both, last, redone = outcomes["a button that undoes"]
    assert (both, last) == (["n1,A pier,,,0", "n2,A boat,,,1"], ["n1,A pier,,,0"])
    assert redone == [True, True, False]


def test_a_copy_has_what_was_chosen_and_nothing_else(outcomes: Any) -> None:
    spec = {"basePrompt": "A pier", "size": "512x512", "quality": "hd", "seed": 7, "styleModifiers": ["soft light"]}
    chosen = {"provider": "demo", "model": "painter", "promptSpec": spec}
    place = {"x": 3, "y": 0}
    assert outcomes["copied and pasted"] == [
        {"id": "a", "input": chosen, "position": place},
        {"id": "b", "input": {**chosen, "source": "a"}, "position": place},
    ]


def test_foreign_clipboard_text_is_taken_key_by_key(outcomes: Any) -> None:
    empty = {"id": "0", "input": {"promptSpec": {"basePrompt": ""}}, "position": {"x": 0, "y": 0}}
    assert outcomes["what others have copied"] == [
        None,
        None,
        "What was copied is incomplete. Copy the pictures again.",
        "At most 200 pictures can be pasted at once. Copy fewer.",
        [empty],
        [empty],
    ]


def test_a_wrong_clock_is_noticed(outcomes: Any) -> None:
    """Seconds that an instant of now is off: right, five minutes ahead, two minutes behind. A wait counts by it, too."""
    assert outcomes["the server's clock"] == [0, 300, -120, 0]


def test_many_nodes_ask_for_a_price_once(outcomes: Any) -> None:
    painter, unknown = ["estimate_cost", "demo:painter"], ["estimate_cost", "demo:unknown", {}]
    before, asked, costs, none = outcomes["prices of many nodes"]
    assert (before, none) == ("asked for", "no model")
    assert sorted(asked, key=str) == sorted([[*painter, {}], [*painter, {"quality": "hd"}], unknown], key=str)
    assert costs == [0.05, 0.4, None]


async def data_of(db: Any, workflow: str) -> list[Any]:
    rows = await db.fetch("select node_data from workflow_nodes where workflow_id = $1 order by created_at", workflow)
    return [row["node_data"] for row in rows]


async def type_in_a_field(window: Window, prompt: Locator) -> None:
    """In a field the keys are the browser's own."""
    await prompt.fill("A pier at noon")
    await window.page.keyboard.press("Control+a")
    await window.page.keyboard.type("A pier at dawn")
    await window.page.keyboard.press("Control+z")
    await expect(window.nodes).to_have_count(2)
    await prompt.fill("A pier at dusk")
    await window.page.keyboard.press("Escape")


async def test_pictures_are_edited_by_the_usual_keys(window: Window, db: Any) -> None:
    """Copied with their edge, pasted here and into another canvas, duplicated, selected, cut; undone and done again."""
    page, keys = window.page, window.page.keyboard
    await put(db, window.workflow, "A pier", "A pier at night")
    first, second = await db.fetch(
        "select id from workflow_nodes where workflow_id = $1 order by position", window.workflow
    )
    await db.execute(
        "update workflow_nodes set node_data = node_data || $2 where id = $1", second["id"], {"source": first["id"]}
    )
    await page.reload()
    await expect(page.locator(".react-flow__edge")).to_have_count(1)
    selected = page.locator('.image-node[data-selected="true"]')

    await type_in_a_field(window, page.locator(f'[data-id="{second["id"]}"] .image-node-prompt'))
    await expect(selected).to_have_count(0)
    await keys.press("Control+a")
    await expect(selected).to_have_count(2)
    await keys.press("Control+c")
    await keys.press("Control+v")
    await expect(window.nodes).to_have_count(4)
    await expect(page.locator(".react-flow__edge")).to_have_count(2)
    await expect(selected).to_have_count(2)  # the copies
    assert await page.evaluate(OVERLAPS) == 0
    await keys.press("Control+d")
    await expect(window.nodes).to_have_count(6)
    assert await page.evaluate(OVERLAPS) == 0
    await window.keep_screenshot("pasted")
    await keys.press("Control+z")
    await expect(window.nodes).to_have_count(4)
    await keys.press("Control+x")  # nothing is selected any more
    await expect(window.nodes).to_have_count(4)
    await keys.press("Control+a")
    await keys.press("Control+x")
    await expect(window.nodes).to_have_count(0)
    await keys.press("Control+z")
    await expect(window.nodes).to_have_count(4)
    await expect(page.locator(".react-flow__edge")).to_have_count(2)
    await keys.press("Control+Shift+z")
    await expect(window.nodes).to_have_count(0)
    await keys.press("Control+z")
    await expect(window.nodes).to_have_count(4)

    await page.evaluate(f"location.hash = '{uuid4()}'")  # another canvas, in the same browser
    await expect(page.locator(".first")).to_be_visible(timeout=20_000)
    await expect(page.locator(".first input")).to_be_focused()  # while it is empty, the keys are the canvas's
    await keys.press("Control+v")
    await expect(window.nodes).to_have_count(4)
    await expect(page.locator(".react-flow__edge")).to_have_count(2)

    async def written() -> bool:
        return len(await data_of(db, window.workflow)) == 4

    await wait_until(written, timeout=20)
    assert await db.fetchval("select count(*) from runs where subject_id = $1", window.workflow) == 0
    texts = {each["promptSpec"]["basePrompt"] for each in await data_of(db, window.workflow)}
    assert texts == {"A pier", "A pier at dusk"}


async def undo_a_seed(window: Window, node: Locator) -> None:
    """A field of the settings follows."""
    await node.get_by_role("button", name="Model and settings").click()
    seed = node.get_by_label("Seed")
    await seed.fill("7")
    await node.locator("..").focus()
    await window.page.keyboard.press("Control+z")
    await expect(seed).to_have_value("0")
    await node.get_by_role("button", name="Model and settings").click()


async def test_undo_brings_back_a_picture_and_its_place(window: Window, db: Any) -> None:
    """Of a node whose newest run was cancelled, too; and the run of one that goes is not cancelled."""
    page, keys = window.page, window.page.keyboard
    await put(db, window.workflow, "A mill")
    await page.reload()
    node = window.node("A mill")
    await undo_a_seed(window, node)
    await node.get_by_role("button", name="Generate").click()
    image = await window.has_image(node)
    await db.execute(
        "update workflow_nodes set node_data = jsonb_set(node_data, '{metadata,demo}', '{\"hang\": true}') "
        "where workflow_id = $1",
        window.workflow,
    )
    await page.reload()
    await node.get_by_role("button", name="Regenerate").click()
    await expect(node).to_have_attribute("data-status", "running", timeout=20_000)
    await node.get_by_role("button", name="Cancel").click()
    await expect(node).to_have_attribute("data-status", "cancelled", timeout=20_000)
    await window.drag(node.locator(".image-node-frame"), (400, 620))
    place = "select position from workflow_nodes where workflow_id = $1"

    async def is_dragged() -> bool:
        return await db.fetchval(place, window.workflow) != {"x": 0, "y": 0}

    await wait_until(is_dragged, timeout=20)
    dragged = await db.fetchval(place, window.workflow)

    await node.locator("..").click(position=NODE_AT)
    await keys.press("Delete")
    await expect(node).to_have_count(0)

    async def count(expected: int) -> None:
        async def is_so() -> bool:
            nodes = await db.fetchval("select count(*) from workflow_nodes where workflow_id = $1", window.workflow)
            return nodes == expected

        await wait_until(is_so, timeout=20)

    await count(0)
    await keys.press("Control+z")
    await expect(node.locator(f'.image-node-picture[src^="{image}"]')).to_have_count(1, timeout=20_000)
    await count(1)
    await page.reload()
    await expect(node.locator(f'.image-node-picture[src^="{image}"]')).to_have_count(1, timeout=20_000)
    assert await db.fetchval(place, window.workflow) == dragged

    await page.keyboard.press("Escape")
    added = await window.add("A mill in the snow")
    await keys.press("Control+Enter")
    await window.has_image(added)
    await keys.press("Escape")
    while await window.nodes.count() == 2:  # what was typed, and then the node
        await keys.press("Control+z")
        await page.wait_for_function("() => new Promise(requestAnimationFrame)")
    await expect(window.nodes).to_have_count(1)
    await keys.press("Control+y")
    await expect(window.nodes).to_have_count(2)
    statuses = await db.fetch("select status from runs where subject_id = $1 order by ticket", window.workflow)
    assert [row["status"] for row in statuses] == ["completed", "cancelled", "completed"]
