"""Types of settings: how a value is tidied, and in which words it is refused. No refusal repeats a value."""

import ipaddress
import math
import os
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from daemon import dsn

MOST_DOLLARS = 1000.0
"""For one image: more is a mistake in writing."""
SHORTEST_WEBHOOK_SECRET = 16
"""Bytes. `image_jobs.set_webhook_secrets` holds to the same."""
SHORTEST = timedelta(seconds=0.1)
"""Of what nothing could be done in: 0 would end every call, or job, once it is paid for."""
LONGEST = timedelta(days=36500)
"""The longest that Postgres can add to a time."""

_BLANK = "".join(
    map(chr, (*range(0x21), 0x7F, 0x85, 0xA0, 0xAD, 0x1680, *range(0x2000, 0x2010), *range(0x2028, 0x2030)))
)
_INVISIBLE = f"{_BLANK}\u205f\u2060\u3000\ufeff"
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’"}  # noqa: RUF001 - a word processor's
_DAYS = re.compile(r"([0-9]{1,5}) ?d?")
_WHOLE = re.compile(r"[+-]?\d+(?:_\d+)*")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*\.?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?:.*@)?(?:\[[0-9a-f:.]*\]|[^\[\]:]*)(?::\d*)?", re.IGNORECASE)
_TRUE = {"1", "true", "yes", "on", "t", "y"}
_FALSE = {"0", "false", "no", "off", "f", "n"}


def stripped(text: str) -> str:
    """Return a value without the white space, invisible characters and quotes around it.

    Secrets of Kubernetes end in a newline, and `docker --env-file` keeps quotes.
    """
    while True:
        text = text.strip(_INVISIBLE)
        end = _QUOTES.get(text[:1])
        if len(text) < 2 or text[-1] != end or {text[0], end} & set(text[1:-1]):
            return text
        text = text[1:-1]


def tidied(value: object) -> object:
    """Strip any setting. Raises ValueError if it is no text."""
    if isinstance(value, SecretStr):
        return SecretStr(_tidied(value.get_secret_value()))
    return _tidied(value) if isinstance(value, str) else value


