"""Stability AI's image models: what each can do, what it costs, what became of the old ones.

From the vendor's OpenAPI text and its price list (a credit is one US cent). A model that is not here is asked for by its
name, as one of Stable Diffusion 3.5 is.
"""

from datetime import date

from daemon.providers import Model

_SPEC = "api.stability.ai OpenAPI v2beta"
_PRICES = "platform.stability.ai/pricing"
RATIOS = ("1:1", "16:9", "21:9", "2:3", "3:2", "4:5", "5:4", "9:16", "9:21")
_USD_PER_CREDIT = 0.01

ULTRA = "ultra"
CORE = "core"
_SD_3 = date(2025, 4, 17)
_SDXL = date(2026, 11, 23)
"""No day was announced; on this one it was found to be no longer on the price list."""


def _current(name: str, credits_: float, *, negative_prompt: bool = True) -> Model:
    return Model(
        name,
        price=round(credits_ * _USD_PER_CREDIT, 4),
        sizes=("1024x1024",),
        ratios=RATIOS,
        seed=True,
        negative_prompt=negative_prompt,
        previous_image=name != CORE,
        source=_PRICES,
    )


def _gone(name: str, ended: date, successor: str) -> Model:
    return Model(name, retired=ended, successor=successor, source=_SPEC)


MODELS = (
    _current(CORE, 3),  # the first is what plain `stability` means
    _current(ULTRA, 8),
    _current("sd3.5-large", 6.5),
    _current("sd3.5-large-turbo", 4, negative_prompt=False),
    _current("sd3.5-medium", 3.5),
    _current("sd3.5-flash", 2.5, negative_prompt=False),
    _gone("stable-diffusion-3", _SD_3, "sd3.5-large"),
    _gone("sd3", _SD_3, "sd3.5-large"),
    _gone("sd3-large", _SD_3, "sd3.5-large"),
    _gone("sd3-large-turbo", _SD_3, "sd3.5-large-turbo"),
    _gone("sd3-medium", _SD_3, "sd3.5-medium"),
    _gone("stable-diffusion-xl", _SDXL, CORE),
    _gone("stable-diffusion-xl-1024-v1-0", _SDXL, CORE),
)


def price(model: str) -> float | None:
    """USD for one picture; None if not known."""
    return next((known.price for known in MODELS if known.name == model), None)


def has_negative_prompt(model: str) -> bool:
    """Whether what to avoid has a field of its own. The distilled models have none."""
    return not model.endswith(("-turbo", "-flash"))
