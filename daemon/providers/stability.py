"""Stability AI's image models.

Only what is on offer lives here, so that menus and catalogues cost nothing; the work is in `stability_images.py`.
"""

from daemon.providers import Provider
from daemon.providers.stability_models import MODELS
from daemon.settings import Settings

__all__ = ["MODELS", "SETTING", "create"]

SETTING = "STABILITY_API_KEY"


def create(settings: Settings) -> Provider | None:
    """The provider; None without `STABILITY_API_KEY`."""
    if settings.stability_api_key is None:
        return None
    from daemon.providers.stability_images import StabilityImages

    return StabilityImages(
        settings.stability_api_key,
        base_url=settings.stability_base_url,
        timeout=settings.run_timeout,
        max_bytes=settings.max_image_bytes,
    )
