"""Make every HTTP client, with the proxies and the certificates that the environment names.

The libraries would read both by themselves, and end in a traceback over what container hosts inject.
"""

import os
import ssl
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from typing import Any

import httpx
import httpx2

from daemon.errors import Misconfigured
from daemon.proxies import Proxies
from daemon.variables import stripped

_CURE = "Correct the variable, or unset it."


class _Routed(httpx.AsyncBaseTransport):
    """Sends each request by the proxy that is for it, or by none."""

    def __init__(self, proxies: Proxies, direct: httpx.AsyncBaseTransport, by: Mapping[str, httpx.AsyncBaseTransport]):
        self._proxies = proxies
        self._direct = direct
        self._by = by

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        name = self._proxies.scheme_for(url.scheme, url.raw_host.decode("ascii"), url.port)
        return await (self._by[name] if name else self._direct).handle_async_request(request)

    async def aclose(self) -> None:
        await _close_all([self._direct, *self._by.values()])


class _Routed2(httpx2.AsyncBaseTransport):
    """The same for httpx2."""

    def __init__(
        self, proxies: Proxies, direct: httpx2.AsyncBaseTransport, by: Mapping[str, httpx2.AsyncBaseTransport]
    ):
        self._proxies = proxies
        self._direct = direct
        self._by = by

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        name = self._proxies.scheme_for(url.scheme, url.raw_host.decode("ascii"), url.port)
        return await (self._by[name] if name else self._direct).handle_async_request(request)

    async def aclose(self) -> None:
        await _close_all([self._direct, *self._by.values()])


def client(*, limits: httpx.Limits | None = None, **options: Any) -> httpx.AsyncClient:
    """Make a client of httpx.

    Args:
        limits: Of connections, for each way out.
        options: Those of `httpx.AsyncClient`.

    Raises:
        Misconfigured: If a variable names a proxy or certificates that cannot be used.
    """
    limits = limits or httpx.Limits(max_connections=100, max_keepalive_connections=20)
    trust = certificates() or True
    proxies = Proxies.read()
    if not proxies.urls:
        return httpx.AsyncClient(trust_env=False, verify=trust, limits=limits, **options)
    direct = httpx.AsyncHTTPTransport(trust_env=False, verify=trust, limits=limits)
    by = {
        name: httpx.AsyncHTTPTransport(trust_env=False, verify=trust, limits=limits, proxy=httpx.Proxy(url, **_of(url)))
        for name, url in proxies.urls.items()
    }
    return httpx.AsyncClient(trust_env=False, transport=_Routed(proxies, direct, by), **options)


def client2(*, limits: httpx2.Limits | None = None, **options: Any) -> httpx2.AsyncClient:
    """Make a client of httpx2, on which the SDKs of OpenAI and Google sit. See `client`."""
    limits = limits or httpx2.Limits(max_connections=100, max_keepalive_connections=20)
    trust = certificates() or True
    proxies = Proxies.read()
    if not proxies.urls:
        return httpx2.AsyncClient(trust_env=False, verify=trust, limits=limits, **options)
    direct = httpx2.AsyncHTTPTransport(trust_env=False, verify=trust, limits=limits)
    by = {
        name: httpx2.AsyncHTTPTransport(
            trust_env=False, verify=trust, limits=limits, proxy=httpx2.Proxy(url, **_of(url))
        )
        for name, url in proxies.urls.items()
    }
    return httpx2.AsyncClient(trust_env=False, transport=_Routed2(proxies, direct, by), **options)


def unused_client2() -> httpx2.Client:
    """Make a blocking client that sends nothing, for an SDK that makes one of its own otherwise, from the environment."""
    return httpx2.Client(trust_env=False, verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))


def check_environment() -> None:
    """Make sure that clients can be made.

    Raises:
        Misconfigured: If a variable names a proxy or certificates that cannot be used.
    """
    certificates()
    Proxies.read()


def certificates() -> ssl.SSLContext | None:
    """Return the authorities that SSL_CERT_FILE or SSL_CERT_DIR names; None leaves it to the library.

    Raises:
        Misconfigured: If there are none.
    """
    if file := stripped(os.environ.get("SSL_CERT_FILE", "")):
        if not os.path.isfile(file):  # noqa: PTH113 - Path.is_file raises for a name that is too long
            raise Misconfigured("SSL_CERT_FILE names a file that is not there.", _CURE)
        try:
            return ssl.create_default_context(cafile=file)
        except (OSError, ValueError) as error:
            raise Misconfigured("SSL_CERT_FILE names a file without certificates (PEM).", _CURE) from error
    if directories := stripped(os.environ.get("SSL_CERT_DIR", "")):
        if not any(os.path.isdir(each) for each in directories.split(os.pathsep)):  # noqa: PTH112
            raise Misconfigured("SSL_CERT_DIR names a directory that is not there.", _CURE)
        return ssl.create_default_context(capath=directories)
    return None


def _of(url: str) -> dict[str, Any]:
    """How a proxy itself is verified, if it is spoken to by https."""
    return {"ssl_context": certificates() or ssl.create_default_context()} if url.startswith("https://") else {}


async def _close_all(transports: Iterable[Any]) -> None:
    async with AsyncExitStack() as stack:
        for transport in transports:
            stack.push_async_callback(transport.aclose)
