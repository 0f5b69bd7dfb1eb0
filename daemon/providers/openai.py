"""OpenAI's Images API, and servers that speak it.

Only what is on offer lives here, so that menus and catalogues cost no SDK import; the work is in `openai_images.py`.
"""

from daemon.providers import Provider
from daemon.providers.openai_models import MODELS
from daemon.settings import Settings

__all__ = ["MODELS", "create"]


def create(settings: Settings) -> Provider | None:
    """The provider; None without `OPENAI_API_KEY`."""
    if settings.openai_api_key is None:
        return None
    from daemon.providers.openai_images import OpenAIImages

    return OpenAIImages(
        settings.openai_api_key,
        base_url=settings.openai_base_url,
        timeout=settings.run_timeout,
        max_bytes=settings.max_image_bytes,
    )
