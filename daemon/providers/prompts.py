"""From a prompt to what an API of ratios and plain texts takes. Whatever is lost on the way is a warning."""

from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any, Protocol

from daemon.errors import Refused
from daemon.prompt import PromptSpec

_TOLERANCE = 0.03
"""Ratios that differ by less count as equal: 1792x1024 is 16:9 to whoever asks for it."""
_FORMATS = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp"))


class Warn(Protocol):
    """`Reporter.warning`."""

    def __call__(self, message: str, *, field: str | None = None, **data: Any) -> None: ...


def whole_text(prompt: PromptSpec, warn: Warn, *, limit: int, fold: bool) -> str:
    """The prompt in one text of at most `limit` characters, with what is to be avoided at its end if it is to be folded in."""
    avoid = ""
    if fold and prompt.negative_prompt:
        avoid = f"\n\nAvoid: {prompt.negative_prompt}"[:limit]
        warn("There is no negative prompt here; it was added to the prompt.", field="negativePrompt", feature="folded")
    return cut(prompt.text, warn, limit=limit - len(avoid), field="basePrompt") + avoid


def cut(text: str, warn: Warn, *, limit: int, field: str) -> str:
    """At most `limit` characters of a text."""
    if len(text) > limit:
        warn(f"{field} was cut to {limit:,} characters.", field=field, feature="cut")
    return text[:limit]


def wanted_shape(prompt: PromptSpec, warn: Warn) -> tuple[int, int]:
    """Width and height that were asked for, or a ratio that says the same; a square where nothing was."""
    ratio, size = prompt.aspect_ratio, prompt.size
    if ratio is not None and size is not None and far(ratio, size):
        warn(
            f"size {size[0]}x{size[1]} is not {ratio[0]}:{ratio[1]}; the size was taken.",
            field="aspectRatio",
            feature="ignored",
        )
    return size or ratio or (1, 1)


def nearest_ratio(prompt: PromptSpec, offered: Sequence[str], warn: Warn, *, model: str) -> str:
    """The ratio on offer that is nearest to the size that was asked for, or to the ratio where there is no size."""
    wanted = wanted_shape(prompt, warn)
    nearest = min(offered, key=lambda name: distance(_pair(name), wanted))
    if prompt.size is None and far(_pair(nearest), wanted):
        warn(
            f"{model} does not draw {wanted[0]}:{wanted[1]}; it is {nearest} instead.",
            field="aspectRatio",
            feature="unsupported",
            used=nearest,
        )
    return nearest


def fitting_seed(seed: int, highest: int, warn: Warn, *, model: str) -> int:
    """The seed, or one that follows from it where it is too large."""
    fitting = seed % (highest + 1)
    if fitting != seed:
        warn(
            f"{model} has seeds up to {highest:,}; {seed:,} became {fitting:,}.",
            field="seed",
            feature="unsupported",
            used=fitting,
        )
    return fitting


def content_type(image: Path) -> str:
    """The type of a previous image, by its first bytes.

    Raises:
        Refused: If it is neither PNG, JPEG nor WebP.
    """
    with image.open("rb") as file:
        head = file.read(12)
    for magic, kind in _FORMATS:
        if head.startswith(magic):
            return kind
    raise Refused(
        "The previous image is neither PNG, JPEG nor WebP.",
        code="input_image_invalid",
        hint="Choose another previousImage, or leave it out.",
    )


def distance(one: tuple[int, int], other: tuple[int, int]) -> float:
    """How unlike two shapes are; 0 where one is the other, larger or smaller."""
    return abs(log(one[0] / one[1]) - log(other[0] / other[1]))


def far(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two shapes are not the same to whoever asks for one of them."""
    return distance(one, other) > _TOLERANCE


def _pair(name: str) -> tuple[int, int]:
    width, _, height = name.partition(":")
    return int(width), int(height)
