"""Parses the prompt of a run: validated once, joined once."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from daemon.errors import Refused

Quality = Literal["standard", "hd", "low", "medium", "high", "xhigh", "max", "auto"]
FIELDS = frozenset(
    {
        "basePrompt",
        "styleModifiers",
        "size",
        "aspectRatio",
        "quality",
        "seed",
        "negativePrompt",
        "previousImage",
    }
)
DEFAULT_SIZE = "1024x1024"
MAX_PROMPT = 32_000
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_RATIO = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})")


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """A prompt as `metadata.promptSpec` has it; `size` is None where only an aspect ratio was given."""

    base_prompt: str
    style_modifiers: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    aspect_ratio: tuple[int, int] | None = None
    quality: Quality = "standard"
    seed: int | None = None
    negative_prompt: str | None = None
    previous_image: str | None = None
    unknown: tuple[str, ...] = ()
    """Fields that are none of ours: reported by a warning, never dropped in silence."""

    @property
    def text(self) -> str:
        """The prompt and its style modifiers, joined as every provider gets them."""
        return ", ".join((self.base_prompt, *self.style_modifiers))

    @classmethod
    def parse(cls, metadata: Mapping[str, Any]) -> "PromptSpec":
        """Parse `metadata.promptSpec`.

        The database has refused malformed ones; rows that came by another way are refused here, by the same rules.

        Raises:
            Refused: With code `invalid_request` and a sentence that names the field.
        """
        given = metadata.get("promptSpec")
        if not isinstance(given, Mapping):
            raise _invalid("promptSpec is missing.", "Put an object with a basePrompt into metadata.promptSpec.")
        spec = cast("Mapping[str, Any]", given)
        base = spec.get("basePrompt")
        if not isinstance(base, str) or not 1 <= len(base) <= MAX_PROMPT:
            raise _invalid("basePrompt must have 1 to 32,000 characters.", "Say what the picture should show.")
        modifiers: list[Any] = spec.get("styleModifiers") or []
        if not isinstance(modifiers, list) or not all(isinstance(word, str) for word in modifiers):  # pyright: ignore[reportUnnecessaryIsInstance] - it is the caller's JSON
            raise _invalid("styleModifiers must be a list of texts.", 'For example ["watercolour", "soft light"].')
        ratio = _pair(spec, "aspectRatio", _RATIO, "16:9")
        size = _pair(spec, "size", _SIZE, DEFAULT_SIZE)
        if size is None and ratio is None:
            size = (1024, 1024)
        quality = spec.get("quality") or "standard"
        if quality not in get_args(Quality):
            raise _invalid(f"quality {str(quality)[:40]!r} is unknown.", "Use standard or hd.")
        seed = spec.get("seed")
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
            raise _invalid("seed must be a whole number from 0 up.", "Leave it out for a random one.")
        return cls(
            base_prompt=base,
            style_modifiers=tuple(word.strip() for word in modifiers if word.strip()),
            size=size,
            aspect_ratio=ratio,
            quality=quality,
            seed=seed,
            negative_prompt=_text(spec, "negativePrompt"),
            previous_image=_text(spec, "previousImage"),
            unknown=tuple(sorted(set(spec) - FIELDS)),
        )


def _pair(spec: Mapping[str, Any], field: str, pattern: re.Pattern[str], example: str) -> tuple[int, int] | None:
    value = spec.get(field)
    if value is None:
        return None
    match = pattern.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise _invalid(f"{field} {str(value)[:40]!r} cannot be read.", f"Write it like {example}.")
    return int(match[1]), int(match[2])


def _text(spec: Mapping[str, Any], field: str) -> str | None:
    value = spec.get(field)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise _invalid(f"{field} must be a text.", "Leave it out if there is none.")
    return value


def _invalid(message: str, hint: str) -> Refused:
    return Refused(message, code="invalid_request", hint=hint)
