"""Generate images with Midjourney, by a midjourney-proxy of the operator's: Midjourney has no public API.

Such a proxy drives a Discord account, which Midjourney's terms may not allow: that is the operator's decision, so there
is no address by default.

Read `provider.py` first. This module has the catalogue and `create` alone, so that listing models imports nothing else.
"""

from daemon.providers import Provider
from daemon.providers.midjourney.models import MODELS
from daemon.settings import Settings

__all__ = ["MODELS", "SETTING", "create"]

SETTING = "MIDJOURNEY_API_URL"


def create(settings: Settings) -> Provider | None:
    """Create the provider; None without `MIDJOURNEY_API_URL`. Not every proxy has a key."""
    if settings.midjourney_api_url is None:
        return None
    from daemon.providers.midjourney.provider import MidjourneyProxy
    from daemon.providers.midjourney.webhook import Webhook

    return MidjourneyProxy(
        settings.midjourney_api_url,
        settings.midjourney_api_key,
        price=settings.midjourney_price,
        webhook=Webhook.of(settings),
        timeout=settings.run_timeout,
        max_bytes=settings.max_image_bytes,
    )
