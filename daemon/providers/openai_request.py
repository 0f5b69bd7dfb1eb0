"""From a prompt to the fields of the Images API. Whatever is lost on the way is a warning."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil, floor, sqrt
from pathlib import Path
from typing import Any

from daemon.prompt import MAX_PROMPT, PromptSpec
from daemon.providers import Request
from daemon.providers.mapping import Warn, content_type, distance, far, wanted_shape, whole_text
from daemon.providers.openai_models import FIXED_SIZES, estimate, generation

Size = tuple[int, int]

PREVIEWS = 2
"""Partial images that are asked for; each costs about 100 output tokens."""
_STEP = 16
_LONGEST = 3840
_FEWEST_PIXELS = 655_360
_MOST_PIXELS = 3840 * 2160
_STEEPEST = 3.0
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
    fields: dict[str, Any] = {"model": request.model, "prompt": whole_text(prompt, warn, limit=MAX_PROMPT, fold=True)}
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
    return ImagesCall(fields, request.previous_image, content_type(request.previous_image), size)


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
    shape = wanted_shape(prompt, asked.warn)
    if prompt.size is None:
        return _for_ratio(asked, shape)
    if asked.number is None:
        return shape
    size = _fixed(shape) if asked.number < 2 else _possible(*shape)
    if size != shape:
        asked.instead("size", f"{shape[0]}x{shape[1]}", size)
    return size


def _for_ratio(asked: _Asked, ratio: tuple[int, int]) -> Size:
    if asked.number is not None and asked.number < 2:
        size = _fixed(ratio)
    else:
        wanted = sqrt(ratio[0] / ratio[1])
        size = _RATIO_SIZES.get(ratio) or _possible(1024 * wanted, 1024 / wanted)
    if far(size, ratio):
        asked.instead("aspectRatio", f"{ratio[0]}:{ratio[1]}", size)
    return size


def _fixed(shape: tuple[int, int]) -> Size:
    sizes = [(int(w), int(h)) for w, h in (size.split("x") for size in FIXED_SIZES)]
    return min(sizes, key=lambda size: distance(size, shape))


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
