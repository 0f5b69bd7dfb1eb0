"""Google's image models: what each can do, what it costs, when it ends.

Read in the SDK (google-genai 3.4), on the vendor's deprecations page, and in LiteLLM's price map of 2026-11-23.
A model that is not here works too: it is passed through as it is named.
"""

from collections.abc import Mapping
from datetime import date
from typing import Any

from daemon.providers import Model

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


def _gone(name: str, ended: date, successor: str, source: str = _DEPRECATIONS) -> Model:
    return Model(name, retired=ended, successor=successor, source=source)


_PREVIEWS = date(2026, 6, 25)
_IMAGEN = date(2026, 8, 17)
_IMAGENS = (
    *("imagen-3", "imagen-3.0", "imagen-4", "imagen-4.0"),  # as people call them
    *("imagen-3.0-generate-001", "imagen-3.0-generate-002", "imagen-3.0-fast-generate-001"),
    *("imagen-4.0-generate-001", "imagen-4.0-fast-generate-001", "imagen-4.0-ultra-generate-001"),
    *("imagen-4.0-generate-preview-06-06", "imagen-4.0-ultra-generate-preview-06-06"),
)

MODELS = (
    _current(_NEWEST, 0.0336, ratios=_MORE_RATIOS),  # the first is what plain `google` means
    _current("gemini-3-pro-image", 0.1344, ratios=_RATIOS),
    # Sources disagree whether it is still there: its own answer counts (see `no_model`).
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
    _gone("gemini-2.5-flash-image-preview", date(2026, 1, 15), "gemini-2.5-flash-image"),
    _gone("gemini-3-pro-image-preview", _PREVIEWS, "gemini-3-pro-image"),
    _gone("gemini-3.1-flash-image-preview", _PREVIEWS, "gemini-3.1-flash-image"),
    *(_gone(name, _IMAGEN, _NEWEST, _SDK) for name in _IMAGENS),
)

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
"""For one picture; those of other sizes are not published."""


def offered(model: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sizes and ratios of a model; for one that is not here, what most of them have."""
    known = next((one for one in MODELS if one.name == model and one.sizes), None)
    return (known.sizes, known.ratios) if known else (_ALL_SIZES, _RATIOS)


def estimate(model: str, size: str) -> float | None:
    """USD for one picture of a size (`1K`, `2K`, `4K`); None if not known."""
    tokens = _TOKENS.get(model, {}).get(size)
    return None if tokens is None else _price(model, tokens)


def settle(model: str, usage: Mapping[str, Any] | None) -> float | None:
    """USD for the image tokens that were counted; None, never 0, where none were, or the price is not known.

    Args:
        model: The model that was asked.
        usage: `usageMetadata` of the answer.
    """
    details = (usage or {}).get("candidatesTokensDetails") or ()
    tokens = sum(detail.get("tokenCount") or 0 for detail in details if detail.get("modality") == "IMAGE")
    return _price(model, tokens) if tokens else None


def _price(model: str, tokens: int) -> float | None:
    rate = _USD_PER_MILLION.get(model)
    return None if rate is None else round(tokens * rate / 1e6, 8)
