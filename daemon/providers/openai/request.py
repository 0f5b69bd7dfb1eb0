"""Map a prompt to a `Drawing`, and to a call of the Images API. A value that is changed or lost is a warning."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil, floor, sqrt
from pathlib import Path
from typing import Any

from daemon.prompt import MAX_PROMPT, PromptSpec
from daemon.providers import Request
from daemon.providers.openai.models import FIXED_SIZES, RATIO_SIZES, Size, estimate, generation
from daemon.providers.prompts import Warn, content_type, prompt_text, requested_shape, shape_distance, shapes_differ

PREVIEWS = 2
"""Partial images per call; each costs about 100 output tokens."""
_STEP = 16
_LONGEST = 3840
_FEWEST_PIXELS = 655_360
_MOST_PIXELS = 3840 * 2160
_STEEPEST = 3.0
_QUALITIES = {"standard": "medium", "hd": "high"}


@dataclass(frozen=True, slots=True)
class Drawing:
    """The image to generate, in OpenAI's terms, for either API.

    Args:
        model: The image model.
        text: The prompt.
        size: Width and height.
        quality: None leaves it to the server.
        image: The image to edit; None to generate from the prompt alone.
        image_type: Its content type.
    """

    model: str
    text: str
    size: Size
    quality: str | None
    image: Path | None = None
    image_type: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Size and quality, as both APIs name them."""
        options = {"size": f"{self.size[0]}x{self.size[1]}"}
        return options if self.quality is None else {**options, "quality": self.quality}

    @property
    def image_described(self) -> str:
        """The image to edit, for the audit trail: its type and size."""
        return "" if self.image is None else f"{self.image_type}, {self.image.stat().st_size} bytes"

    def estimate(self, *, previews: int = 0) -> float | None:
        """USD; None if not known."""
        return estimate(self.model, self.size, self.quality, previews=previews)


@dataclass(frozen=True, slots=True)
class ImagesCall:
    """One call of the Images API.

    Args:
        drawing: The image to generate.
        fields: The fields to send, without the image.
    """

    drawing: Drawing
    fields: Mapping[str, Any]

    @property
    def streams(self) -> bool:
        """Whether previews are requested."""
        return "stream" in self.fields

    @property
    def estimate(self) -> float | None:
        """USD; None if not known."""
        return self.drawing.estimate(previews=self.fields.get("partial_images", 0))

    def without_stream(self) -> "ImagesCall":
        """Return the same call without a stream, for servers and accounts that may not stream."""
        return replace(self, fields={k: v for k, v in self.fields.items() if k not in ("stream", "partial_images")})

    def described(self) -> dict[str, Any]:
        """Return the exact request for the audit trail; the image by its type and size."""
        if self.drawing.image is None:
            return {"endpoint": "images/generations", **self.fields}
        return {"endpoint": "images/edits", **self.fields, "image": self.drawing.image_described}


def build(request: Request, warn: Warn) -> ImagesCall:
    """Map a run to a call of the Images API.

    OpenAI's own models (`gpt-image-…`, wherever they are served) are streamed and are never sent `response_format`,
    which they refuse. Any other name is taken for a compatible server's: it gets `response_format=b64_json` and no
    stream.

    Raises:
        Refused: If the previous image is of a type that cannot be edited.
    """
    drawing = draw(request, warn)
    fields: dict[str, Any] = {"model": drawing.model, "prompt": drawing.text, **drawing.options}
    if generation(drawing.model) is None:
        return ImagesCall(drawing, {**fields, "response_format": "b64_json"})
    return ImagesCall(drawing, {**fields, "stream": True, "partial_images": PREVIEWS})


def draw(request: Request, warn: Warn) -> Drawing:
    """Map a run to a `Drawing`. Models that are not OpenAI's own get the size as it is, and a quality only if it is not the
    default.

    Raises:
        Refused: If the previous image is of a type that cannot be edited.
    """
    prompt, model, image = request.prompt, request.model, request.previous_image
    number = generation(model)
    text = prompt_text(prompt, warn, limit=MAX_PROMPT, fold=True)
    size = _size(_Asked(model, number, warn), prompt)
    if number is not None:
        quality = _quality(model, number, prompt.quality, warn)
    else:
        quality = None if prompt.quality == "standard" else prompt.quality
    if prompt.seed is not None:
        warn(f"{model} has no seed: the picture will differ each time.", field="seed", feature="unsupported")
    return Drawing(model, text, size, quality, image, content_type(image) if image is not None else "")


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
    shape = requested_shape(prompt, asked.warn)
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
        size = RATIO_SIZES.get(ratio) or _possible(1024 * wanted, 1024 / wanted)
    if shapes_differ(size, ratio):
        asked.instead("aspectRatio", f"{ratio[0]}:{ratio[1]}", size)
    return size


def _fixed(shape: tuple[int, int]) -> Size:
    sizes = [(int(w), int(h)) for w, h in (size.split("x") for size in FIXED_SIZES)]
    return min(sizes, key=lambda size: shape_distance(size, shape))


def _possible(width: float, height: float) -> Size:
    """Return the nearest size of the second generation.

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
