"""A process that receives pictures and says how much memory that took: python -m tests.bench.memory_probe …

Either as daemons do, by our providers, or in the plain way, by what an SDK or httpx offers first.
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

from daemon.prompt import PromptSpec
from daemon.providers import Generated, Request, create, midjourney_proxy, openai_images
from daemon.settings import Settings

Receive = Callable[[Path], Awaitable[Path]]
"""Puts a picture into a folder; answers the file."""

Ask = Callable[[], Awaitable[bytes]]
"""Gives a picture."""

TIMEOUT = timedelta(minutes=20)
"""One machine sends and receives all of it; how long that takes is not the question."""

MODELS = {
    "openai": "gpt-image-2",
    "google": "gemini-3.1-flash-image",
    "stability": "stable-image-core",
    "midjourney": "v7",
}
BASES = {"openai": "OPENAI_BASE_URL", "google": "GOOGLE_BASE_URL", "stability": "STABILITY_BASE_URL"}


http = httpx.AsyncClient(timeout=TIMEOUT.total_seconds(), limits=httpx.Limits(max_connections=None))
openai_images._DOWNLOAD_TIMEOUT = midjourney_proxy._DOWNLOAD_TIMEOUT = TIMEOUT


class Silent:
    """A reporter that keeps nothing."""

    def submitted(self, request: Any, *, estimate: float | None = None) -> None: ...

    def progress(self, percent: float, message: str | None = None) -> None: ...

    def preview(self, image: Path) -> None: ...

    def warning(self, message: str, *, field: str | None = None, **data: Any) -> None: ...


def by_us(provider: str, url: str, *, ordered: bool) -> Receive:
    """By a provider of ours; `ordered` is what it fetches by asking."""
    base = BASES.get(provider, "MIDJOURNEY_API_URL")
    made: Any = create(provider, Settings(_env_file=None, **{f"{provider.upper()}_API_KEY": "key", base: url}))

    async def receive(folder: Path) -> Path:
        prompt = PromptSpec.parse({"promptSpec": {"basePrompt": "a red fox"}})
        request = Request("run_1", MODELS[provider], prompt, folder)
        got = await (made.check("1", request, Silent()) if ordered else made.generate(request, Silent()))
        assert isinstance(got, Generated)
        return got.path

    return receive


def by_openai(kind: str, url: str) -> Ask:
    """The official SDK."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(api_key="key", base_url=url, max_retries=0, timeout=TIMEOUT.total_seconds())
    asked: dict[str, Any] = {"model": MODELS["openai"], "prompt": "a red fox"}

    async def one_call() -> bytes:
        (item,) = (await client.images.generate(**asked)).data or ()
        return base64.b64decode(item.b64_json or "") if item.url is None else await downloaded(item.url)

    async def stream() -> bytes:
        events: Any = await client.images.generate(**asked, stream=True)
        return base64.b64decode([event.b64_json async for event in events][-1])

    async def background() -> bytes:
        output: Any = (await client.responses.retrieve("resp_1")).output
        return base64.b64decode(output[0].result)

    return {"stream": stream, "background": background}.get(kind, one_call)


def by_google(_: str, url: str) -> Ask:
    """The official SDK."""
    from google import genai
    from google.genai.types import HttpOptions

    options = HttpOptions(base_url=url, timeout=round(1000 * TIMEOUT.total_seconds()))
    client: Any = genai.Client(api_key="key", http_options=options)

    async def ask() -> bytes:
        answer = await client.aio.models.generate_content(model=MODELS["google"], contents="a red fox")
        return answer.candidates[0].content.parts[0].inline_data.data

    return ask


def by_stability(_: str, url: str) -> Ask:
    """There is no SDK; without its header Accept, it answers in JSON."""

    async def ask() -> bytes:
        return base64.b64decode((await http.post(url, headers={"accept": "application/json"})).json()["image"])

    return ask


def by_midjourney(_: str, url: str) -> Ask:
    """There is no SDK. The picture is not even cut."""

    async def ask() -> bytes:
        return await downloaded((await http.get(url)).json()["imageUrl"])

    return ask


async def downloaded(url: str) -> bytes:
    return (await http.get(url)).content


def plainly(provider: str, kind: str, url: str) -> Receive:
    """As the documentation of each API begins."""
    ways = {"openai": by_openai, "google": by_google, "stability": by_stability, "midjourney": by_midjourney}
    ask = ways[provider](kind, url)

    async def receive(folder: Path) -> Path:
        path = folder / "image"
        path.write_bytes(await ask())
        return path

    return receive


async def measure(receive: Receive, count: int) -> dict[str, int]:
    """Bytes of resident memory: before, and at most; and the least size of what came."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder, str(number)) for number in range(count + 1)]
        for each in folders:
            each.mkdir()
        await receive(folders[0])
        idle = resident_anew()
        paths = await asyncio.gather(*(receive(each) for each in folders[1:]))
        return {"idle": idle, "peak": resident("VmHWM"), "least": min(path.stat().st_size for path in paths)}


def resident_anew() -> int:
    """What is resident now; the peak begins anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(name: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    way, provider_name, answer, address, number = sys.argv[1:]
    base_url = f"{address}/{answer}"
    if way == "ours":
        it = by_us(provider_name, base_url, ordered=answer in ("background", "midjourney"))
    else:
        it = plainly(provider_name, answer, base_url)

    sys.stdout.write(json.dumps(asyncio.run(measure(it, int(number)))))
