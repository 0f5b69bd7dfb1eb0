"""Processor time of a picture: a daemon with its children beside a plain script that decodes and encodes once."""

import base64
import time
from io import BytesIO

import psutil
import pytest
from PIL import Image

from tests.bench.heavy_api import HeavyAPI
from tests.bench.report import table
from tests.support.daemon_harness import DaemonHarness, open_harness
from tests.support.postgres import wait_until

COUNT = 64
EDGE = 1024


def photo() -> bytes:
    """A PNG of about 1.5 MB: colours that flow, with a little noise."""
    flow = Image.effect_noise((EDGE // 16, EDGE // 16), 120).resize((EDGE, EDGE), Image.Resampling.BICUBIC)
    bands = [Image.blend(flow.rotate(90 * number), Image.effect_noise((EDGE, EDGE), 30), 0.08) for number in range(3)]
    file = BytesIO()
    Image.merge("RGB", bands).save(file, "PNG")
    return file.getvalue()


def plainly(encoded: bytes) -> None:
    """Undo base64, decode, thumbnail and encode, once."""
    with Image.open(BytesIO(base64.b64decode(encoded))) as image:
        image.load()
        small = image.copy()
        small.thumbnail((512, 512))
        small.save(BytesIO(), "WEBP", quality=80)


def plain_milliseconds(picture: bytes) -> float:
    """Processor time of the plain way for one picture."""
    encoded = base64.b64encode(picture)
    started = time.process_time()
    for _ in range(COUNT):
        plainly(encoded)
    return 1000 * (time.process_time() - started) / COUNT


def spent(process: psutil.Process) -> tuple[float, float]:
    """Processor seconds of a process, and of its children, the living and the dead."""
    own = process.cpu_times()
    children = sum(sum(child.cpu_times()[:2]) for child in process.children(recursive=True))
    return own.user + own.system, own.children_user + own.children_system + children


@pytest.mark.timeout(300)
async def test_pictures_a_second(database: str) -> None:
    picture = photo()
    plain = plain_milliseconds(picture)
    async with HeavyAPI(picture).serving() as api:
        environment = {
            "OPENAI_API_KEY": "key",
            "OPENAI_BASE_URL": f"{api.url}/stream",
            "IMAGE_JOBS_CONCURRENCY": str(COUNT + 1),
        }
        api.expect(COUNT)
        async with open_harness(DaemonHarness, database, environment=environment) as harness:
            await harness.db.execute("update image_jobs.provider_limits set per_minute = null")
            async with harness.run_daemon() as it:
                await it.started()
                process = psutil.Process(it.process.pid)
                (first,) = await harness.insert_runs(1, "openai:gpt-image-2")
                await harness.wait_for_status(first, "completed")
                before = spent(process)
                started = time.monotonic()
                await harness.insert_runs(COUNT, "openai:gpt-image-2")

                async def done() -> bool:
                    return (
                        await harness.db.fetchval("select count(*) from runs where status = 'completed'") == COUNT + 1
                    )

                await wait_until(done, timeout=200)
                seconds = time.monotonic() - started
                after = spent(process)
    daemon, children = (1000 * (b - a) / COUNT for a, b in zip(before, after, strict=True))
    table(
        f"Pictures of {EDGE}x{EDGE} ({len(picture) / 1e6:.1f} MB), {COUNT} at once",
        ("", "ms of processor a picture", "pictures a second"),
        [
            ("daemon", f"{daemon:.0f}", ""),
            ("its children", f"{children:.0f}", ""),
            ("both", f"{daemon + children:.0f}", f"{COUNT / seconds:.1f}"),
            ("plain script", f"{plain:.0f}", ""),
        ],
    )
