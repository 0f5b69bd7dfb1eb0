"""Pictures of a private bucket: signed in batches, renewed while the canvas is open, asked for once where refused."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
from playwright.async_api import Route, expect

from tests.support.dev_process import running
from tests.support.node import run_script
from tests.support.postgres import ROOT, free_port, wait_until
from tests.support.window import Window, database, put

pytestmark = pytest.mark.timeout(150)


def signed(run: str, end: str, request: int) -> str:
    """Return the address of the first picture, as it was signed by the request of this number."""
    return f"sign/images/w/{run}_1{end}?token=t{request}-600&v=abcd1234"


@pytest.fixture(scope="module")
async def outcomes() -> Any:
    """Run all scenarios of the script, and return what came of each."""
    script = Path(__file__).with_name("store_pictures.mjs")
    return await run_script(script, CANVAS=str(ROOT / "daemon/dev/canvas"))


async def test_nothing_is_asked_of_a_public_bucket(outcomes: Any):
    assert outcomes["a public bucket"] == [0, True]


async def test_a_canvas_is_signed_by_one_request(outcomes: Any):
    image, thumbnail = (f"sign/images/w/job_1_0{end}?token=t1-600&v=abcd1234" for end in (".png", ".thumb.webp"))
    assert outcomes["a canvas"] == [1, 200, image, thumbnail]


async def test_a_large_canvas_is_signed_in_batches(outcomes: Any):
    assert outcomes["a large canvas"] == [True, 1200, 1200]


async def test_signatures_are_renewed_before_they_end(outcomes: Any):
    """Not after five minutes, but after nine, after a sleep of ten hours, and after the clock went back a day."""
    counts, meanwhile, last, paths, holes, problems = outcomes["renewal"]
    assert counts == [1, 2, 2, 3, 4]
    assert (meanwhile, last) == (signed("job_1", ".png", 1), signed("job_1", ".png", 4))
    assert (paths, holes, problems) == (4, 0, [])


async def test_the_old_image_stays_until_the_new_is_signed(outcomes: Any):
    assert outcomes["a new image"] == [signed("job_1", ".png", 1), signed("job_2", ".png", 2), 0]


async def test_a_run_of_previews_is_signed_once(outcomes: Any):
    assert outcomes["previews"] == 1


async def test_a_row_without_addresses_is_signed_by_its_paths(outcomes: Any):
    assert outcomes["a row without addresses"] == "sign/images/w/job_1_1.png?token=t1-600"


async def test_trouble_of_storage_is_told_once(outcomes: Any):
    assert outcomes["Storage in trouble"] == [1, 6, ["The pictures cannot be shown: upstream"]]


async def test_signing_goes_on_when_the_network_is_back(outcomes: Any):
    assert outcomes["no network"] == [1, []]


async def test_a_refusal_to_sign_is_told_once(outcomes: Any):
    assert outcomes["a refusal"] == [1, 2, ["The pictures cannot be shown: jwt expired"]]


async def test_a_missing_picture_is_told_once(outcomes: Any):
    assert outcomes["a picture that is missing"] == [1, 2, ["A picture cannot be shown."], True, None]


async def test_an_address_that_fails_is_signed_with_pauses(outcomes: Any):
    assert outcomes["an address that does not load"] == [[1, 2, 2, 3, 4], 0]


async def test_pictures_of_a_bucket_made_private_are_signed(outcomes: Any):
    paths = [["w/job_1_1.png", "w/job_1_2.png"]]
    public = "public/images/w/job_1_1.png?v=abcd1234&again=1"
    assert outcomes["a public bucket that was closed"] == [paths, public, signed("job_1", ".png", 1), 0]


async def test_a_public_picture_is_loaded_twice_unsigned(outcomes: Any):
    again = "public/images/w/job_1_1.png?v=abcd1234&again=1"
    assert outcomes["a public picture that fails to load once"] == [0, again, 0]


async def test_no_signature_outlives_a_membership(outcomes: Any):
    """Nor does the request for them hold up the next user's."""
    assert outcomes["signatures after leaving"] == [2, signed("job_1", ".png", 2)]


async def test_a_request_that_hangs_is_made_again(outcomes: Any):
    assert outcomes["a request that hangs"] == [signed("job_1", ".png", 2), []]


async def test_no_signature_is_written_to_a_node(outcomes: Any):
    assert outcomes["a deleted node that comes back"] == "authenticated/images/w/job_1_1.png?v=abcd1234"


async def test_only_nodes_that_changed_are_new_objects(outcomes: Any):
    assert outcomes["a node that has not changed"] == [True, False]


@pytest.fixture(scope="module")
async def private_url(directory: Path) -> AsyncIterator[str]:
    """Start dev with a private bucket, and return the address of the canvas."""
    port = free_port()
    async with running(directory, port, "--data", "private", IMAGE_JOBS_PRIVATE="1"):
        yield f"http://127.0.0.1:{port}/canvas"


@pytest.fixture
async def private_db(private_url: str, directory: Path) -> AsyncIterator[Any]:
    async with database(directory / "private") as connection:
        yield connection


async def status_of(url: str, **headers: str) -> int:
    async with httpx.AsyncClient() as client:
        return (await client.get(url, headers=headers)).status_code


