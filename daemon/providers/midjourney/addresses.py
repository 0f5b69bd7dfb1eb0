"""Resolve the addresses of images that a proxy names without its own: `/image/1.png`, `//cdn.example.com/1.png`."""

import re

import httpx

from daemon.fetch.destinations import Origin

_RELATIVE = re.compile(r"(?!/9j/)(?:[/.]\S*|[^\s:]*\.\S*)")
"""A text without a slash in front or a dot is no address, but a picture that is damaged. So is one with JPEG's first bytes."""
_MOST = 2_000


def resolved(address: str, api_url: str) -> str | None:
    """Return the full address of an image; None for a text that is none, or whose image may not be fetched: over http only the
    proxy itself is asked."""
    if len(address) > _MOST or _RELATIVE.fullmatch(address) is None:
        return None
    try:
        base = httpx.URL(f"{api_url.rstrip('/').removesuffix('/mj')}/")
        url = base.join(address)
        if Origin.of(url) == Origin.of(base):
            return str(url)
        if address.startswith("//"):
            url = url.copy_with(scheme="https")
    except (httpx.InvalidURL, ValueError):
        return None
    return str(url) if url.scheme == "https" else None
