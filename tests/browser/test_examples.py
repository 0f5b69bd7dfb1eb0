"""The examples in stock templates: built without secrets or the internet, clicked through in production mode."""

import difflib
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.async_api import Browser, Page, expect

from tests.support.dev_process import running
from tests.support.examples import (
    API,
    KEYS,
    NEXT,
    VITE,
    Example,
    added_packages,
    build,
    changed_files,
    prepare_home,
    serving,
)
from tests.support.postgres import free_port, wait_until
from tests.support.webhooks import SECRET, signed
from tests.support.window import chromium, database

pytestmark = pytest.mark.timeout(600)  # the first build of a template

EXAMPLES = [pytest.param(each, id=each.name) for each in (VITE, NEXT)]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A data directory that the user `nobody` can reach."""
    path = Path(tempfile.mkdtemp(prefix="image-jobs-examples-"))
    path.chmod(0o755)
    yield prepare_home(path)
    shutil.rmtree(path)


@pytest.fixture(scope="module")
async def api(home: Path) -> AsyncIterator[str]:
    """Start dev with the keys that are built into the apps, and return its address."""
    port = free_port()
    async with running(home.parent, port, "--data", home.name):
        yield f"http://127.0.0.1:{port}"


@asynccontextmanager
async def chrome_for(api: str) -> AsyncIterator[Browser]:
    """Start a browser that finds dev at the address that is built into the apps."""
    places = f"MAP {urlsplit(API).netloc} {urlsplit(api).netloc}"
    async with chromium(f"--host-resolver-rules={places}") as browser:
        yield browser


@pytest.fixture(scope="module")
async def chrome(api: str) -> AsyncIterator[Browser]:
    async with chrome_for(api) as browser:
        yield browser


@pytest.fixture(scope="module")
async def private_chrome(home: Path) -> AsyncIterator[Browser]:
    """Start dev with a private bucket, and a browser that finds it."""
    (home.parent / "private").mkdir(mode=0o755)
    data, port = prepare_home(home.parent / "private"), free_port()
    async with (
        running(data.parent, port, "--data", data.name, IMAGE_JOBS_PRIVATE="1"),
        chrome_for(f"http://127.0.0.1:{port}") as browser,
    ):
        yield browser


@asynccontextmanager
async def visitor(browser: Browser, address: str) -> AsyncIterator[Page]:
    """Open a page as a new user. At the end its console has neither errors nor warnings."""
    session = await browser.new_context()
    page = await session.new_page()
    noise: list[str] = []
    page.on("console", lambda line: noise.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: noise.append(str(error)))
    try:
        await page.goto(address)
        await page.get_by_role("button", name="Start as a guest").click()
        yield page
        assert noise == []
    finally:
        await session.close()


async def has_picture(page: Page, prompt: str) -> str:
    """Wait until the node shows its picture, loaded; return its address."""
    node = page.get_by_role("article", name=prompt)
    await expect(node).to_have_attribute("data-status", "completed", timeout=40_000)
    picture = node.locator(".image-node-picture")
    await expect(picture).to_have_count(1, timeout=10_000)  # the preview has faded
    await wait_until(lambda: picture.evaluate("image => image.complete && image.naturalWidth > 0"))
    return str(await picture.get_attribute("src"))


@pytest.mark.parametrize("example", EXAMPLES)
async def test_a_picture_is_made_shared_and_signed_out_of(example: Example, api: str, chrome: Browser):
    build(example)
    prompt = "A lighthouse at dusk"
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(example))
        owner = await stack.enter_async_context(visitor(chrome, url))
        await owner.get_by_role("button", name="New picture").click()
        await owner.get_by_label("Prompt").fill(prompt)
        await owner.get_by_role("button", name="Generate").click()
        await has_picture(owner, prompt)
        await expect(owner.get_by_role("status").filter(has_text="live")).to_be_visible(timeout=20_000)

        await owner.get_by_role("button", name="Share").click()
        link = await owner.get_by_label("Link").input_value()
        assert link.startswith(f"{owner.url}?join=")
        guest = await stack.enter_async_context(visitor(chrome, link))
        await has_picture(guest, prompt)
        assert urlsplit(guest.url).fragment == urlsplit(owner.url).fragment

        await guest.get_by_label("Prompt").fill(f"{prompt}, in the rain")
        await expect(owner.get_by_role("article", name=f"{prompt}, in the rain")).to_be_visible(timeout=10_000)
        await owner.get_by_role("button", name="Show at full size").dispatch_event("click")
        await expect(owner.get_by_role("dialog").locator("img")).to_be_visible()

        await guest.get_by_role("button", name="Sign out").click()
        await expect(guest.get_by_role("button", name="Start as a guest")).to_be_visible()
        await expect(guest.get_by_role("article")).to_have_count(0)
        assert urlsplit(guest.url).fragment == ""  # the next guest is no member of this workflow
        await guest.get_by_role("button", name="Start as a guest").click()
        await guest.get_by_role("button", name="New picture").click()
        await expect(guest.get_by_role("status").filter(has_text="live")).to_be_visible(timeout=20_000)


@pytest.mark.parametrize("example", EXAMPLES)
async def test_a_private_picture_is_shown_to_members(example: Example, private_chrome: Browser):
    build(example)
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(example))
        owner = await stack.enter_async_context(visitor(private_chrome, url))
        await owner.get_by_role("button", name="New picture").click()
        await owner.get_by_label("Prompt").fill("A lighthouse at dawn")
        await owner.get_by_role("button", name="Generate").click()
        shown = await has_picture(owner, "A lighthouse at dawn")
        assert shown.startswith(f"{API}/storage/v1/object/sign/images/")
        await owner.get_by_role("button", name="Share").click()
        link = await owner.get_by_label("Link").input_value()
        guest = await stack.enter_async_context(visitor(private_chrome, link))
        await has_picture(guest, "A lighthouse at dawn")
        await guest.get_by_role("button", name="Show at full size").dispatch_event("click")
        large = guest.get_by_role("dialog").locator("img")
        await wait_until(lambda: large.evaluate("image => image.complete && image.naturalWidth > 0"))


@pytest.mark.parametrize("example", EXAMPLES)
def test_no_file_of_the_template_is_edited_but_the_page(example: Example):
    build(example)
    changed = changed_files(example)
    assert added_packages(example) == {"@supabase/supabase-js", "@xyflow/react"}
    # next build writes the last one itself.
    allowed = {*example.replaced, *filter(None, [example.fonts]), "package.json", "next-env.d.ts"}
    assert set(changed) <= allowed
    if example.fonts:
        before, after = changed[example.fonts]
        assert "font/google" in before
        assert "font" not in after
        edited = [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line.startswith("+")]
        assert edited == ['+       className="h-full antialiased"']


async def test_the_webhook_route_of_next_hands_over_deliveries(api: str, home: Path):
    build(NEXT)
    async with database(home) as db:
        await db.execute("select image_jobs.set_webhook_secrets($1)", {"openai": [SECRET]})
    async with (
        serving(NEXT, SUPABASE_URL=api, SUPABASE_SERVICE_ROLE_KEY=KEYS.service_role_key) as url,
        httpx.AsyncClient() as client,
    ):
        body = '{"type": "response.completed",  "data": {"id": "resp_1"}}'
        unsigned = await client.post(f"{url}/webhooks/openai", content=body)
        assert unsigned.status_code == 401
        response = await client.post(f"{url}/webhooks/openai", content=body, headers=signed(body))
        assert (response.status_code, response.json()) == (200, {"received": True, "duplicate": False})


def test_the_examples_hold_no_secret_and_no_address():
    for example in (VITE, NEXT):
        for path in example.sources.rglob("*.ts*"):
            assert not re.search(r"https?://|eyJ|sb_", path.read_text()), path
