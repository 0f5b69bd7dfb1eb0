"""Read HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY as curl and Go do: NO_PROXY entry by entry, networks as networks.

httpx raises whatever comes to it for an entry it cannot parse, and takes `10.0.0.0/8` for a name.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from urllib.request import getproxies

from daemon.errors import Misconfigured
from daemon.variables import is_host, stripped

_CURE = "Correct the variable, or unset it."
_SOCKS = {"socks5", "socks5h"}
_DEFAULT_PORTS = {"http": 80, "https": 443}
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?:.*@)?(?P<host>\[[^\[\]]*\]|[^\[\]:@/?#]*)(?::(?P<port>\d*))?/?")
_ENTRY = re.compile(
    r"(?P<host>\[[^\[\]]*\](?:/\d+)?|[^\[\]:]*)(?::(?P<port>\d{1,5}))?/?"  # [fd00::]/8, name:8080
    r"|(?P<bare>[^\[\]]*:[^\[\]]*:[^\[\]]*)"  # fd00::/8
)


@dataclass(frozen=True, slots=True)
class Direct:
    """The hosts of NO_PROXY, to which requests go without a proxy.

    `hosts` are names with what is below them, `below` only what is below, each with its port or None for every port.
    """

    everything: bool = False
    hosts: frozenset[tuple[str, int | None]] = frozenset()
    below: frozenset[tuple[str, int | None]] = frozenset()
    networks: tuple[tuple[IPv4Network | IPv6Network, int | None], ...] = ()

    @classmethod
    def read(cls, text: str) -> "Direct":
        """Read NO_PROXY. An entry that is none is ignored, as curl and Go ignore it."""
        hosts: set[tuple[str, int | None]] = set()
        below: set[tuple[str, int | None]] = set()
        networks: list[tuple[IPv4Network | IPv6Network, int | None]] = []
        for entry in re.split(r"[,\s]+", stripped(text).lower()):
            if entry == "*":
                return cls(everything=True)
            host, port = _entry(entry.partition("://")[2] or entry)
            if not host:
                continue
            try:
                networks.append((ip_network(host, strict=False), port))
            except ValueError:
                (below if host[0] in ".*" else hosts).add((host.lstrip("*.").rstrip("."), port))
        return cls(False, frozenset(hosts), frozenset(below), tuple(networks))

    def covers(self, host: str, port: int | None) -> bool:
        """Return whether a request to this host uses no proxy."""
        if self.everything:
            return True
        host = host.lower().strip("[]").rstrip(".")
        try:
            address = ip_address(host.partition("%")[0])
        except ValueError:
            pass
        else:
            return any(
                network.version == address.version and address in network and only in (None, port)
                for network, only in self.networks
            )
        if {(host, None), (host, port)} & self.hosts:
            return True
        parents = [host[at.end() :] for at in re.finditer(r"\.", host)]
        return any({(parent, None), (parent, port)} & (self.hosts | self.below) for parent in parents)


@dataclass(frozen=True, slots=True)
class Proxies:
    """Scheme of a request (`http`, `https`, or `all` for both) → URL of its proxy."""

    urls: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    direct: Direct = field(default_factory=Direct)

    @classmethod
    def read(cls) -> "Proxies":
        """Read HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, in capitals or not, as urllib does.

        Raises:
            Misconfigured: If one of them is no address of a proxy, or needs a package that is not installed.
        """
        named = getproxies()
        direct = Direct.read(named.get("no", ""))
        if direct.everything:
            return cls()
        given = {scheme: stripped(named[scheme]) for scheme in ("http", "https", "all") if named.get(scheme)}
        return cls({scheme: _proxy(scheme, url) for scheme, url in given.items() if url}, direct)

    def scheme_for(self, scheme: str, host: str, port: int | None) -> str | None:
        """Return which of `urls` a request takes; None if it takes none."""
        found = next((name for name in (scheme, "all") if name in self.urls), None)
        if found is None or self.direct.covers(host, port or _DEFAULT_PORTS.get(scheme)):
            return None
        return found


def _proxy(scheme: str, url: str) -> str:
    """Return the URL of a proxy, checked. Errors do not repeat it: there may be a password in it."""
    name = next((name for name in os.environ if name.lower() == f"{scheme}_proxy"), f"{scheme.upper()}_PROXY")
    url = url if "://" in url else f"http://{url}"
    head, _, rest = url.partition("://")
    url = f"{head.lower()}://{rest}"
    found = _URL.fullmatch(url)
    if found is None or not all("!" <= character <= "~" for character in url):
        raise Misconfigured(f"{name} is not the address of a proxy.", _CURE)
    if found["scheme"] not in {"http", "https", *_SOCKS}:
        raise Misconfigured(f"{name} names a proxy of a kind that is not supported.", "Use http, https or socks5.")
    port = found["port"] or "1"
    if not is_host(found["host"].strip("[]")) or len(port) > 5 or not 1 <= int(port) <= 65535:
        raise Misconfigured(f"{name} is not the address of a proxy.", _CURE)
    if found["scheme"] in _SOCKS and find_spec("socksio") is None:
        raise Misconfigured(
            f"{name} names a SOCKS proxy, for which the package socksio is missing.",
            "Run pip install socksio, use an http proxy, or unset the variable.",
        )
    return url


def _entry(text: str) -> tuple[str, int | None]:
    """Split an entry of NO_PROXY into host and port; the host is empty if it is none."""
    found = _ENTRY.fullmatch(text)
    if found is None:
        return "", None
    host = found["bare"] or re.sub(r"[\[\]]", "", found["host"] or "")
    return host, int(found["port"]) if found["port"] else None
