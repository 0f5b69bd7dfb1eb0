"""From a prompt to the fields of the Images API. Whatever is lost on the way is a warning."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil, floor, log, sqrt
from pathlib import Path
from typing import Any, Protocol

from daemon.errors import Refused
from daemon.prompt import MAX_PROMPT, PromptSpec
from daemon.providers import Request
from daemon.providers.openai_models import FIXED_SIZES, estimate, generation

Size = tuple[int, int]

PREVIEWS = 2
"""Partial images that are asked for; each costs about 100 output tokens."""
_STEP = 16
_LONGEST = 3840
_FEWEST_PIXELS = 655_360
_MOST_PIXELS = 3840 * 2160
_STEEPEST = 3.0
_TOLERANCE = 0.03
"""Ratios that differ by less count as equal: 1792x1024 is 16:9 to whoever asks for it."""
_RATIO_SIZES: dict[tuple[int, int], Size] = {
    (1, 1): (1024, 1024),
    (16, 9): (1536, 864),
    (9, 16): (864, 1536),
    (3, 2): (1536, 1024),
    (2, 3): (1024, 1536),
    (4, 3): (1152, 864),
    (3, 4): (864, 1152),
    (5, 4): (1120, 896),
    (4, 5): (896, 1120),
    (21, 9): (1568, 672),
}
_QUALITIES = {"standard": "medium", "hd": "high"}
_FORMATS = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpeg"), (b"RIFF", "webp"))


class Warn(Protocol):
    """`Reporter.warning`."""

    def __call__(self, message: str, *, field: str | None = None, **data: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class ImagesCall:
    """One call of the Images API.

    Args:
        fields: What is sent, without the image.
        image: The picture to edit; None to make one from nothing.
        image_type: Its content type.
        size: Width and height that were asked for.
    """

    fields: Mapping[str, Any]
    image: Path | None = None
    image_type: str = ""
    size: Size | None = None

    @property
    def streams(self) -> bool:
        """Whether previews are asked for."""
        return "stream" in self.fields

    @property
    def estimate(self) -> float | None:
        """USD; None if not known."""
        previews = self.fields.get("partial_images", 0)
        return estimate(self.fields["model"], self.size, self.fields.get("quality"), previews=previews)

    def without_stream(self) -> "ImagesCall":
        """The same, for servers and accounts that may not stream."""
        return replace(self, fields={k: v for k, v in self.fields.items() if k not in ("stream", "partial_images")})

    def described(self) -> dict[str, Any]:
        """The exact request, for the audit trail; the image by its type and size."""
        if self.image is None:
            return {"endpoint": "images/generations", **self.fields}
        image = f"{self.image_type}, {self.image.stat().st_size} bytes"
        return {"endpoint": "images/edits", **self.fields, "image": image}


def build(request: Request, warn: Warn) -> ImagesCall:
    """Maps a run to a call.

    OpenAI's own models (`gpt-image-…`, wherever they are served) are streamed and are never sent `response_format`,
    which they refuse. Any other name is taken for a compatible server's: it gets `response_format=b64_json`, sizes
    as they are, quality only if it is not the usual one, and no stream.

    Raises:
        Refused: If the previous image is of a type that cannot be edited.
    """
    prompt, number = request.prompt, generation(request.model)
    fields: dict[str, Any] = {"model": request.model, "prompt": _text(prompt, warn)}
    size = _size(_Asked(request.model, number, warn), prompt)
    fields["size"] = f"{size[0]}x{size[1]}"
    if number is None:
        fields["response_format"] = "b64_json"
        if prompt.quality != "standard":
            fields["quality"] = prompt.quality
    else:
        fields["quality"] = _quality(request.model, number, prompt.quality, warn)
        fields |= {"stream": True, "partial_images": PREVIEWS}
    if prompt.seed is not None:
        warn(f"{request.model} has no seed: the picture will differ each time.", field="seed", feature="unsupported")
    if request.previous_image is None:
        return ImagesCall(fields, size=size)
    return ImagesCall(fields, request.previous_image, _content_type(request.previous_image), size)


def _text(prompt: PromptSpec, warn: Warn) -> str:
    avoid = ""
    if prompt.negative_prompt:
        avoid = f"\n\nAvoid: {prompt.negative_prompt}"[:MAX_PROMPT]
        warn("There is no negative prompt here; it was added to the prompt.", field="negativePrompt", feature="folded")
    room = MAX_PROMPT - len(avoid)
    text = prompt.text
    if len(text) > room:
        warn(f"The prompt was cut to {MAX_PROMPT:,} characters.", field="basePrompt", feature="cut")
    return text[:room] + avoid


def _quality(model: str, number: float, quality: str, warn: Warn) -> str:
    quality = _QUALITIES.get(quality, quality)
    if quality in ("xhigh", "max") and number < 2.5:
        warn(f"{model} draws at most in high quality; {quality} became high.", field="quality", feature="unsupported")
        return "high"
    return quality


@dataclass(frozen=True, slots=True)
class _Asked:
    model: str
    number: float | None
    warn: Warn = field(repr=False)

    def instead(self, name: str, wanted: str, size: Size) -> None:
        self.warn(
            f"{self.model} does not draw {wanted}; it is {size[0]}x{size[1]} instead.",
            field=name,
            feature="unsupported",
            used=f"{size[0]}x{size[1]}",
        )


def _size(asked: _Asked, prompt: PromptSpec) -> Size:
    ratio = prompt.aspect_ratio
    if prompt.size is None:
        return _for_ratio(asked, ratio or (1, 1))
    width, height = prompt.size
    if ratio is not None and abs(log(width / height) - log(ratio[0] / ratio[1])) > _TOLERANCE:
        asked.warn(
            f"size {width}x{height} is not {ratio[0]}:{ratio[1]}; the size was taken.",
            field="aspectRatio",
            feature="ignored",
        )
    if asked.number is None:
        return prompt.size
    size = _fixed(width / height) if asked.number < 2 else _possible(width, height)
    if size != prompt.size:
        asked.instead("size", f"{width}x{height}", size)
    return size


def _for_ratio(asked: _Asked, ratio: tuple[int, int]) -> Size:
    wanted = ratio[0] / ratio[1]
    if asked.number is not None and asked.number < 2:
        size = _fixed(wanted)
    else:
        size = _RATIO_SIZES.get(ratio) or _possible(1024 * sqrt(wanted), 1024 / sqrt(wanted))
    if abs(log(size[0] / size[1]) - log(wanted)) > _TOLERANCE:
        asked.instead("aspectRatio", f"{ratio[0]}:{ratio[1]}", size)
    return size


def _fixed(ratio: float) -> Size:
    sizes = [(int(w), int(h)) for w, h in (size.split("x") for size in FIXED_SIZES)]
    return min(sizes, key=lambda size: abs(log(size[0] / size[1]) - log(ratio)))


def _possible(width: float, height: float) -> Size:
    """The nearest size that the second generation draws.

    Both edges divisible by 16 and at most 3840, a ratio of at most 3:1, 655,360 to 8,294,400 pixels.
    """
    ratio = min(max(width / height, 1 / _STEEPEST), _STEEPEST)
    pixels = min(max(width * height, _FEWEST_PIXELS), _MOST_PIXELS)
    longest = min(sqrt(pixels * max(ratio, 1 / ratio)), _LONGEST)
    size = longest, longest / max(ratio, 1 / ratio)
    rounded = [max(_STEP, round(edge / _STEP) * _STEP) for edge in size]
    if rounded[0] * rounded[1] < _FEWEST_PIXELS:
        rounded = [ceil(edge / _STEP) * _STEP for edge in size]
    elif rounded[0] * rounded[1] > _MOST_PIXELS:
        rounded = [floor(edge / _STEP) * _STEP for edge in size]
    long, short = rounded
    while long > _STEEPEST * short:
        short += _STEP
    return (long, short) if ratio >= 1 else (short, long)


def _content_type(image: Path) -> str:
    with image.open("rb") as file:
        head = file.read(12)
    for magic, kind in _FORMATS:
        if head.startswith(magic):
            return f"image/{kind}"
    raise Refused(
        "The previous image is neither PNG, JPEG nor WebP.",
        code="input_image_invalid",
        hint="Choose another previousImage, or leave it out.",
    )
