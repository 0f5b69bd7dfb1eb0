"""Understand DATABASE_URL as operators have it: with the schemes, the parameters and the passwords of other drivers.

Errors name the part that is wrong and never repeat it: it may be a piece of the password.
"""

import ipaddress
import os
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode

from daemon.errors import Misconfigured

HOW_TO_WRITE_IT = (
    "Write it like postgresql://USER@HOST:5432/DATABASE, with a colon and the password behind USER, "
    "special characters as %XX."
)
LONGEST = 10_000
"""Characters. Reading takes time that grows with its square where a password is full of `@`."""

_SCHEME = re.compile(r"(?:jdbc:)?(?:postgres|postgresql|pgsql|psql|postgis)(?:\+\w+)?://", re.IGNORECASE)
_WORDS = re.compile(r"(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|[^\s']\S*|)(?:\s+|$)")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]*)(?::(?P<port>\d*))?")
_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*\.?", re.IGNORECASE)
_PARAMETERS = re.compile(r"(?:[\w.%-]+(?:=[^&]*)?)?(?:&(?:[\w.%-]+(?:=[^&]*)?)?)*")
_PLACEHOLDER = re.compile(r"\[[A-Z][A-Z_ -]*\]|<[^<>]*>|%5B[A-Z][A-Z_-]*%5D", re.IGNORECASE)

_FILES = ("sslcert", "sslkey", "sslcrl", "passfile")
_CHOICES = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "ssl_min_protocol_version": ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"),
    "ssl_max_protocol_version": ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"),
    "target_session_attrs": ("any", "primary", "standby", "read-write", "read-only", "prefer-standby"),
    "gsslib": ("gssapi", "sspi"),
}
_OF_THE_DRIVER = {
    *("host", "port", "dbname", "database", "user", "password", "service", "sslpassword", "sslrootcert", "krbsrvname"),
    *_FILES,
    *_CHOICES,
}
_OF_THE_SERVER = {
    *("application_name", "options", "search_path", "timezone", "role", "jit", "work_mem", "statement_timeout"),
    *("lock_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout", "transaction_timeout"),
    *("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout"),
}
"""Settings of a session. asyncpg hands every other parameter on as one, and the server refuses what it does not know."""
_SSL = {"true": "require", "1": "require", "on": "require", "no-verify": "require", "false": "disable", "0": "disable"}
"""The parameter `ssl` of JDBC and node-postgres, and node's own `sslmode=no-verify` → sslmode."""
_EXTENSIONS = re.compile(r"[a-z_]\w*\.[a-z_]\w*", re.IGNORECASE | re.ASCII)
_VERIFYING = ("verify-ca", "verify-full")


class WrongAddress(ValueError):
    """The text is no address of a database. The message is the end of a sentence."""


@dataclass(frozen=True, slots=True)
class Dsn:
    """An address as asyncpg takes it. `place` is host and port; `dropped` names the parameters that were left out."""

    url: str
    place: str
    password: str
    dropped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Parts:
    user: str
    password: str
    hosts: str
    database: str
    query: str


def address(text: str) -> str:
    """Return what asyncpg is to connect to.

    Raises:
        Misconfigured: If `text` is no address of a Postgres database.
    """
    try:
        return understand(text).url
    except WrongAddress as error:
        raise Misconfigured(f"DATABASE_URL is wrong ({error}).", HOW_TO_WRITE_IT) from None


def understand(text: str, environ: Mapping[str, str] = os.environ) -> Dsn:
    """Read an address: postgresql://…, jdbc:postgresql://…, postgresql+driver://…, or the `name=value` of libpq.

    Args:
        text: Anything.
        environ: Where PGSSLMODE and the names of certificates are looked for, as asyncpg does.

    Raises:
        WrongAddress: If it is none, or asks for a certificate that is not there.
    """
    text = text.strip()
    if len(text) > LONGEST:
        raise WrongAddress("it is too long")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise WrongAddress("it is no UTF-8 text")
    parts = _split(text)
    if "\0" in unquote(text):
        raise WrongAddress("there is a NUL in it")
    if _PLACEHOLDER.fullmatch(parts.password):
        raise WrongAddress("a placeholder stands where the password belongs")
    hosts = _hosts(parts.hosts)
    given = {name.strip(): value.strip() for name, value in parse_qsl(parts.query, keep_blank_values=True)}
    kept = {name: value for name, value in given.items() if value and _is_ours(name)}
    if ssl_ := given.get("ssl"):
        kept.setdefault("sslmode", _SSL.get(ssl_.lower(), ssl_))
    dropped = tuple(name for name in given if name not in kept and name != "ssl")
    if hosts:  # asyncpg looks at these only where no host stands before the path
        kept.pop("host", None)
        kept.pop("port", None)
    _check(kept, environ)
    netloc = f"{_login(parts)}{','.join(hosts)}"
    database = f"/{quote(unquote(parts.database), safe='')}" if parts.database else ""
    query = f"?{urlencode(kept, quote_via=quote, safe='')}" if kept else ""
    first = hosts[0] if hosts else kept.get("host", "").partition(",")[0]
    place = first if re.search(r":\d+$", first) else f"{first}:{kept.get('port', '5432')}"
    return Dsn(
        f"postgresql://{netloc}{database}{query}",
        place if first and not first.startswith(("/", "%2F")) else "the database",
        unquote(parts.password) or kept.get("password", ""),
        dropped,
    )


