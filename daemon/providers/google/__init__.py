"""Google's Gemini API and its image models.

Only what is on offer lives here, so that menus and catalogues cost no SDK import; the work is in `google_images.py`.
"""

from daemon.providers import Provider
from daemon.providers.google_models import MODELS
from daemon.settings import Settings

__all__ = ["MODELS", "SETTING", "create"]

SETTING = "GOOGLE_API_KEY"


def create(settings: Settings) -> Provider | None:
    """The provider; None without `GOOGLE_API_KEY` or `GEMINI_API_KEY`. The first counts, if there are both."""
    key = settings.google_api_key or settings.gemini_api_key
    if key is None:
        return None
    from daemon.providers.google_images import GoogleImages

    return GoogleImages(
        key,
        base_url=settings.google_base_url,
        timeout=settings.run_timeout,
        max_bytes=settings.max_image_bytes,
    )
