"""Paint an image, or take a job and paint it later; fail as `metadata.demo` says."""

import asyncio
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from io import BytesIO
from math import log, sqrt
from pathlib import Path
from typing import Annotated, Any

from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from daemon.errors import Refused, Retryable
from daemon.prompt import PromptSpec
from daemon.providers import Charge, Generated, Reporter, Request, Submitted, Waiting
from daemon.providers.demo.models import MODELS
from daemon.providers.demo.painting import paint
from daemon.providers.demo.scene import imagine

_SHORTEST, _LONGEST = 16, 3840
_PREVIEWS = (30, 60)
_NEW_SHARE = 0.6
"""The share of a refined image that is new; the rest is the previous one."""

Seconds = Annotated[float, Field(ge=0, le=3600)]
Sentence = Annotated[str, Field(min_length=1, max_length=500)]


class Options(BaseModel):
    """The options in `metadata.demo`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    fail: Sentence | None = None
    final: bool = False
    refuse: bool | Sentence = False
    throttle: Seconds | None = None
    block: bool = False
    times: Annotated[int, Field(ge=1, le=100)] | None = None
    hang: bool = False
    slow: Seconds = 1.2
    submit: Seconds | None = None
    noop: bool = False
    cost: Annotated[float, Field(ge=0, le=1000)] = 0.0

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> "Options":
        """Read a run's metadata.

        Raises:
            Refused: With code `invalid_request`, naming the first invalid option.
        """
        try:
            return cls.model_validate(metadata.get("demo") or {})
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(["metadata", "demo", *(str(part) for part in first["loc"][:1])])
            raise Refused(
                f"{where[:80]}: {first['msg'][:200]}.",
                code="invalid_request",
                hint=f"The painter knows {', '.join(cls.model_fields)}.",
            ) from error


class Painter:
    """Paint at once, or take jobs: both kinds of provider in one."""

    def __init__(self) -> None:
        self.models = MODELS
        self._throttled: dict[str, int] = {}

    async def aclose(self) -> None:
        """Has no connections to close."""

    async def generate(self, request: Request, report: Reporter) -> Generated | Submitted:
        """Paint, submit a job, or fail as `metadata.demo` says."""
        options = Options.of(request.metadata)
        size = _size(request.prompt, report)
        if request.prompt.quality != "standard":
            report.warning("The painter has one quality.", field="quality", feature="unsupported")
        report.submitted(
            {
                "model": request.model,
                "prompt": request.prompt.text,
                "size": f"{size[0]}x{size[1]}",
                "seed": request.prompt.seed,
                "demo": options.model_dump(exclude_unset=True),
            },
            estimate=options.cost,
        )
        if options.hang:
            await asyncio.Event().wait()
        self._throttle(request, options)
        if options.submit is not None:
            if request.previous_image is not None:
                report.warning("Orders are painted anew.", field="previousImage", feature="ignored")
            job = _Job.submit(options.submit)
            return Submitted(job.id, "The painter took the order", timedelta(seconds=options.submit))
        _fail_as_told(request, options)
        return await _picture(request, options, size, report, options.slow)

    async def check(self, job_id: str, request: Request, report: Reporter) -> Generated | Waiting:
        """Paint the image of a job, once it is due. Any daemon can: the job id says when that is."""
        job = _Job.read(job_id)
        if job.progress < 100:
            return Waiting(job.progress, "The painter is at it")
        options = Options.of(request.metadata)
        _fail_as_told(request, options)
        return await _picture(request, options, _size(request.prompt), report, 0)

    async def cancel(self, job_id: str) -> Charge:  # noqa: ARG002 - there is nothing to stop: a job is painted when it is checked
        """Return that nothing was charged."""
        return Charge(charged=False)

    def _throttle(self, request: Request, options: Options) -> None:
        if options.throttle is None:
            return
        if options.times is not None:
            count = self._throttled.pop(request.run_id, 0)
            if count >= options.times:
                return
            self._throttled[request.run_id] = count + 1
        raise Retryable(
            "The painter asks us to slow down.",
            code="rate_limited",
            hint="",
            retry_in=timedelta(seconds=options.throttle),
            accepted=False,
            blocks="provider" if options.block else None,
        )


@dataclass(frozen=True, slots=True)
class _Job:
    """A job, whose id carries its whole state: when it was submitted and when it is ready, in epoch ms."""

    submitted_at: int
    ready_at: int
    id: str

    @classmethod
    def submit(cls, seconds: float) -> "_Job":
        now = int(time.time() * 1000)
        ready = now + round(seconds * 1000)
        return cls(now, ready, f"demo-{now}-{ready}-{secrets.token_hex(4)}")

    @classmethod
    def read(cls, job_id: str) -> "_Job":
        match job_id.split("-"):
            case ["demo", submitted, ready, _] if submitted.isdigit() and ready.isdigit():
                return cls(int(submitted), int(ready), job_id)
            case _:
                raise Refused(
                    "The painter knows nothing of this order.",
                    code="unknown_job",
                    hint="Requeue the run to order anew.",
                )

    @property
    def progress(self) -> float:
        now = time.time() * 1000
        if now >= self.ready_at:
            return 100
        return max(0, 100 * (now - self.submitted_at) / max(1, self.ready_at - self.submitted_at))


def _fail_as_told(request: Request, options: Options) -> None:
    if options.times is not None and request.attempt > options.times:
        return
    if options.refuse:
        raise Refused(
            options.refuse if isinstance(options.refuse, str) else "The painter will not paint this.",
            code="content_policy",
            hint="Rephrase the prompt.",
        )
    if options.fail is not None and options.final:
        raise Refused(options.fail, code="demo_failed", hint="metadata.demo asked for it.")
    if options.fail is not None:
        raise Retryable(options.fail, code="demo_failed", hint="")


async def _picture(
    request: Request, options: Options, size: tuple[int, int], report: Reporter, seconds: float
) -> Generated:
    path = request.workdir / "picture.png"
    if options.noop:
        path.write_bytes(_tiny())
        return Generated(path, options.cost, seed=request.prompt.seed)
    canvas = await asyncio.to_thread(_Canvas, request, size)
    begin = asyncio.get_running_loop().time()
    before = 0.0
    # In steps, so that it can be cancelled, and does not keep the threads from other runs.
    while (percent := await asyncio.to_thread(canvas.step)) is not None:
        report.progress(0.95 * percent, "Painting")
        for mark in _PREVIEWS:
            if before < mark <= percent:
                report.preview(await asyncio.to_thread(canvas.preview, mark))
        before = percent
        await asyncio.sleep(max(0, begin + seconds * percent / 100 - asyncio.get_running_loop().time()))
    await asyncio.to_thread(canvas.save, path)
    return Generated(path, options.cost, seed=request.prompt.seed)


class _Canvas:
    """An image that is being painted. Its methods take CPU: they run in threads, one at a time."""

    def __init__(self, request: Request, size: tuple[int, int]) -> None:
        self._folder = request.workdir
        self._steps = paint(imagine(request.prompt), size)
        self._image = Image.new("RGB", size)
        self._previous = None if request.previous_image is None else _opened(request.previous_image, size)

    def step(self) -> float | None:
        """Paint one step; return the percentage that is done, None at the end."""
        percent, self._image = next(self._steps, (None, self._image))
        return percent

    def preview(self, mark: int) -> Path:
        path = self._folder / f"preview-{mark}.webp"
        small = ImageOps.contain(self._mixed(), (512, 512))
        small.save(path, "WEBP", quality=80, method=0)
        return path

    def save(self, path: Path) -> None:
        self._mixed().save(path, "PNG", compress_level=4)

    def _mixed(self) -> Image.Image:
        return self._image if self._previous is None else Image.blend(self._previous, self._image, _NEW_SHARE)


def _opened(path: Path, size: tuple[int, int]) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.fit(image.convert("RGB"), size)
    except OSError as error:
        raise Refused(
            "The previous image cannot be read.",
            code="input_image_invalid",
            hint="Choose another previousImage, or leave it out.",
        ) from error


@cache
def _tiny() -> bytes:
    file = BytesIO()
    *_, (_, image) = paint(imagine(PromptSpec("a quiet evening")), (64, 64))
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _size(prompt: PromptSpec, report: Reporter | None = None) -> tuple[int, int]:
    """Return the size to paint: the requested one, within the limits. A change is a warning in `report`."""
    ratio = prompt.aspect_ratio[0] / prompt.aspect_ratio[1] if prompt.aspect_ratio else 1
    wanted = prompt.size or (round(1024 * sqrt(ratio)), round(1024 / sqrt(ratio)))
    width, height = (min(max(edge, _SHORTEST), _LONGEST) for edge in wanted)
    if report and prompt.size and prompt.aspect_ratio and abs(log(wanted[0] / wanted[1] / ratio)) > 0.03:
        report.warning("size and aspectRatio differ; the size was taken.", field="aspectRatio", feature="ignored")
    if report and (width, height) != wanted:
        report.warning(f"It is {width}x{height} instead.", field="size", feature="unsupported")
    return width, height