def _split(text: str) -> _Parts:
    scheme = _SCHEME.match(text)
    if scheme is None:
        if words := _words(text):
            names = {"hostaddr": "host", "dbname": "database"}
            given = {names.get(name, name): value for name, value in words.items()}
            return _Parts("", "", "", "", urlencode(given, quote_via=quote))
        if re.match(r"https?://", text, re.IGNORECASE):
            raise WrongAddress("it is the address of a website; the database's begins with postgresql://")
        raise WrongAddress("it begins with neither postgresql:// nor postgres://")
    rest = text[scheme.end() :]
    readings = list(_readings(rest))
    found = next((parts for parts in readings if _is_sound(parts)), None)
    if found is not None:
        return found
    parts = readings[-1]
    if "#" in parts.hosts + parts.database + parts.query:
        raise WrongAddress("there is a # in it, which has to be written as %23")
    _hosts(parts.hosts)
    raise WrongAddress("its parts cannot be told apart")


def _readings(rest: str) -> Iterator[_Parts]:
    """Read it with its login ending at each `@`, the first one first: passwords are often not percent-encoded."""
    ends = [-1, *(found.start() for found in re.finditer("@", rest))]
    for at in ends:
        login, tail = rest[: max(at, 0)], rest[at + 1 :]
        before_query, _, query = tail.partition("?")
        hosts, _, database = before_query.partition("/")
        user, _, password = login.partition(":")
        yield _Parts(user, password, hosts, database.removesuffix("/"), query)


def _is_sound(parts: _Parts) -> bool:
    """Whether it can be meant like this."""
    if set("@#") & set(parts.hosts + parts.database) or "#" in parts.query or "/" in parts.database:
        return False
    if not _PARAMETERS.fullmatch(parts.query):
        return False
    if any("@" in each and not _is_ours(each.partition("=")[0]) for each in parts.query.split("&")):
        return False  # in the value of a parameter we do not know, it ends a password that has a ? in it
    try:
        _hosts(parts.hosts)
    except WrongAddress:
        return False
    return True


def _hosts(text: str) -> list[str]:
    """Return each `host:port` of a list, checked; none for an empty text, which leaves it to asyncpg."""
    several = text.split(",") if text else []
    if len(several) > 1 and any(not each.partition(":")[0] for each in several):
        raise WrongAddress("one of its hosts is empty")
    return [_host(each) for each in several]


def _host(text: str) -> str:
    """Return one `host:port`, checked."""
    found = _HOST.fullmatch(text)
    if found is None:
        if text.count(":") > 1 and "[" not in text:
            raise WrongAddress("an IPv6 address has to stand in [ ]")
        raise WrongAddress("its port is no number from 1 to 65535")
    host, port = found["host"], found["port"]
    if port:
        _port(port)
    name = unquote(host)
    if host.startswith("["):
        try:
            ipaddress.IPv6Address(host[1:-1].partition("%")[0])
        except ValueError:
            raise WrongAddress("what stands in [ ] is no IPv6 address") from None
    elif name and not name.startswith("/") and not _NAME.fullmatch(name):
        raise WrongAddress("its host is no name")
    return f"{host}:{port}" if port else host


def _port(text: str) -> None:
    if not re.fullmatch(r"0*[1-9]\d{0,4}", text, re.ASCII) or int(text) > 65535:
        raise WrongAddress("its port is no number from 1 to 65535")


def _login(parts: _Parts) -> str:
    user, password = (quote(unquote(each), safe="") for each in (parts.user, parts.password))
    return f"{user}:{password}@" if password else f"{user}@" if user else ""


def _is_ours(name: str) -> bool:
    return name in _OF_THE_DRIVER or name.lower() in _OF_THE_SERVER or bool(_EXTENSIONS.fullmatch(name))