class Signatures:
    """The requests for signatures of a window. The first ones are for four seconds, by the server's clock."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.seconds = 4

    async def handle(self, route: Route) -> None:
        body = route.request.post_data_json
        self.asked.append(body["paths"])
        # Each a second shorter than the one before: two of the same second would be the same address.
        seconds = max(2, self.seconds + 1 - len(self.asked))
        await route.continue_(post_data=json.dumps({**body, "expiresIn": min(body["expiresIn"], seconds)}))


HOLES = """() => {
  window.holes = 0;
  const picture = () => document.querySelector(".image-node-picture[data-loaded=true]");
  new MutationObserver(() => { if (!picture()?.naturalWidth) window.holes += 1; })
    .observe(document.querySelector(".react-flow"), { subtree: true, attributes: true, childList: true });
}"""
"""Counts how often the picture is not there."""


async def test_an_expired_signature_is_renewed_while_open(private_url: str, open_window: Any, private_db: Any):
    window: Window = await open_window(f"{private_url}#{uuid4()}")
    window.expected = "status of 400"  # of a picture that is asked for too late, on a slow machine
    page, signatures = window.page, Signatures()
    await put(private_db, window.workflow, "A pier at noon")
    await page.clock.install()
    await page.route("**/storage/v1/object/sign/images", signatures.handle)
    await page.reload()
    node = window.node("A pier at noon")
    await node.get_by_role("button", name="Generate").click()
    first = await window.has_image(node)
    assert "/storage/v1/object/sign/images/" in first
    assert await status_of(first.replace("/sign/", "/public/").split("?")[0]) == 400

    async def has_expired() -> bool:
        return await status_of(await window.has_image(node)) == 400

    await wait_until(has_expired, timeout=30)
    signatures.seconds = 600
    expired = await window.has_image(node)
    await page.evaluate(HOLES)
    before = len(signatures.asked)
    await page.clock.fast_forward("09:00")  # minutes
    second = await picture_changed(window, expired)
    assert await status_of(second) == 200
    renewed = len(signatures.asked)
    assert before < renewed

    await node.get_by_role("button", name="Show at full size").dispatch_event("click")
    shown = page.get_by_role("dialog").locator("img")
    await wait_until(lambda: shown.evaluate("image => image.complete && image.naturalWidth > 0"), timeout=40)
    element, large = await shown.element_handle(), await shown.get_attribute("src")
    assert element is not None
    await page.clock.fast_forward("09:00")
    await picture_changed(window, second)
    await expect(shown).not_to_have_attribute("src", str(large), timeout=40_000)
    assert await element.evaluate("image => image.isConnected && image.naturalWidth > 0")
    # One each; on a slow machine the expired picture is asked for once more, and refused.
    assert renewed < len(signatures.asked) <= before + 3
    assert await page.evaluate("window.holes") == 0
    download = await page.get_by_role("link", name="Download").get_attribute("href")
    assert download is not None
    assert "&download=a-pier-at-noon.png" in download
    assert await status_of(download) == 200


async def picture_changed(window: Window, before: str) -> str:
    """Wait until another address is shown, and has loaded; return it."""
    pictures = window.page.locator(".image-node-picture")
    await expect(window.page.locator(f'.image-node-picture[src="{before}"]')).to_have_count(0, timeout=50_000)
    await expect(pictures).to_have_attribute("data-loaded", "true", timeout=40_000)
    return str(await pictures.get_attribute("src"))


async def test_a_picture_that_does_not_load_is_signed_anew(private_url: str, open_window: Any, private_db: Any):
    window: Window = await open_window(f"{private_url}#{uuid4()}")
    window.expected = "status of 400"  # of the picture
    await put(private_db, window.workflow, "A pier at night")
    await window.page.reload()
    node = window.node("A pier at night")
    await node.get_by_role("button", name="Generate").click()
    await window.has_image(node)
    refused: list[str] = []

    async def refuse(route: Route) -> None:
        refused.append(route.request.url)
        await route.fulfill(status=400, json={"statusCode": "400", "error": "InvalidJWT", "message": "exp"})

    await window.page.route("**/object/sign/images/*/*.thumb.webp?*", refuse, times=1)
    await window.page.reload()
    await wait_until(lambda: refused, timeout=30)
    # Ten seconds of real time: signed again in the same second, it would be the same address.
    shown = await picture_changed(window, refused[0])
    assert shown.split("?")[0] == refused[0].split("?")[0]


async def test_a_private_picture_is_refined(private_url: str, open_window: Any, private_db: Any):
    window: Window = await open_window(f"{private_url}#{uuid4()}")
    await put(private_db, window.workflow, "A valley", "The valley at night")
    await window.page.reload()
    valley, night = window.node("A valley"), window.node("The valley at night")
    await window.drag(valley.locator(".react-flow__handle.source"), night.locator(".react-flow__handle.target"))
    await expect(window.page.locator(".react-flow__edge")).to_have_count(1)
    await night.get_by_role("button", name="Generate").click()
    shown = await window.has_image(night)
    assert urlsplit(shown).path.startswith(f"/storage/v1/object/sign/images/{window.workflow}/")
