"""OpenAI's image models: what each can do, what it costs, when it ends.

Read in the SDK (openai 3.54, `image_model.py`, `image_generate_params.py`) and on the vendor's deprecations page.
A model that is not here works too: it is passed through as it is named.
"""

import re
from dataclasses import dataclass
from datetime import date
from decimal import ROUND_HALF_UP, Decimal
from math import ceil
from typing import Any

from daemon.providers import Model

_SDK = "openai-python 3.54 image_model.py"
_DEPRECATIONS = "developers.openai.com/api/docs/deprecations"
_PRICES = "developers.openai.com/api/docs/pricing"

FIXED_SIZES = ("1024x1024", "1536x1024", "1024x1536")
"""All that the first generation draws."""
_SIZES = (*FIXED_SIZES, "1536x864", "864x1536", "1792x1024", "1024x1792", "2560x1440", "3840x2160")
_RATIOS = ("1:1", "16:9", "9:16", "3:2", "2:3", "4:3", "3:4", "5:4", "4:5", "21:9")
_QUALITIES = ("low", "standard", "hd")
"""`medium` and `high` are other words for `standard` and `hd`."""
_MORE_QUALITIES = (*_QUALITIES, "xhigh", "max")
"""From 2.5 on."""
_DALL_E = date(2026, 5, 12)
_GPT_IMAGE_1 = date(2026, 10, 23)
_GPT_IMAGE_1_5 = date(2026, 12, 1)


def _current(name: str, price: float | None, *, qualities: tuple[str, ...] = _MORE_QUALITIES) -> Model:
    return Model(
        name,
        price=price,
        typical_seconds=20,
        sizes=_SIZES,
        ratios=_RATIOS,
        qualities=qualities,
        previous_image=True,
        previews=True,
        source=_PRICES,
    )


def _ending(name: str, ends: date, successor: str, *, price: float | None = None, source: str = _DEPRECATIONS) -> Model:
    return Model(
        name,
        price=price,
        typical_seconds=20,
        sizes=FIXED_SIZES,
        ratios=("1:1", "3:2", "2:3"),
        qualities=() if name.startswith("dall-e") else _QUALITIES,
        previous_image=True,
        previews=not name.startswith("dall-e"),
        retired=ends,
        successor=successor,
        source=source,
    )


MODELS = (
    _current("gpt-image-2.5-flare", 0.0132),  # the first is what plain `openai` means
    _current("gpt-image-2.5-sunburst", 0.0132),
    _current("gpt-image-2.6-flare", None),
    _current("gpt-image-2.6-sunburst", None),
    _current("gpt-image-2", 0.0527, qualities=_QUALITIES),
    _ending("gpt-image-1.5", _GPT_IMAGE_1_5, "gpt-image-2.6-sunburst", price=0.034),
    _ending("chatgpt-image-latest", _GPT_IMAGE_1_5, "gpt-image-2.6-sunburst"),
    _ending("gpt-image-1-mini", _GPT_IMAGE_1_5, "gpt-image-2.6-flare", price=0.011),
    _ending("gpt-image-1", _GPT_IMAGE_1, "gpt-image-2.5-flare", source=_SDK),
    _ending("dall-e-3", _DALL_E, "gpt-image-2.5-flare", source=_SDK),
    _ending("dall-e-2", _DALL_E, "gpt-image-2.5-flare", source=_SDK),
)


@dataclass(frozen=True, slots=True)
class _Rates:
    """USD for a million tokens."""

    text_in: float
    image_in: float
    image_out: float


_GENERATION = re.compile(r"gpt-image-(\d+(?:\.\d+)?)")
_RATES = {2.0: _Rates(5, 8, 30), 2.5: _Rates(5, 8, 30), 2.6: _Rates(5, 8, 30), 1.5: _Rates(5, 8, 32)}
_MINI = _Rates(2, 2.5, 8)
_TOKENS_PER_EDGE = {
    2.0: {"low": 16, "medium": 48, "high": 96},
    2.5: {"low": 16, "medium": 24, "high": 48, "xhigh": 64, "max": 96},
}
"""Patches along the short edge, from which the output tokens follow; for 2.6 nobody has published them."""
_PARTIAL_IMAGE_TOKENS = 100

MAINLINE = "gpt-6-luna"
"""Answers in background mode and has the image model draw: image models are no models of the Responses API. The cheapest
one that has the tool (developers.openai.com/api/docs/models/gpt-6-luna)."""
_MAINLINE_RATES = {"input": 0.10, "cached": 0.01, "written": 0.125, "output": 0.50}
"""USD for a million tokens, by the same page."""


def generation(model: str) -> float | None:
    """2.5 for `gpt-image-2.5-flare`; 1.0 to 1.5 for those of fixed sizes; None for what is not OpenAI's own."""
    if model == "chatgpt-image-latest":
        return 1.5
    match = _GENERATION.match(model)
    return float(match[1]) if match else None


def estimate(model: str, size: tuple[int, int] | None, quality: str | None, *, previews: int = 0) -> float | None:
    """USD that the picture will cost, without what the prompt and the previous image add; None if not known.

    The formula reproduces every published price of gpt-image-2 and 2.5.
    """
    number = generation(model)
    rates = _rates(model)
    edge = _TOKENS_PER_EDGE.get(number or 0, {}).get(quality or "")
    if rates is None or edge is None or size is None:
        return None
    short, long = sorted(size)
    across = int((Decimal(edge) * short / long).quantize(Decimal(1), ROUND_HALF_UP))
    tokens = ceil(edge * across * (2_000_000 + short * long) / 4_000_000)
    return (tokens + previews * _PARTIAL_IMAGE_TOKENS) * rates.image_out / 1e6


def settle(model: str, usage: Any) -> float | None:
    """USD for what the provider counted; None, never 0, where it did not count or the price is not known.

    Output is priced as image tokens throughout: the API mostly leaves their details out, and billed they are as such.
    """
    rates = _rates(model)
    try:
        text = int(usage["input_tokens_details"]["text_tokens"])
        image = int(usage["input_tokens_details"]["image_tokens"])
        output = int(usage["output_tokens"])
    except (KeyError, TypeError, ValueError):
        return None
    if rates is None or output <= 0:
        return None
    return round((text * rates.text_in + image * rates.image_in + output * rates.image_out) / 1e6, 8)


def settle_mainline(model: Any, usage: Any) -> float | None:
    """USD for what the model that words the prompt has counted: `model` and `usage` of a response. None where unknown."""
    if not str(model).startswith(MAINLINE):
        return None
    try:
        details = usage["input_tokens_details"]
        cached, written = int(details.get("cached_tokens") or 0), int(details.get("cache_write_tokens") or 0)
        counted = {
            "input": int(usage["input_tokens"]) - cached - written,
            "cached": cached,
            "written": written,
            "output": int(usage["output_tokens"]),
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return sum(tokens * _MAINLINE_RATES[name] for name, tokens in counted.items()) / 1e6


def _rates(model: str) -> _Rates | None:
    if model.startswith("gpt-image-1-mini"):
        return _MINI
    return None if model == "chatgpt-image-latest" else _RATES.get(generation(model) or 0)
