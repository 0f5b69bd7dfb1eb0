"""Memory of a process that receives 64 images of 24 MiB at once, in each form that the APIs have."""

import asyncio
import json
import os
import sys
from io import BytesIO

from PIL import Image

from tests.bench.heavy_api import HeavyAPI
from tests.bench.report import table
from tests.support.postgres import ROOT

COUNT = 64
PLAIN_COUNT = 16
"""The plain way would take up to 10 GB for all of them. It takes as much for each, so it is measured with fewer."""
EDGE = 2896
"""Pixels: without compression this square has 24 MiB."""
MIB = 1 << 20

FORMS = [
    ("openai: JSON", "openai", "json"),
    ("openai: a stream", "openai", "stream"),
    ("openai: a URL", "openai", "url"),
    ("openai: in the background", "openai", "background"),
    ("google: inline", "google", "inline"),
    ("stability: raw", "stability", "raw"),
    ("midjourney: a URL, and cut", "midjourney", "midjourney"),
]


def noise() -> bytes:
    """A real image of 24 MiB."""
    file = BytesIO()
    Image.frombytes("RGB", (EDGE, EDGE), os.urandom(3 * EDGE * EDGE)).save(file, "PNG", compress_level=0)
    return file.getvalue()


async def measure_growth(api: HeavyAPI, size: int, *form: str, count: int) -> int:
    """Measure bytes of memory above those of a process that has received one small image."""
    api.expect(count)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.bench.memory_probe", *form, api.url, str(count)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    found = json.loads(out)
    assert found["least"] == size
    return found["peak"] - found["idle"]


async def test_memory_of_64_images_of_24_mib() -> None:
    large = noise()
    rows: list[tuple[str, ...]] = []
    async with HeavyAPI(large).serving() as api:
        for title, provider, kind in FORMS:
            ours = await measure_growth(api, len(large), "ours", provider, kind, count=COUNT)
            plain = (
                await measure_growth(api, len(large), "plain", provider, kind, count=PLAIN_COUNT) * COUNT / PLAIN_COUNT
            )
            rows.append(
                (
                    title,
                    *(f"{grown / MIB:,.0f}" for grown in (ours, plain)),
                    *(f"{grown / COUNT / len(large):.2f}" for grown in (ours, plain)),
                    f"{plain / ours:.0f} x",
                )
            )
    table(
        f"MiB above the idle process, {COUNT} images of {len(large) / MIB:.0f} MiB "
        f"(plain: {PLAIN_COUNT} measured, times {COUNT // PLAIN_COUNT})",
        ("", "ours", "plain", "ours, per byte", "plain, per byte", "less by"),
        rows,
    )
