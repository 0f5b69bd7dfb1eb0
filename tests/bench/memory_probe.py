"""A process that receives images and prints how much memory that took: python -m tests.bench.memory_probe …

It receives them by our providers, or in the plain way: by the first example of an SDK or of httpx.
"""

import asyncio
import base64
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx

from daemon.fetch import client as fetch_client
from daemon.prompt import PromptSpec
from daemon.providers import Generated, Request, create
from daemon.settings import Settings

Receive = Callable[[Path], Awaitable[Path]]
"""Receive an image into a folder. Returns the file."""

RequestImage = Callable[[], Awaitable[bytes]]
"""Request an image. Returns its bytes."""

TIMEOUT = timedelta(minutes=20)
"""One machine sends and receives everything; the time that takes is not measured here."""

MODELS = {
    "openai": "gpt-image-2",
    "google": "gemini-3.1-flash-image",
    "stability": "stable-image-core",
    "midjourney": "v7",
}
BASES = {"openai": "OPENAI_BASE_URL", "google": "GOOGLE_BASE_URL", "stability": "STABILITY_BASE_URL"}


http = httpx.AsyncClient(timeout=TIMEOUT.total_seconds(), limits=httpx.Limits(max_connections=None))
fetch_client._TIMEOUT = TIMEOUT


class Silent:
    """A reporter that discards everything."""

    def submitted(self, request: Any, *, estimate: float | None = None, deferred: bool = False) -> None: ...

    def progress(self, percent: float, message: str | None = None) -> None: ...

    def preview(self, image: Path) -> None: ...

    def warning(self, message: str, *, field: str | None = None, **data: Any) -> None: ...


def by_us(provider: str, url: str, *, polled: bool) -> Receive:
    """Receive by a provider of ours; `polled` fetches a provider job."""
    base = BASES.get(provider, "MIDJOURNEY_API_URL")
    made: Any = create(provider, Settings(_env_file=None, **{f"{provider.upper()}_API_KEY": "key", base: url}))

    async def receive(folder: Path) -> Path:
        prompt = PromptSpec.parse({"promptSpec": {"basePrompt": "a red fox"}})
        request = Request("run_1", MODELS[provider], prompt, folder)
        got = await (made.check("1", request, Silent()) if polled else made.generate(request, Silent()))
        assert isinstance(got, Generated)
        return got.path

    return receive


def by_openai(kind: str, url: str) -> RequestImage:
    """Request by the official SDK."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(api_key="key", base_url=url, max_retries=0, timeout=TIMEOUT.total_seconds())
    arguments: dict[str, Any] = {"model": MODELS["openai"], "prompt": "a red fox"}

    async def one_call() -> bytes:
        (item,) = (await client.images.generate(**arguments)).data or ()
        return base64.b64decode(item.b64_json or "") if item.url is None else await downloaded(item.url)

    async def stream() -> bytes:
        events: Any = await client.images.generate(**arguments, stream=True)
        return base64.b64decode([event.b64_json async for event in events][-1])

    async def background() -> bytes:
        output: Any = (await client.responses.retrieve("resp_1")).output
        return base64.b64decode(output[0].result)

    return {"stream": stream, "background": background}.get(kind, one_call)


def by_google(_: str, url: str) -> RequestImage:
    """Request by the official SDK."""
    from google import genai
    from google.genai.types import HttpOptions

    options = HttpOptions(base_url=url, timeout=round(1000 * TIMEOUT.total_seconds()))
    client: Any = genai.Client(api_key="key", http_options=options)

    async def request() -> bytes:
        response = await client.aio.models.generate_content(model=MODELS["google"], contents="a red fox")
        return response.candidates[0].content.parts[0].inline_data.data

    return request


def by_stability(_: str, url: str) -> RequestImage:
    """Request by httpx, as there is no SDK; without our Accept header the response is JSON."""

    async def request() -> bytes:
        return base64.b64decode((await http.post(url, headers={"accept": "application/json"})).json()["image"])

    return request


def by_midjourney(_: str, url: str) -> RequestImage:
    """Request by httpx, as there is no SDK. The grid is not even cut into quarters."""

    async def request() -> bytes:
        return await downloaded((await http.get(url)).json()["imageUrl"])

    return request


async def downloaded(url: str) -> bytes:
    """Download into memory."""
    return (await http.get(url)).content


def plainly(provider: str, kind: str, url: str) -> Receive:
    """Receive as the documentation of each API does first."""
    clients = {"openai": by_openai, "google": by_google, "stability": by_stability, "midjourney": by_midjourney}
    request = clients[provider](kind, url)

    async def receive(folder: Path) -> Path:
        path = folder / "image"
        path.write_bytes(await request())
        return path

    return receive


async def measure(receive: Receive, count: int) -> dict[str, int]:
    """Measure resident memory in bytes, idle and peak, and the least size of a received image."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder, str(number)) for number in range(count + 1)]
        for each in folders:
            each.mkdir()
        await receive(folders[0])
        idle = reset_peak()
        paths = await asyncio.gather(*(receive(each) for each in folders[1:]))
        return {"idle": idle, "peak": resident("VmHWM"), "least": min(path.stat().st_size for path in paths)}


def reset_peak() -> int:
    """Reset the peak of resident memory. Returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(name: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    who, provider_name, form, address, number = sys.argv[1:]
    base_url = f"{address}/{form}"
    if who == "ours":
        it = by_us(provider_name, base_url, polled=form in ("background", "midjourney"))
    else:
        it = plainly(provider_name, form, base_url)

    sys.stdout.write(json.dumps(asyncio.run(measure(it, int(number)))))
