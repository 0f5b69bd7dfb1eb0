"""A picture of one's own to start from: dropped, pasted or chosen, made smaller, uploaded and used."""

import asyncio
from io import BytesIO
from typing import Any

import pytest
from PIL import Image
from playwright.async_api import FilePayload, Route, expect

from tests.support.postgres import wait_until
from tests.support.window import Window

pytestmark = [pytest.mark.timeout(150), pytest.mark.one_postgres]

UPRIGHT = 6
"""The orientation of a camera that was held upright: the picture is to be shown a quarter to the right."""
GIVE = """([kind, name, type, bytes]) => {
  const file = new File([Uint8Array.from(atob(bytes), each => each.charCodeAt(0))], name, {type});
  const data = new DataTransfer();
  data.items.add(file);
  const pane = document.querySelector(".pane");
  const options = {bubbles: true, cancelable: true, clientX: 700, clientY: 400};
  if (kind === "paste") document.body.dispatchEvent(new ClipboardEvent("paste", {...options, clipboardData: data}));
  else for (const each of ["dragover", "drop"]) pane.dispatchEvent(new DragEvent(each, {...options, dataTransfer: data}));
}"""


def photo(size: tuple[int, int] = (2600, 1300), kind: str = "JPEG") -> bytes:
    """A photo, blue on its left and red on its right, with the orientation and the place that a camera notes."""
    picture = Image.new("RGB", size, "#2040d0")
    picture.paste("#d03020", (size[0] // 2, 0, *size))
    exif = Image.Exif()
    exif[0x0112] = UPRIGHT
    exif[0x010F] = "Camera with a place in its notes"
    buffer = BytesIO()
    picture.save(buffer, kind, exif=exif)
    return buffer.getvalue()


async def choose(window: Window, *files: FilePayload, button: str = "Add a picture") -> None:
    async with window.page.expect_file_chooser() as chooser:
        await window.button(button).first.click()
    await (await chooser.value).set_files(list(files))


async def give(window: Window, kind: str, name: str, content_type: str, content: bytes) -> None:
    """Drop, or paste, a file."""
    from base64 import b64encode

    await window.page.evaluate(GIVE, [kind, name, content_type, b64encode(content).decode()])


async def undo_an_upload(window: Window, content: bytes) -> None:
    """Drop a picture, and undo that while it is on its way: the file is removed from the bucket."""
    under_way, may_go_on = asyncio.Event(), asyncio.Event()

    async def hold(route: Route) -> None:
        if route.request.method == "POST":
            under_way.set()
            await may_go_on.wait()
        await route.continue_()

    address = "**/storage/v1/object/image-sources/**"
    await window.page.route(address, hold)
    await give(window, "drop", "undone.png", "image/png", content)
    await asyncio.wait_for(under_way.wait(), 20)
    await window.page.keyboard.press("Control+z")
    await expect(window.node("undone.png")).to_have_count(0)
    async with window.page.expect_response(
        lambda response: response.request.method == "DELETE" and "/object/image-sources" in response.url
    ):
        may_go_on.set()
    await window.page.unroute(address)


async def test_a_photo_of_mine_starts_a_picture(window: Window, db: Any) -> None:
    """On a new canvas: the node that waits for the upload makes the user its member."""
    await window.connected_or_new()
    file: FilePayload = {"name": "my harbour.jpg", "mimeType": "image/jpeg", "buffer": photo()}
    await choose(window, file, button="start from a picture")
    mine = window.node("my harbour.jpg")
    picture = mine.locator(".image-node-picture[data-loaded=true]")
    await expect(picture).to_have_count(1, timeout=20_000)
    await expect(mine).to_contain_text("Your picture, to start from.")
    path = await db.fetchval(
        "select node_data #>> '{upload,path}' from workflow_nodes where workflow_id = $1", window.workflow
    )
    assert path.startswith(f"{window.workflow}/")
    url = await picture.get_attribute("src")
    response = await window.page.request.get(str(url))
    stored = Image.open(BytesIO(await response.body()))
    assert (stored.format, stored.size) == ("JPEG", (1024, 2048))  # smaller, and upright
    assert dict(stored.getexif()) == {}
    red, _, blue = stored.convert("RGB").getpixel((512, 100))  # type: ignore[misc]
    assert blue > 150 > red

    await window.connected()
    await mine.locator("..").focus()
    await window.page.keyboard.press("r")
    await expect(window.page.get_by_placeholder("What should change?")).to_be_focused()
    await window.page.keyboard.type("The same at dawn")
    await window.page.keyboard.press("Control+Enter")
    await window.has_image(window.node("The same at dawn"))
    named = await db.fetchval(
        "select metadata #>> '{promptSpec,previousImage}' from runs where subject_id = $1", window.workflow
    )
    assert named.endswith(f"/storage/v1/object/authenticated/image-sources/{path}")
    await window.keep_screenshot("source")
    await window.page.reload()
    await expect(picture).to_have_count(1, timeout=20_000)
    await mine.get_by_role("button", name="Show at full size").dispatch_event("click")
    await expect(window.page.get_by_role("dialog").get_by_text("my harbour.jpg")).to_be_visible()


async def test_pictures_are_dropped_and_pasted_and_others_refused(window: Window, db: Any) -> None:
    await window.connected_or_new()
    small = photo((300, 200), "PNG")
    await give(window, "drop", "dropped.png", "image/png", small)
    await expect(window.node("dropped.png").locator(".image-node-picture[data-loaded=true]")).to_have_count(
        1, timeout=20_000
    )
    await give(window, "paste", "pasted.webp", "image/webp", photo((300, 200), "WEBP"))
    await expect(window.node("pasted.webp").locator(".image-node-picture[data-loaded=true]")).to_have_count(
        1, timeout=20_000
    )

    await undo_an_upload(window, small)
    stored = "select count(*) from storage.objects where bucket_id = 'image-sources' and name like $1 || '/%'"
    assert await db.fetchval(stored, window.workflow) == 2

    await window.page.keyboard.press("Control+a")
    await window.page.keyboard.press("Control+x")
    await expect(window.toast.last).to_contain_text("A picture of your own stays here")
    await expect(window.nodes).to_have_count(2)
    await give(window, "drop", "poem.txt", "text/plain", b"Roses are red")
    await expect(window.toast.last).to_contain_text("poem.txt is not a PNG, JPEG or WebP picture.")
    await give(window, "drop", "torn.png", "image/png", small[:60])
    await expect(window.toast.last).to_contain_text("torn.png cannot be read as a picture.")
    await expect(window.nodes).to_have_count(2)
    window.expected = "status of 40"
    await db.execute("update storage.buckets set file_size_limit = 10 where id = 'image-sources'")
    try:
        await give(window, "drop", "heavy.png", "image/png", small)
        await expect(window.toast.last).to_contain_text("heavy.png was not uploaded:")
        await window.page.keyboard.press("Control+z")  # of what was added before: of this one nothing is left
        await expect(window.nodes).to_have_count(1)
        await window.page.keyboard.press("Control+y")
        await expect(window.nodes).to_have_count(2)
    finally:
        await db.execute("update storage.buckets set file_size_limit = 20971520 where id = 'image-sources'")
    await db.execute(
        "insert into storage.objects (bucket_id, name, metadata, created_at) "
        "values ('image-sources', $1, '{\"size\": 2000000000}', now() - interval '2 hours')",
        f"{window.workflow}/all of it.png",
    )
    await db.execute(
        "update storage.objects set created_at = now() - interval '2 hours' where name like $1 || '/%'", window.workflow
    )
    await window.node("pasted.webp").locator("..").focus()
    await window.page.keyboard.press("Delete")
    await expect(window.nodes).to_have_count(1)
    await give(window, "drop", "one more.png", "image/png", small)
    await expect(window.toast.last).to_contain_text("one more.png was not uploaded: this canvas is full.")
    await expect(window.nodes).to_have_count(1)
    await wait_until(
        lambda: db.fetchval("select count(*) = 1 from workflow_nodes where workflow_id = $1", window.workflow)
    )
    await window.button("Make room").click()  # of what no node shows any more, and Undo cannot bring back
    await expect(window.toast.last).to_contain_text("One picture was removed, which no node shows.", timeout=20_000)
    assert await db.fetchval(stored, window.workflow) == 2
    await window.page.keyboard.press("Control+z")
    await expect(window.node("pasted.webp").locator(".image-node-picture[data-loaded=true]")).to_have_count(1)
    await give(window, "drop", "one more.png", "image/png", small)
    await expect(window.node("one more.png").locator(".image-node-picture[data-loaded=true]")).to_have_count(
        1, timeout=20_000
    )
    await expect(window.nodes).to_have_count(3)
