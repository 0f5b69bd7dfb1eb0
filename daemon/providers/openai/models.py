"""List OpenAI's image models: what each can do, its price, its retirement.

Read in the SDK (openai 3.54, `image_model.py`, `image_generate_params.py`) and on the vendor's deprecations page.
A model that is not listed works too: its name is passed through.
"""

import re
from dataclasses import dataclass, replace
from datetime import date
from decimal import ROUND_HALF_UP, Decimal
from math import ceil
from typing import Any

from daemon.providers import Model, Price
from daemon.providers.lenient import Count, Lenient, Object

_SDK = "openai-python 3.54 image_model.py"
_DEPRECATIONS = "developers.openai.com/api/docs/deprecations"
_PRICES = "developers.openai.com/api/docs/pricing"

Size = tuple[int, int]

FIXED_SIZES = ("1024x1024", "1536x1024", "1024x1536")
"""The only sizes of the first generation."""
RATIO_SIZES: dict[tuple[int, int], Size] = {
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
"""The sizes of the usual ratios, from the second generation on."""
_USUAL_SIZE: Size = (1024, 1024)
_FURTHEST_SIZES: tuple[Size, ...] = ((2048, 2048), (2880, 2880), (1776, 592), (592, 1776))
"""Sizes of which there are prices, too: the largest squares, and the steepest ratios."""
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


def _retiring(
    name: str, ends: date, successor: str, *, price: float | None = None, source: str = _DEPRECATIONS
) -> Model:
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


_MODELS = (
    _current("gpt-image-2.5-flare", 0.0132),  # the first is the default of plain `openai`
    _current("gpt-image-2.5-sunburst", 0.0132),
    _current("gpt-image-2.6-flare", None),
    _current("gpt-image-2.6-sunburst", None),
    _current("gpt-image-2", 0.0527, qualities=_QUALITIES),
    _retiring("gpt-image-1.5", _GPT_IMAGE_1_5, "gpt-image-2.6-sunburst", price=0.034),
    _retiring("chatgpt-image-latest", _GPT_IMAGE_1_5, "gpt-image-2.6-sunburst"),
    _retiring("gpt-image-1-mini", _GPT_IMAGE_1_5, "gpt-image-2.6-flare", price=0.011),
    _retiring("gpt-image-1", _GPT_IMAGE_1, "gpt-image-2.5-flare", source=_SDK),
    _retiring("dall-e-3", _DALL_E, "gpt-image-2.5-flare", source=_SDK),
    _retiring("dall-e-2", _DALL_E, "gpt-image-2.5-flare", source=_SDK),
)


class _Details(Lenient):
    text_tokens: Count = None
    image_tokens: Count = None
    cached_tokens: Count = None
    cache_write_tokens: Count = None


class Usage(Lenient):
    """The counted tokens of a response, as far as they can be read."""

    input_tokens: Count = None
    input_tokens_details: Object[_Details] = None
    output_tokens: Count = None


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
"""Patches along the short edge, from which the output tokens follow; for 2.6 they are not published."""
_PARTIAL_IMAGE_TOKENS = 100

MAINLINE = "gpt-6-luna"
"""The text model of background mode, which calls the image model as a tool: image models are no models of the Responses
API. The cheapest one that has the tool (developers.openai.com/api/docs/models/gpt-6-luna)."""
_MAINLINE_RATES = {"input": 0.10, "cached": 0.01, "written": 0.125, "output": 0.50}
"""USD for a million tokens, by the same page."""


def generation(model: str) -> float | None:
    """Return 2.5 for `gpt-image-2.5-flare`; 1.0 to 1.5 for models of fixed sizes; None for models of other vendors."""
    if model == "chatgpt-image-latest":
        return 1.5
    match = _GENERATION.match(model)
    return float(match[1]) if match else None


def estimate(model: str, size: tuple[int, int] | None, quality: str | None, *, previews: int = 0) -> float | None:
    """Return USD for one image, without the tokens of the prompt and the previous image; None if not known.

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
    """Return USD for the counted tokens; None, never 0, where none were counted or the price is not known.

    Output is priced as image tokens throughout: the API mostly leaves their details out, and billed they are as such.
    """
    rates, counted = _rates(model), Usage.read(usage)
    details, output = counted.input_tokens_details, counted.output_tokens
    if rates is None or details is None or not output:
        return None
    text, image = details.text_tokens, details.image_tokens
    if text is None or image is None:
        return None
    return round((text * rates.text_in + image * rates.image_in + output * rates.image_out) / 1e6, 8)


def settle_mainline(model: Any, usage: Any) -> float | None:
    """Return USD for the text model of background mode: `model` and `usage` of a response. None if not known."""
    if not str(model).startswith(MAINLINE):
        return None
    counted = Usage.read(usage)
    details, read, output = counted.input_tokens_details, counted.input_tokens, counted.output_tokens
    if details is None or read is None or output is None:
        return None
    cached, written = details.cached_tokens or 0, details.cache_write_tokens or 0
    tokens = {"input": max(0, read - cached - written), "cached": cached, "written": written, "output": output}
    return sum(count * _MAINLINE_RATES[name] for name, count in tokens.items()) / 1e6


def _rates(model: str) -> _Rates | None:
    if model.startswith("gpt-image-1-mini"):
        return _MINI
    return None if model == "chatgpt-image-latest" else _RATES.get(generation(model) or 0)


_WORDS = {"standard": "medium", "hd": "high", **{word: word for word in ("low", "medium", "high", "xhigh", "max")}}
"""OpenAI's word for each of `promptSpec.quality`."""


def _prices(model: Model) -> tuple[Price, ...]:
    """Return the prices of a model by the words for its qualities, and by size. Too fine a quality becomes its finest."""
    sizes = [(int(width), int(height)) for width, _, height in (size.partition("x") for size in model.sizes)]
    offered = _TOKENS_PER_EDGE.get(generation(model.name) or 0)
    if offered is None:  # of such a model one price alone is known
        priced = {(word, _USUAL_SIZE): model.price for word, quality in _WORDS.items() if quality == "medium"}
        return tuple(Price(word, priced.get((word, size)), *size) for word in (*_WORDS, "auto") for size in sizes)
    sizes = dict.fromkeys((*sizes, *RATIO_SIZES.values(), *_FURTHEST_SIZES))
    return (
        Price("auto", None),
        *(
            Price(word, estimate(model.name, size, quality if quality in offered else "high"), *size)
            for word, quality in _WORDS.items()
            for size in sizes
        ),
    )


MODELS = tuple(model if model.price is None else replace(model, prices=_prices(model)) for model in _MODELS)
