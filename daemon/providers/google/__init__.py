"""Generate images with Google's Gemini API.

Read `provider.py` first. This module has the catalogue and `create` alone, so that listing models imports no SDK.
"""

from daemon.providers import Provider
from daemon.providers.google.models import MODELS
from daemon.settings import Settings

__all__ = ["MODELS", "SETTING", "create"]

SETTING = "GOOGLE_API_KEY"


def create(settings: Settings) -> Provider | None:
    """Create the provider; None without `GOOGLE_API_KEY` or `GEMINI_API_KEY`. The first wins."""
    key = settings.google_api_key or settings.gemini_api_key
    if key is None:
        return None
    from daemon.providers.google.provider import GoogleImages

    return GoogleImages(
        key,
        base_url=settings.google_base_url,
        timeout=settings.run_timeout,
        max_bytes=settings.max_image_bytes,
    )