def _tidied(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("it is no UTF-8 text")
    return stripped(text)


def _header_value(value: SecretStr) -> SecretStr:
    """Refuse what no HTTP header can carry: sent, it would look like a broken connection, and perhaps like a paid call."""
    for character in value.get_secret_value():
        if character < " " or character == "\x7f":
            raise ValueError("there is a line break or another control character inside; copy it again, in one piece")
        if character > "~":
            raise ValueError("there is a character inside that no key has; copy it again")
    return value


def _database_url(value: SecretStr) -> SecretStr:
    return SecretStr(dsn.understand(value.get_secret_value()).url)


def _webhook_secrets(value: object) -> object:
    """Split several secrets at commas. With an empty one, forged deliveries would verify."""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if not isinstance(value, str):
        return value
    secrets = [stripped(secret) for secret in value.split(",")]
    if any(len(secret.encode()) < SHORTEST_WEBHOOK_SECRET for secret in secrets):
        raise ValueError(
            f"a secret is empty or shorter than {SHORTEST_WEBHOOK_SECRET} bytes; remove the variable to accept no webhooks"
        )
    return tuple(SecretStr(secret) for secret in secrets)


def _whole(value: object) -> object:
    """Read a whole number. Separators of thousands are refused: 50.000 is fifty elsewhere."""
    if not isinstance(value, str):
        return value
    if _WHOLE.fullmatch(value) and len(value) <= 30:
        return int(value)
    try:
        number = float(value.replace("_", "")) if "e" in value.lower() else math.nan
    except ValueError:
        number = math.nan
    if math.isfinite(number) and number.is_integer():
        return int(number)
    raise ValueError("it should be a whole number, in digits alone")


def _port(value: object) -> object:
    """A Service called image-jobs-metrics makes Kubernetes set IMAGE_JOBS_METRICS_PORT to `tcp://…`: not ours."""
    return None if isinstance(value, str) and value.startswith("tcp://") else _whole(value)


def _seconds(value: object) -> object:
    """Read a number of seconds."""
    if isinstance(value, timedelta):
        return value
    if isinstance(value, int | float | str):
        try:
            return timedelta(seconds=float(value))
        except (ValueError, OverflowError):
            pass
    raise ValueError("it should be a number of seconds, like 30 or 2.5")


def _lasting(value: timedelta) -> timedelta:
    if value < SHORTEST:
        raise ValueError(f"it should be at least {SHORTEST.total_seconds()} seconds")
    return value


def days(value: object) -> object:
    """Read a number of days, as `90` or `90d`. Raises ValueError if it is none."""
    if not isinstance(value, str):
        return value
    if (found := _DAYS.fullmatch(value)) and 1 <= int(found[1]) <= LONGEST.days:
        return timedelta(days=int(found[1]))
    raise ValueError("it should be a number of days, from 1 to 36500, like 90 or 90d")


def _dollars(value: object) -> object:
    """Read an amount in US dollars."""
    if isinstance(value, str):
        try:
            value = float(value.removeprefix("$"))
        except ValueError:
            value = math.nan
    if isinstance(value, int | float) and 0 <= value <= MOST_DOLLARS:
        return float(value)
    raise ValueError("it should be an amount in US dollars, like 0.05")


def _flag(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value.lower() not in _TRUE | _FALSE:
        raise ValueError("it should be 1 or 0")
    return value.lower() in _TRUE


def _directory(value: object) -> object:
    if not isinstance(value, str | Path):
        return value
    if "\0" in str(value) or not os.path.isdir(value):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        raise ValueError("there is no such directory")
    if not os.access(value, os.W_OK | os.X_OK):
        raise ValueError("this user may not write there")
    return Path(value)


def _bucket(value: str) -> str:
    if not re.fullmatch(r"[^/\\?#%\x00-\x1f\x7f]{1,90}", value) or set(value) == {"."}:
        raise ValueError("a bucket's name has at most 90 characters, and none of / \\ ? # %")
    if value == "image-sources":
        raise ValueError("image-sources is the bucket of what users upload")
    return value


def _log_format(value: str) -> str:
    if value.lower() not in ("json", "pretty"):
        raise ValueError("it should be json or pretty")
    return value.lower()


def _url(*, shown: bool) -> Callable[[str], str]:
    """Make a validator of http addresses.

    Args:
        shown: It is given to people's browsers: no password may be in it.
    """

    def check(text: str) -> str:
        if not re.match(r"https?://", text, re.IGNORECASE):
            raise ValueError("it begins with neither https:// nor http://")
        if any(not "!" <= character <= "~" or character in '\\"<>^`{|}' for character in text):
            raise ValueError("there is white space or another character inside that no address has")
        try:
            parts = urlsplit(text)
            host, port, user = parts.hostname or "", parts.port, parts.username
        except ValueError:
            raise ValueError("its host or its port is malformed") from None
        if not _AUTHORITY.fullmatch(parts.netloc) or not is_host(host):
            raise ValueError("its host name is none")
        if port == 0:
            raise ValueError("its port is none")
        if shown and user is not None:
            raise ValueError("it has a user or password in it, which everybody would see")
        if "#" in text:
            raise ValueError("there is a # in it")
        return text

    return check


def _alert_url(value: SecretStr) -> SecretStr:
    """Refuse an address that would be sent in the clear, but to this machine."""
    text = _url(shown=False)(value.get_secret_value())
    host = urlsplit(text).hostname or ""
    if not text.lower().startswith("https:") and host not in ("127.0.0.1", "::1", "localhost"):
        raise ValueError("it begins with http://, and the address itself is a secret; it has to be https://")
    return value


def is_host(host: str) -> bool:
    try:
        if ":" in host:
            return bool(ipaddress.IPv6Address(host).packed) and "%" not in host
        if re.fullmatch(r"(.*\.)?\d+\.?", host):
            return bool(ipaddress.IPv4Address(host).packed)
        return bool(_HOST.fullmatch(host))
    except ValueError:
        return False


def _base_url(text: str) -> str:
    if "?" in text:
        raise ValueError("there is a ? in it, where paths are to be added")
    return text.rstrip("/")


Flag = Annotated[bool, BeforeValidator(_flag)]
Dollars = Annotated[float, BeforeValidator(_dollars)] | None
Whole = Annotated[int, BeforeValidator(_whole)]
Port = Annotated[Annotated[int, Field(ge=1, le=65535)] | None, BeforeValidator(_port)]
Seconds = Annotated[timedelta, Field(ge=timedelta(0), le=LONGEST), BeforeValidator(_seconds)]
Lasting = Annotated[Seconds, AfterValidator(_lasting)]
"""Time in which something has to be done."""
Days = Annotated[Annotated[timedelta, Field(ge=timedelta(days=1))] | None, BeforeValidator(days)]
Lease = Annotated[timedelta, Field(ge=timedelta(seconds=1), le=LONGEST), BeforeValidator(_seconds)]
"""Six beats have to fit in."""
Secret = Annotated[SecretStr, AfterValidator(_header_value)] | None
AlertUrl = Annotated[SecretStr, AfterValidator(_alert_url)] | None
DatabaseUrl = Annotated[SecretStr, AfterValidator(_database_url)] | None
WebhookSecrets = Annotated[tuple[SecretStr, ...], BeforeValidator(_webhook_secrets)]
BaseUrl = Annotated[str, AfterValidator(_url(shown=False)), AfterValidator(_base_url)] | None
ShownBaseUrl = Annotated[str, AfterValidator(_url(shown=True)), AfterValidator(_base_url)] | None
ShownUrl = Annotated[str, AfterValidator(_url(shown=True))] | None
Directory = Annotated[Path | None, BeforeValidator(_directory)]
Bucket = Annotated[str, AfterValidator(_bucket)]
LogFormat = Annotated[str, AfterValidator(_log_format)] | None
