"""Generate images with OpenAI's Images API, its Responses API in background mode, and compatible servers.

Read `provider.py` first, then `images.py` and `background.py`. This module has the catalogue and `create` alone, so that
listing models imports no SDK.
"""

from urllib.parse import urlsplit

from daemon.fetch.addresses import literal
from daemon.providers import Provider
from daemon.providers.openai.models import MODELS
from daemon.settings import Settings

__all__ = ["MODELS", "SETTING", "create"]

SETTING = "OPENAI_API_KEY"


def create(settings: Settings) -> Provider | None:
    """Create the provider; None without `OPENAI_API_KEY`."""
    if settings.openai_api_key is None:
        return None
    from daemon.providers.openai.provider import OpenAI

    return OpenAI(
        settings.openai_api_key,
        base_url=settings.openai_base_url,
        organization=settings.openai_organization,
        project=settings.openai_project,
        models=MODELS if _is_openai(settings.openai_base_url) else (),
        webhook="openai" in settings.webhook_secrets,
        timeout=settings.run_timeout,
        download_deadline=min(settings.poll_timeout, settings.run_timeout / 4),
        max_bytes=settings.max_image_bytes,
    )


def _is_openai(base_url: str | None) -> bool:
    """Return whether `MODELS` is about this server: OpenAI's own, or a stand-in on loopback (a proxy, a fake).

    Any other has models, prices and retirements of its own.
    """
    host = urlsplit(base_url or "https://api.openai.com").hostname or ""
    address = literal(host)
    return host.endswith(".openai.com") or host == "localhost" or (address is not None and address.is_loopback)
