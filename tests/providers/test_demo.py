import asyncio
from dataclasses import dataclass, field
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat

from daemon.errors import Refused, Retryable, RunError
from daemon.prompt import PromptSpec
from daemon.providers import Deferred, Generated, Provider, Request, Submitted, Waiting, create
from daemon.providers.demo.provider import Painter
from daemon.settings import Settings
from tests.support.reporter import Recorder

AT_ONCE = {"slow": 0}


@dataclass
class Harness:
    """The painter, and what it reports."""

    folder: Path
    painter: Painter = field(default_factory=Painter)
    recorder: Recorder = field(default_factory=Recorder)

    def request(self, demo: Any = AT_ONCE, *, attempt: int = 1, previous: Path | None = None, **spec: Any) -> Request:
        spec = {"basePrompt": "a red fox in a forest", "size": "256x256", **spec}
        if "aspectRatio" in spec:
            del spec["size"]
        prompt = PromptSpec.parse({"promptSpec": spec})
        return Request("run_1", "painter", prompt, self.folder, attempt, previous, {"demo": demo})

    async def paint(self, demo: Any = AT_ONCE, **spec: Any) -> bytes:
        made = await self.painter.generate(self.request(demo, **spec), self.recorder)
        assert isinstance(made, Generated)
        return made.path.read_bytes()

    async def fail(self, demo: Any, *, attempt: int = 1) -> RunError:
        with pytest.raises(RunError) as caught:
            await self.painter.generate(self.request(demo, attempt=attempt), self.recorder)
        return caught.value


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


def opened(image: bytes) -> Image.Image:
    with Image.open(BytesIO(image)) as picture:
        return picture.convert("RGB")


def difference(one: bytes, other: bytes) -> float:
    """Of two pictures of one size, per pixel, 0-255."""
    return sum(ImageStat.Stat(ImageChops.difference(opened(one), opened(other))).mean) / 3


@pytest.mark.parametrize(("demo", "there"), [("1", True), ("0", False)])
def test_the_painter_is_there_only_where_it_is_wanted(demo: str, there: bool) -> None:
    painter = create("demo", Settings(_env_file=None, IMAGE_JOBS_DEMO=demo))

    assert isinstance(painter, Provider) is there
    assert isinstance(painter, Deferred) is there


async def test_the_same_prompt_size_and_seed_give_the_same_bytes(harness: Harness) -> None:
    assert await harness.paint(seed=7) == await harness.paint(seed=7)


@pytest.mark.parametrize(
    "other", [{"seed": 8}, {"seed": 7, "styleModifiers": ["soft"]}, {"seed": 7, "basePrompt": "sea"}]
)
async def test_another_seed_or_prompt_gives_another_picture(other: dict[str, Any], harness: Harness) -> None:
    assert difference(await harness.paint(seed=7), await harness.paint(**other)) > 2


async def test_negative_prompt_is_not_painted(harness: Harness) -> None:
    foxes = opened(await harness.paint(basePrompt="a fox at night"))
    none = opened(await harness.paint(basePrompt="a fox at night", negativePrompt="fox"))

    def orange(picture: Image.Image) -> int:
        red, _, blue = picture.split()
        return ImageChops.subtract(red, blue).point([0] * 100 + [255] * 156).histogram()[255]

    assert orange(foxes) > 300
    assert orange(none) == 0


@pytest.mark.parametrize(
    ("spec", "size", "warned"),
    [
        ({"size": "1024x1024"}, (1024, 1024), set()),
        ({"aspectRatio": "16:9"}, (1365, 768), set()),
        ({"aspectRatio": "1:1"}, (1024, 1024), set()),
        ({"size": "16x9000"}, (16, 3840), {"size"}),
        ({"size": "1x1"}, (16, 16), {"size"}),
        ({"size": "64x64", "quality": "hd"}, (64, 64), {"quality"}),
    ],
)
async def test_picture_has_the_requested_size_or_ratio(
    spec: dict[str, Any], size: tuple[int, int], warned: set[str], harness: Harness
) -> None:
    assert opened(await harness.paint(**spec)).size == size
    assert harness.recorder.warned == warned


