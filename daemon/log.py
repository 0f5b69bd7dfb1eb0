"""Configures logging: pretty on a terminal, one JSON object a line otherwise, and never a secret.

Event names are dotted, `thing.verb`; ends are in the past tense: `run.claimed`, `listener.disconnected`. Fields that all
lines of a run have are bound once, in `structlog.contextvars`: each asyncio task has its own. Libraries that use the
standard library's logging come out in the same form, from WARNING on.
"""

import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterable
from secrets import token_hex
from types import TracebackType
from typing import cast
from urllib.parse import quote

import structlog
from pydantic import SecretStr
from structlog.typing import EventDict, Processor, WrappedLogger

from daemon.dsn import WrongAddress, understand
from daemon.settings import Settings
from daemon.terminal import has_all_characters

MASK = "***"
SHORTEST_SECRET = 6
"""Shorter ones are not looked for: masking every `a` would hide everything but the secret."""

_LOOKS_SECRET = re.compile(
    r"""(?P<before>
        \b(?:Bearer|Basic)\s+
      | [?&](?:key|token|apikey|api_key|signature|sig|X-Amz-Signature|X-Amz-Security-Token)=
    )[^\s"'&@\\]+
    | \b(?:sk|rk)-[A-Za-z0-9_-]{16,}                     # OpenAI, Stability
    | \bsb_secret_[A-Za-z0-9_-]+                         # Supabase
    | \bAIza[A-Za-z0-9_-]{30,}                           # Google
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SIGNS = ("bearer", "basic", "key=", "token=", "signature=", "sig=", "sk-", "rk-", "sb_secret_", "aiza")
"""One of them is in every text in which the pattern finds something: it is ten times as slow as to look for them."""
# Those that end in something: whether it comes is looked up once a word, not once for each beginning (which is quadratic).
_PASSWORD = re.compile(r"""(?P<before>://[^\s/:@"']*:)[^\s"'&@\\]+""")
_WORD = re.compile(r"""[^\s"']+""")
_DOTTED = re.compile(r"[A-Za-z0-9_.-]{8,}")
_TOKEN = re.compile(r"\beyJ[A-Za-z0-9_-]", re.IGNORECASE)

_STRUCTURE = ("run_id", "processor", "provider", "model", "provider_job_id", "code", "outcome")
"""Fields of a line by which it is found: our words and ids, also where a run is called `sk-…` or a key `openai`."""
_FINDABLE = re.compile(r"[A-Za-z0-9_.:-]{1,250}")


def masker(secrets: Iterable[str] = ()) -> Callable[[str], str]:
    """Return a function that replaces the given secrets in a text, and everything that looks like one, by `***`.

    It takes linear time: texts come from anywhere.
    """
    spellings = {form for secret in secrets if len(secret) >= SHORTEST_SECRET for form in _spellings(secret)}
    known = re.compile("|".join(re.escape(form) for form in sorted(spellings, key=len, reverse=True)) or r"(?!)")

    def mask(text: str) -> str:
        text = known.sub(MASK, text)
        if "://" in text and "@" in text:
            text = _WORD.sub(_mask_passwords, text)
        lower = text.lower()
        if "eyj" in lower and "." in text:
            text = _DOTTED.sub(_mask_tokens, text)
        if any(sign in lower for sign in _SIGNS):
            text = _LOOKS_SECRET.sub(lambda found: (found["before"] or "") + MASK, text)
        return text

    return mask


def _mask_passwords(word: re.Match[str]) -> str:
    """Mask `scheme://user:password@`."""
    end = word[0].rfind("@")
    if end < 0:
        return word[0]
    return _PASSWORD.sub(rf"\g<before>{MASK}", word[0][:end]) + word[0][end:]


def _mask_tokens(dotted: re.Match[str]) -> str:
    """Mask a JWT: three parts, the first of which begins with `eyJ`, that is `{"`."""
    parts = dotted[0].split(".")
    for place in range(len(parts) - 2):
        token = _TOKEN.search(parts[place])
        if token is not None and parts[place + 1]:
            before = ".".join((*parts[:place], parts[place][: token.start()]))
            rest = ".".join(parts[place + 3 :])
            return before + MASK + (f".{rest}" if rest else "")
    return dotted[0]


def secrets_of(settings: Settings) -> list[str]:
    """Return the settings' secrets, and the passwords within those that are URLs."""
    found: list[str] = []
    for name in type(settings).model_fields:
        value: object = getattr(settings, name)
        for each in cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,):
            if not isinstance(each, SecretStr):
                continue
            secret = each.get_secret_value()
            found.append(secret)
            try:
                password = understand(secret).password
            except WrongAddress:
                continue
            if password:
                found += [password, quote(password, safe="")]
    return found


def configure(log_format: str | None = None, *, secrets: Iterable[str] = ()) -> bool:
    """Send structlog and the standard library's logging to stderr.

    Args:
        log_format: `json` or `pretty`; None: pretty if stderr is a terminal.
        secrets: Texts that must never be printed. They are masked in the finished line, tracebacks included.

    Returns:
        Whether lines are pretty.
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
    kept: dict[str, str] = {}
    unguessable = token_hex(8)

    def set_apart(_logger: WrappedLogger, _method: str, fields: EventDict) -> EventDict:
        """Put a sign in place of the structure, whose values are fit for every form of a line."""
        kept.clear()
        for number, name in enumerate(_STRUCTURE):
            value: object = fields.get(name)
            if isinstance(value, str) and _FINDABLE.fullmatch(value) and mask(value) != value:
                kept[sign := f"kept-{unguessable}-{number}"] = value
                fields[name] = sign
        return fields

    def masked(_logger: WrappedLogger, _method: str, line: EventDict) -> str:
        text = mask(str(line))
        for sign, value in kept.items():
            text = text.replace(sign, value, 1)
        return text

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                set_apart,
                *_renderer(pretty),
                masked,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("daemon").setLevel(logging.INFO)
    logging.captureWarnings(capture=True)
    _catch_the_rest()
    return pretty


def _catch_the_rest() -> None:
    """Log the exceptions that Python itself would print: neither JSON nor masked."""
    log = structlog.stdlib.get_logger("daemon")

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        else:
            log.critical("daemon.failed", error=f"{kind.__name__}: {error}", exc_info=(kind, error, trace))

    def uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            name = args.thread.name if args.thread is not None else None
            log.error("thread.failed", thread=name, exc_info=args.exc_value)

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        log.error("exception.ignored", where=repr(args.object)[:200], exc_info=args.exc_value)

    sys.excepthook = uncaught
    threading.excepthook = uncaught_in_thread
    sys.unraisablehook = unraisable


def _renderer(pretty: bool) -> list[Processor]:
    """Return the last steps. Tracebacks never show local variables: keys and images are among them."""
    if pretty:
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    trace = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    return [
        structlog.processors.ExceptionRenderer(trace),
        structlog.processors.JSONRenderer(ensure_ascii=not has_all_characters(sys.stderr)),
    ]


def _spellings(secret: str) -> set[str]:
    """Return a secret as it is, and as it reads within JSON or a repr."""
    return {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]}
