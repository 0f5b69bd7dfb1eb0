"""How things are said: pretty on a terminal, one JSON object a line elsewhere, and never a secret.

Event names are dotted, `thing.verb`; ends are in the past tense: `run.claimed`, `listener.disconnected`. What a run's
lines have in common is bound once, in `structlog.contextvars`: each asyncio task has its own. Libraries that use the
standard library's logging come out in the same form, from WARNING on.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Iterable
from typing import cast
from urllib.parse import unquote, urlsplit

import structlog
from pydantic import SecretStr
from structlog.typing import EventDict, Processor, WrappedLogger

from daemon.settings import Settings

MASK = "***"
SHORTEST_SECRET = 6
"""Shorter ones are not looked for: masking every `a` would hide everything but the secret."""

_LOOKS_SECRET = re.compile(
    r"""(?P<before>
        ://[^\s/:@"']*: (?=[^\s"']*@)                  # scheme://user:password@
      | \b(?:Bearer|Basic)\s+
      | [?&](?:key|token|apikey|api_key|signature|sig|X-Amz-Signature|X-Amz-Security-Token)=
    )[^\s"'&@\\]+
    | \b(?:sk|rk)-[A-Za-z0-9_-]{16,}                     # OpenAI, Stability
    | \bsb_secret_[A-Za-z0-9_-]+                         # Supabase
    | \bAIza[A-Za-z0-9_-]{30,}                           # Google
    | \beyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*  # JWT
    """,
    re.VERBOSE | re.IGNORECASE,
)


def masker(secrets: Iterable[str] = ()) -> Callable[[str], str]:
    """Makes a function that replaces in a text the given secrets, and whatever looks like one, by `***`."""
    spellings = {form for secret in secrets if len(secret) >= SHORTEST_SECRET for form in _spellings(secret)}
    known = re.compile("|".join(re.escape(form) for form in sorted(spellings, key=len, reverse=True)) or r"(?!)")

    def mask(text: str) -> str:
        return _LOOKS_SECRET.sub(lambda found: (found["before"] or "") + MASK, known.sub(MASK, text))

    return mask


def secrets_of(settings: Settings) -> list[str]:
    """The settings' secrets, and the passwords within those that are URLs."""
    found: list[str] = []
    for name in type(settings).model_fields:
        value: object = getattr(settings, name)
        for each in cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,):
            if not isinstance(each, SecretStr):
                continue
            secret = each.get_secret_value()
            found.append(secret)
            try:
                password = urlsplit(secret).password
            except ValueError:  # not a URL
                continue
            if password:
                found += [password, unquote(password)]
    return found


def configure(log_format: str | None = None, *, secrets: Iterable[str] = ()) -> None:
    """Sends structlog and the standard library's logging to stderr.

    Args:
        log_format: `json` or `pretty`; None: pretty if stderr is a terminal.
        secrets: Texts that must never be printed. They are masked in the finished line, tracebacks included.
    """
    pretty = log_format == "pretty" or (log_format is None and sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if pretty else "iso", utc=not pretty),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    mask = masker(secrets)

    def masked(_logger: WrappedLogger, _method: str, line: EventDict) -> str:
        return mask(str(line))

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderer(pretty), masked],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("daemon").setLevel(logging.INFO)
    logging.captureWarnings(capture=True)


def _renderer(pretty: bool) -> list[Processor]:
    """The last steps. Tracebacks never show local variables: keys and images are among them."""
    if pretty:
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    trace = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    return [structlog.processors.ExceptionRenderer(trace), structlog.processors.JSONRenderer(ensure_ascii=False)]


def _spellings(secret: str) -> set[str]:
    """A secret as it is, and as it reads within JSON or a repr."""
    return {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]}