async def test_progress_grows_and_two_previews_are_published(harness: Harness) -> None:
    await harness.paint(size="1024x1024")

    assert len(harness.recorder.percents) >= 8
    assert harness.recorder.percents == sorted(set(harness.recorder.percents))
    assert harness.recorder.percents[-1] <= 100
    assert [opened(preview).size for preview in harness.recorder.previews] == [(512, 512), (512, 512)]
    assert difference(*harness.recorder.previews) > 2


async def test_the_loop_stays_free_while_it_paints(harness: Harness) -> None:
    painting = asyncio.create_task(harness.paint(size="1024x1024"))
    steps = 0
    while not painting.done():
        await asyncio.sleep(0)
        steps += 1

    assert steps > 50
    assert await painting


async def test_it_takes_as_long_as_it_is_told(harness: Harness) -> None:
    loop = asyncio.get_running_loop()
    begin = loop.time()

    await harness.paint({"slow": 0.5}, size="64x64")

    assert 0.5 <= loop.time() - begin < 5


async def test_a_previous_image_is_refined(harness: Harness) -> None:
    previous = harness.folder / "previous.png"
    previous.write_bytes(await harness.paint(basePrompt="a sunset"))
    plain = await harness.paint(basePrompt="night")

    refined = await harness.paint(basePrompt="night", previous=previous)

    assert 2 < difference(refined, plain) < difference(previous.read_bytes(), plain)
    assert 2 < difference(refined, previous.read_bytes()) < difference(previous.read_bytes(), plain)


async def test_a_previous_image_that_is_none_is_refused(harness: Harness) -> None:
    previous = harness.folder / "previous.png"
    previous.write_bytes(b"<html>")

    with pytest.raises(Refused) as caught:
        await harness.paint(previous=previous)

    assert caught.value.code == "input_image_invalid"


async def test_it_is_free_unless_told_otherwise(harness: Harness) -> None:
    free = await harness.painter.generate(harness.request(), harness.recorder)
    paid = await harness.painter.generate(harness.request({"noop": True, "cost": 0.04}), harness.recorder)

    assert isinstance(free, Generated)
    assert isinstance(paid, Generated)
    assert (free.cost, paid.cost) == (0.0, 0.04)
    assert harness.recorder.estimates == [0.0, 0.04]


async def test_noop_gives_a_tiny_picture_without_painting(harness: Harness) -> None:
    tiny = await harness.paint({"noop": True}, size="1024x1024")

    assert opened(tiny).size == (64, 64)
    assert harness.recorder.percents == []


@pytest.mark.parametrize(
    ("demo", "kind", "code", "message"),
    [
        ({"fail": "The brush broke."}, Retryable, "demo_failed", "The brush broke."),
        ({"fail": "The brush broke.", "final": True}, Refused, "demo_failed", "The brush broke."),
        ({"refuse": True}, Refused, "content_policy", "The painter will not paint this."),
        ({"refuse": "No foxes."}, Refused, "content_policy", "No foxes."),
    ],
)
async def test_it_fails_as_it_is_told(
    demo: dict[str, Any], kind: type[RunError], code: str, message: str, harness: Harness
) -> None:
    error = await harness.fail(demo)

    assert isinstance(error, kind)
    assert (error.code, error.message) == (code, message)


async def test_it_fails_only_as_often_as_it_is_told(harness: Harness) -> None:
    demo = {"fail": "The brush broke.", "times": 2, "noop": True}

    assert isinstance(await harness.fail(demo, attempt=1), Retryable)
    assert isinstance(await harness.fail(demo, attempt=2), Retryable)
    assert await harness.paint(demo, attempt=3)


