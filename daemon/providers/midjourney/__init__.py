"""Midjourney, by way of a midjourney-proxy that the operator runs: there is no public API of Midjourney's own.

Such a proxy drives a Discord account, which Midjourney's terms may not allow: that is the operator's decision, so there
is no address by default.
Only what is on offer lives here, so that menus and catalogues cost nothing; the work is in `midjourney_proxy.py`.
"""

from daemon.providers import Provider
from daemon.providers.midjourney_models import MODELS
from daemon.settings import Settings

__all__ = ["MODELS", "SETTING", "create"]

SETTING = "MIDJOURNEY_API_URL"


def create(settings: Settings) -> Provider | None:
    """The provider; None without `MIDJOURNEY_API_URL`. Not every proxy has a key."""
    if settings.midjourney_api_url is None:
        return None
    from daemon.providers.midjourney_hook import Hook
    from daemon.providers.midjourney_proxy import MidjourneyProxy

    return MidjourneyProxy(
        settings.midjourney_api_url,
        settings.midjourney_api_key,
        hook=Hook.of(settings),
        timeout=settings.run_timeout,
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
    )
