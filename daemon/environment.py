"""Read the variables of the process and of `.env`, and point out names that look like a slip of the pen."""

import codecs
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from io import StringIO
from pathlib import Path

from dotenv import dotenv_values

from daemon.errors import Misconfigured

ENV_FILE = Path(".env")
"""In the working directory. The process's own variables win over it."""

OURS = "IMAGE_JOBS_"
BESIDE_SETTINGS = {"IMAGE_JOBS_TOKEN", "IMAGE_JOBS_SKIP_CANVAS"}
"""Read by the command `watch` and by the build, not by the daemon."""
OTHER_NAMES = {
    "OPENAI_API_BASE": "OPENAI_BASE_URL",
    "POSTGRES_URL": "DATABASE_URL",
    "SUPABASE_DB_URL": "DATABASE_URL",
    "SUPABASE_PUBLISHABLE_KEY": "SUPABASE_ANON_KEY",
    "SUPABASE_SECRET_KEY": "SUPABASE_SERVICE_ROLE_KEY",
}
"""Names of other tools → ours."""

_NEAR = 0.88
"""Similarity of two names, 0-1: SUPABASE_SERVICE_KEY is meant (0.89), API_URL (0.86) and AZURE_OPENAI_API_KEY (0.82) are not."""
# Kubernetes writes such variables for every Service, so one that is called image-jobs has some that begin like ours.
_LONGEST_NAME = 200
_KUBERNETES = re.compile(
    rf".{{0,{_LONGEST_NAME}}}_(SERVICE_HOST|SERVICE_PORT(_\w{{1,{_LONGEST_NAME}}})?|PORT(_\d{{1,5}}_(TCP|UDP|SCTP)(_\w{{1,4}})?)?)"
)
_MARKS = (  # that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def variables() -> dict[str, str]:
    """Return the process's variables over those of `.env`, names in capitals.

    Raises:
        Misconfigured: If `.env` cannot be read.
    """
    found = read_file(ENV_FILE) if ENV_FILE.is_file() or ENV_FILE.is_fifo() else {}
    return {**found, **{name.upper(): value for name, value in os.environ.items()}}


def read_file(path: Path) -> dict[str, str]:
    """Return what a file of NAME=value lines sets, in whatever Unicode encoding an editor has saved it.

    Bytes that are no UTF-8 are kept as lone surrogates, so that only a setting which has some is refused: a comment may
    be in Latin-1.

    Raises:
        Misconfigured: If it cannot be read, or is no text.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise Misconfigured(f"{path} cannot be read ({error.strerror}).", "Mend the file, or remove it.") from error
    try:
        text = _decode(raw)
    except UnicodeDecodeError as error:
        raise Misconfigured(f"{path} is damaged: no {error.encoding} text.", "Save it anew, as UTF-8.") from error
    if "\0" in text:
        raise Misconfigured(f"{path} is no text file.", "Write one NAME=value a line, or remove it.")
    return dict(_parse(text))


def remarks(found: Mapping[str, str], known: Iterable[str]) -> list[str]:
    """Return a sentence for each variable that is not known and looks like one of `known`, or begins like ours.

    A remark and no refusal: in a rolling deployment this version meets the variables of the next one, and a Service of
    Kubernetes adds its own.
    """
    names = {name.upper() for name in known}
    told: list[str] = []
    for name in sorted(set(found) - names - BESIDE_SETTINGS):
        ours = name.startswith(OURS)
        if ours and _KUBERNETES.fullmatch(name):
            continue
        near = OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, names, 1, _NEAR)), None)
        if near is not None and (ours or not found.get(near, "").strip()):
            told.append(f"{_shown(name)} is ignored; did you mean {near}?")
        elif ours:
            told.append(f"{_shown(name)} is ignored: this version has no such setting.")
    return told


def _decode(raw: bytes) -> str:
    for mark, encoding in _MARKS:
        if raw.startswith(mark):
            return raw[len(mark) :].decode(encoding, "surrogateescape" if encoding == "utf-8" else "strict")
    if raw[1:2] == b"\0":
        return raw.decode("utf-16-le")
    return raw.decode("utf-16-be") if raw[:1] == b"\0" else raw.decode("utf-8", "surrogateescape")


@lru_cache(maxsize=4)
def _parse(text: str) -> tuple[tuple[str, str], ...]:
    """Cached, since the parser complains of lines on the log, and commands read the file twice."""
    return tuple((name.upper(), value) for name, value in dotenv_values(stream=StringIO(text)).items() if value)


def _shown(name: str) -> str:
    """A name as one line: anything may be one."""
    return re.sub(r"[^A-Z0-9_]", "?", name)[:80]