@pytest.mark.parametrize(("block", "blocks"), [(False, None), (True, "provider")])
async def test_it_throttles_without_having_accepted_anything(block: bool, blocks: str | None, harness: Harness) -> None:
    error = await harness.fail({"throttle": 5, "block": block})

    assert isinstance(error, Retryable)
    assert (error.code, error.accepted, error.blocks) == ("rate_limited", False, blocks)
    assert error.retry_in == timedelta(seconds=5)


async def test_throttling_ends_after_the_given_times(harness: Harness) -> None:
    demo = {"throttle": 0, "times": 2, "noop": True}

    await harness.fail(demo)
    await harness.fail(demo)
    assert await harness.paint(demo)


async def test_it_hangs_until_it_is_cancelled(harness: Harness) -> None:
    hanging = asyncio.create_task(harness.paint({"hang": True}))
    await harness.recorder.until(lambda: harness.recorder.requests)

    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging


async def test_it_stops_in_the_middle_when_it_is_cancelled(harness: Harness) -> None:
    painting = asyncio.create_task(harness.paint({"slow": 3600}))
    await harness.recorder.until(lambda: harness.recorder.percents)

    painting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await painting

    assert not (harness.folder / "picture.png").exists()


async def test_job_ignores_the_previous_image_with_a_warning(harness: Harness) -> None:
    previous = harness.folder / "previous.png"
    previous.write_bytes(await harness.paint())

    job = await harness.painter.generate(harness.request({"submit": 0}, previous=previous), harness.recorder)

    assert isinstance(job, Submitted)
    assert harness.recorder.warned == {"previousImage"}


async def test_job_is_painted_by_any_daemon_once_it_is_ready(harness: Harness) -> None:
    job = await harness.painter.generate(harness.request({"submit": 0}), harness.recorder)
    assert isinstance(job, Submitted)

    made = await Painter().check(job.job_id, harness.request({"submit": 0}), harness.recorder)

    assert isinstance(made, Generated)
    assert made.path.read_bytes() == await harness.paint()
    assert job.check_in == timedelta(0)


async def test_job_that_is_not_ready_has_progress(harness: Harness) -> None:
    request = harness.request({"submit": 3600})
    job = await harness.painter.generate(request, harness.recorder)
    assert isinstance(job, Submitted)

    response = await Painter().check(job.job_id, request, harness.recorder)
    await Painter().cancel(job.job_id)

    assert isinstance(response, Waiting)
    assert response.progress is not None
    assert 0 <= response.progress < 1


async def test_job_that_is_to_fail_fails_when_checked(harness: Harness) -> None:
    request = harness.request({"submit": 0, "fail": "The brush broke.", "final": True})
    job = await harness.painter.generate(request, harness.recorder)
    assert isinstance(job, Submitted)

    with pytest.raises(Refused, match="The brush broke"):
        await harness.painter.check(job.job_id, request, harness.recorder)


@pytest.mark.parametrize("job_id", ["", "demo", "demo-1-x-2", "resp_123"])
async def test_unknown_job_is_refused(job_id: str, harness: Harness) -> None:
    with pytest.raises(Refused) as caught:
        await harness.painter.check(job_id, harness.request(), harness.recorder)

    assert caught.value.code == "unknown_job"


@pytest.mark.parametrize(
    ("demo", "where"),
    [
        ({"explode": True}, "metadata.demo.explode: "),
        ({"slow": "long"}, "metadata.demo.slow: "),
        ({"slow": -1}, "metadata.demo.slow: "),
        ({"fail": True}, "metadata.demo.fail: "),
        ({"times": 0}, "metadata.demo.times: "),
        ({"hang": 1}, "metadata.demo.hang: "),
        ("fail", "metadata.demo: "),
    ],
)
async def test_nonsense_in_the_options_is_refused_by_name(demo: Any, where: str, harness: Harness) -> None:
    error = await harness.fail(demo)

    assert isinstance(error, Refused)
    assert error.code == "invalid_request"
    assert error.message.startswith(where)
    assert "throttle" in error.hint
