"""List Google's image models: what each can do, its price, its retirement.

Read in the SDK (google-genai 3.4), on the vendor's deprecations page, and in LiteLLM's price map of 2026-11-23.
A model that is not listed works too: its name is passed through.
"""

from dataclasses import replace
from datetime import date
from typing import get_args

from pydantic import AliasChoices, Field

from daemon.prompt import Quality
from daemon.providers import Model, Price
from daemon.providers.lenient import MOST_COUNTED, Count, Lenient, Objects, Text

_SDK = "google-genai 3.4"
_DEPRECATIONS = "ai.google.dev/gemini-api/docs/deprecations"
_PRICES = "litellm 1.109.1 price map"

_RATIOS = ("1:1", "2:3", "3:2", "3:4", "4:3", "4:5", "5:4", "9:16", "16:9", "21:9")
_MORE_RATIOS = (*_RATIOS, "1:4", "4:1", "1:8", "8:1")
_ALL_SIZES = ("1K", "2K", "4K")
_NEWEST = "gemini-nano-banana-2.1"


def _current(name: str, price: float, *, sizes: tuple[str, ...] = _ALL_SIZES, ratios: tuple[str, ...]) -> Model:
    return Model(
        name,
        price=price,
        sizes=sizes,
        ratios=ratios,
        qualities=("standard", "hd") if "2K" in sizes else (),  # a finer one is a larger picture
        seed=True,
        previous_image=True,
        source=_PRICES,
    )


def _retired(name: str, ended: date, successor: str, source: str = _DEPRECATIONS) -> Model:
    return Model(name, retired=ended, successor=successor, source=source)


_PREVIEWS = date(2026, 6, 25)
_IMAGEN = date(2026, 8, 17)
_IMAGENS = (
    *("imagen-3", "imagen-3.0", "imagen-4", "imagen-4.0"),  # as people call them
    *("imagen-3.0-generate-001", "imagen-3.0-generate-002", "imagen-3.0-fast-generate-001"),
    *("imagen-4.0-generate-001", "imagen-4.0-fast-generate-001", "imagen-4.0-ultra-generate-001"),
    *("imagen-4.0-generate-preview-06-06", "imagen-4.0-ultra-generate-preview-06-06"),
)

_MODELS = (
    _current(_NEWEST, 0.0336, ratios=_MORE_RATIOS),  # the first is the default of plain `google`
    _current("gemini-3-pro-image", 0.1344, ratios=_RATIOS),
    # Sources disagree whether it is still there: its own response decides (see `no_model`).
    _current("gemini-3.1-flash-image", 0.0672, ratios=_MORE_RATIOS),
    _current("gemini-3.1-flash-lite-image", 0.0336, sizes=("1K",), ratios=_MORE_RATIOS),
    Model(
        "gemini-2.5-flash-image",
        price=0.0387,
        sizes=("1K",),
        ratios=_RATIOS,
        seed=True,
        previous_image=True,
        retired=date(2027, 3, 15),
        successor=_NEWEST,
        source=_PRICES,
    ),
    _retired("gemini-2.5-flash-image-preview", date(2026, 1, 15), "gemini-2.5-flash-image"),
    _retired("gemini-3-pro-image-preview", _PREVIEWS, "gemini-3-pro-image"),
    _retired("gemini-3.1-flash-image-preview", _PREVIEWS, "gemini-3.1-flash-image"),
    *(_retired(name, _IMAGEN, _NEWEST, _SDK) for name in _IMAGENS),
)

USUAL_SIZE = "1K"
EDGES = {"1K": 1024, "2K": 2048, "4K": 4096}
_LONGEST = 99_999
"""Of `promptSpec.size`."""
FINE = ("hd", "high", "xhigh", "max")
"""Values of `promptSpec.quality` that ask for 2K."""
_USD_PER_MILLION = {
    _NEWEST: 30,
    "gemini-3-pro-image": 120,
    "gemini-3.1-flash-image": 60,
    "gemini-3.1-flash-lite-image": 30,
    "gemini-2.5-flash-image": 30,
}
"""For image tokens. What prompt and thoughts add (mostly below one percent) has no price in our sources."""
_TOKENS = {
    _NEWEST: {"1K": 1120},
    "gemini-3-pro-image": {"1K": 1120, "2K": 1120, "4K": 2000},
    "gemini-3.1-flash-image": {"1K": 1120},
    "gemini-3.1-flash-lite-image": {"1K": 1120},
    "gemini-2.5-flash-image": {"1K": 1290},
}
"""For one image; those of other sizes are not published."""


def offered(model: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the sizes and ratios of a model; for one that is not listed, those of most models."""
    known = next((one for one in MODELS if one.name == model and one.sizes), None)
    return (known.sizes, known.ratios) if known else (_ALL_SIZES, _RATIOS)


def estimate(model: str, size: str) -> float | None:
    """Return USD for one image of a size (`1K`, `2K`, `4K`); None if not known."""
    tokens = _TOKENS.get(model, {}).get(size)
    return None if tokens is None else _price(model, tokens)


def settle(model: str, usage: object) -> float | None:
    """Return USD for the image tokens that were counted; None, never 0, where none were, or the price is not known.

    Args:
        model: The model that was called.
        usage: `usageMetadata` of the response.
    """
    details = _Usage.read(usage).candidates
    tokens = sum(detail.count or 0 for detail in details if detail.modality == "IMAGE")
    return _price(model, tokens) if 0 < tokens <= MOST_COUNTED else None


def made_something(usage: object) -> bool:
    """Return whether a response counted more than the prompt, which costs less than a hundredth of a cent."""
    counted = _Usage.read(usage)
    return bool(counted.output or counted.thoughts or any(detail.count for detail in counted.candidates))


class _Detail(Lenient):
    modality: Text = None
    count: Count = Field(validation_alias=AliasChoices("tokenCount", "token_count"), default=None)


class _Usage(Lenient):
    output: Count = Field(validation_alias=AliasChoices("candidatesTokenCount", "candidates_token_count"), default=None)
    thoughts: Count = Field(validation_alias=AliasChoices("thoughtsTokenCount", "thoughts_token_count"), default=None)
    candidates: Objects[_Detail] = Field(
        validation_alias=AliasChoices("candidatesTokensDetails", "candidates_tokens_details"), default_factory=list
    )


def _price(model: str, tokens: int) -> float | None:
    rate = _USD_PER_MILLION.get(model)
    return None if rate is None else round(tokens * rate / 1e6, 8)


def size_for(longest: int, quality: str, sizes: tuple[str, ...]) -> str:
    """Return the one of a model's sizes for a longest edge; 0 where none is asked for."""
    wanted = next((name for name, edge in EDGES.items() if longest <= edge), "4K")
    if quality in FINE and wanted == USUAL_SIZE:
        wanted = "2K"
    return wanted if wanted in sizes else sizes[-1]


def _prices(model: Model) -> tuple[Price, ...]:
    """Return the prices of a model by quality and longest edge."""
    edges = (EDGES["1K"], EDGES["2K"], _LONGEST)
    return tuple(
        Price(quality, estimate(model.name, size_for(edge, quality, model.sizes)), edge)
        for quality in get_args(Quality)
        for edge in edges
    )


MODELS = tuple(replace(model, prices=_prices(model)) if "2K" in model.sizes else model for model in _MODELS)
