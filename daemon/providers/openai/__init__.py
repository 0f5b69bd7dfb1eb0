"""OpenAI's Images API, its Responses API in the background, and servers that speak them.

Only what is on offer lives here, so that menus and catalogues cost no SDK import; the work is in `openai_images.py` and
`openai_background.py`.
"""

from urllib.parse import urlsplit

from daemon.addresses import literal
from daemon.providers import Provider
from daemon.providers.openai_models import MODELS
from daemon.settings import Settings

__all__ = ["MODELS", "SETTING", "create"]

SETTING = "OPENAI_API_KEY"


def create(settings: Settings) -> Provider | None:
    """The provider; None without `OPENAI_API_KEY`."""
    if settings.openai_api_key is None:
        return None
    from daemon.providers.openai_provider import OpenAI

    return OpenAI(
        settings.openai_api_key,
        base_url=settings.openai_base_url,
        models=MODELS if _is_openai(settings.openai_base_url) else (),
        webhook="openai" in settings.webhook_secrets,
        timeout=settings.run_timeout,
        max_bytes=settings.max_image_bytes,
    )


def _is_openai(base_url: str | None) -> bool:
    """Whether `MODELS` is about this server: OpenAI's own, or what stands in for it on this machine (a proxy, a fake).

    Any other has models, prices and retirements of its own.
    """
    host = urlsplit(base_url or "https://api.openai.com").hostname or ""
    address = literal(host)
    return host.endswith(".openai.com") or host == "localhost" or (address is not None and address.is_loopback)
