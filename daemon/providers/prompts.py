"""Map a prompt to the fields that most APIs have: text, ratio, seed. A value that is changed or lost is a warning."""

from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any, Protocol

from daemon.errors import Refused
from daemon.prompt import PromptSpec

_TOLERANCE = 0.03
"""Ratios that differ by less count as equal: 1792x1024 is meant as 16:9."""
_FORMATS = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp"))


class Warn(Protocol):
    """`Reporter.warning`."""

    def __call__(self, message: str, *, field: str | None = None, **data: Any) -> None: ...


def prompt_text(prompt: PromptSpec, warn: Warn, *, limit: int, fold: bool) -> str:
    """Return the prompt as one text of at most `limit` characters; with `fold` the negative prompt is its end."""
    avoid = ""
    if fold and prompt.negative_prompt:
        avoid = f"\n\nAvoid: {prompt.negative_prompt}"[:limit]
        warn("There is no negative prompt here; it was added to the prompt.", field="negativePrompt", feature="folded")
    return cut(prompt.text, warn, limit=limit - len(avoid), field="basePrompt") + avoid


def cut(text: str, warn: Warn, *, limit: int, field: str) -> str:
    """Cut a text to `limit` characters."""
    if len(text) > limit:
        warn(f"{field} was cut to {limit:,} characters.", field=field, feature="cut")
    return text[:limit]


def requested_shape(prompt: PromptSpec, warn: Warn) -> tuple[int, int]:
    """Return the requested size, else the requested ratio, else (1, 1). The size wins where the two differ."""
    ratio, size = prompt.aspect_ratio, prompt.size
    if ratio is not None and size is not None and shapes_differ(ratio, size):
        warn(
            f"size {size[0]}x{size[1]} is not {ratio[0]}:{ratio[1]}; the size was taken.",
            field="aspectRatio",
            feature="ignored",
        )
    return size or ratio or (1, 1)


def nearest_ratio(prompt: PromptSpec, offered: Sequence[str], warn: Warn, *, model: str) -> str:
    """Return the one of the `offered` ratios that is nearest to the requested size or ratio."""
    wanted = requested_shape(prompt, warn)
    nearest = min(offered, key=lambda name: shape_distance(_pair(name), wanted))
    if prompt.size is None and shapes_differ(_pair(nearest), wanted):
        warn(
            f"{model} does not draw {wanted[0]}:{wanted[1]}; it is {nearest} instead.",
            field="aspectRatio",
            feature="unsupported",
            used=nearest,
        )
    return nearest


def fitting_seed(seed: int, highest: int, warn: Warn, *, model: str) -> int:
    """Return the seed, modulo `highest` + 1 where it is too large."""
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
    """Return the content type of a previous image, by its first bytes.

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


def shape_distance(one: tuple[int, int], other: tuple[int, int]) -> float:
    """Return the distance of two aspect ratios on a log scale; 0 where they are equal."""
    return abs(log(one[0] / one[1]) - log(other[0] / other[1]))


def shapes_differ(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two aspect ratios differ by more than the tolerance."""
    return shape_distance(one, other) > _TOLERANCE


def _pair(name: str) -> tuple[int, int]:
    width, _, height = name.partition(":")
    return int(width), int(height)