def _check(kept: dict[str, str], environ: Mapping[str, str]) -> None:
    """Put values right where it is clear what is meant, and refuse what asyncpg would not take."""
    if "port" in kept:
        for port in kept["port"].split(","):
            _port(port)
    if "port" in kept and kept["port"].count(",") not in (0, kept.get("host", "").count(",")):
        raise WrongAddress("it has not as many ports as hosts")
    _hosts(quote(kept.get("host", ""), safe=",:[]%"))
    for name, choices in _CHOICES.items():
        if name in kept:
            spellings = {choice.lower(): choice for choice in choices}
            value = _SSL.get(kept[name], kept[name]) if name == "sslmode" else kept[name]
            if value.lower().replace("_", "-") not in {spelling.replace("_", "-") for spelling in spellings}:
                raise WrongAddress(f"{name} has to be one of {', '.join(choices)}")
            kept[name] = spellings[value.lower().replace("_", "-")]
    for name in _FILES:
        if name in kept:
            kept[name] = _file(name, kept[name])
    mode = kept.get("sslmode") or environ.get("PGSSLMODE") or "prefer"
    _check_certificate(kept, mode, environ)
    if kept.get("sslnegotiation") == "direct" and mode not in ("require", *_VERIFYING):
        raise WrongAddress("sslnegotiation=direct needs sslmode=require")
    _check_authority(kept, mode, environ)


def _check_authority(kept: dict[str, str], mode: str, environ: Mapping[str, str]) -> None:
    """Make sure that there is an authority's certificate where the server's is to be verified."""
    named = kept.get("sslrootcert") or environ.get("PGSSLROOTCERT")
    if named == "system":
        paths = ssl.get_default_verify_paths()
        named = paths.cafile or paths.openssl_cafile
    if named is None:
        if mode in _VERIFYING and not os.path.isfile(os.path.expanduser("~/.postgresql/root.crt")):  # noqa: PTH111, PTH113
            raise WrongAddress(
                f"sslmode={mode} needs the certificate of the server's authority: there is no file "
                "~/.postgresql/root.crt, and no sslrootcert names another"
            )
        return
    if mode in ("disable", "allow", "prefer"):
        kept.pop("sslrootcert", None)  # not used, so it need not be there
        return
    named = _file("sslrootcert", named)
    try:
        ssl.create_default_context(cafile=named)
    except (OSError, ValueError):  # ssl.SSLError is an OSError
        raise WrongAddress("the file that sslrootcert names holds no certificates (PEM)") from None
    kept["sslrootcert"] = named


def _check_certificate(kept: dict[str, str], mode: str, environ: Mapping[str, str]) -> None:
    """Make sure that asyncpg can load what it is to show the server, and the list of what has been revoked."""
    if mode == "disable":
        return
    named = {name: (name, kept[name]) for name in ("sslcert", "sslkey", "sslcrl") if name in kept}
    for name in ("sslcert", "sslkey", "sslcrl"):
        variable = f"PG{name.upper()}"
        if name not in named and environ.get(variable):
            named[name] = (variable, environ[variable])
    if "sslcert" not in named:
        named.pop("sslkey", None)  # not used, so it need not be there
    if mode in ("allow", "prefer"):
        named.pop("sslcrl", None)
    files = {name: _file(*of) for name, of in named.items()}
    kept.update(files)
    loader = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if "sslcert" in files:
            loader.load_cert_chain(files["sslcert"], files.get("sslkey"), lambda: kept.get("sslpassword", ""))
    except (OSError, ValueError):  # ssl.SSLError is an OSError
        names = " and ".join(named[name][0] for name in ("sslcert", "sslkey") if name in named)
        raise WrongAddress(f"what {names} name is no certificate with its key (PEM)") from None
    try:
        if "sslcrl" in files:
            loader.load_verify_locations(files["sslcrl"])
    except (OSError, ValueError):
        raise WrongAddress(f"the file that {named['sslcrl'][0]} names holds no list of certificates (PEM)") from None


def _file(name: str, path: str) -> str:
    try:
        found = Path(path).expanduser()
        if os.path.isfile(found):  # noqa: PTH113 - Path.is_file raises for a name that is too long
            return str(found)
    except (RuntimeError, ValueError):  # no home, or a NUL
        pass
    raise WrongAddress(f"the file that {name} names is missing")


def _words(text: str) -> dict[str, str]:
    """Read `host=… user=…`; empty if it is something else."""
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        word = _WORDS.match(text, at)
        if word is None:
            return {}
        name, value = word[1], word[2]
        found[name] = re.sub(r"\\(.)", r"\1", value[1:-1] if value.startswith("'") else value)
        at = word.end()
    return found if {"host", "hostaddr", "dbname", "service"} & set(found) else {}
