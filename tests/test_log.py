"""The form of log lines, and that no secret is ever in one."""

import json
import subprocess
import sys

import pytest
from pydantic import SecretStr

from daemon.log import masker, secrets_of
from daemon.settings import Settings
from tests.support.linear import assert_linear
from tests.support.postgres import ROOT

DSN = "postgresql://postgres:s3cret%2Fword@db.example.com:5432/postgres"


def say(code: str, log_format: str | None = "json", secrets: tuple[str, ...] = ()) -> list[str]:
    """The lines that `code` logs, in a process of its own: logging is a process's, and pytest has its own."""
    setup = f"import logging, structlog\nfrom daemon import log\nlog.configure({log_format!r}, secrets={secrets!r})\n"
    command = [sys.executable, "-c", setup + "log = structlog.stdlib.get_logger('daemon.test')\n" + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_off_a_terminal_every_line_is_json_with_what_was_bound():
    (line,) = say(
        "structlog.contextvars.bind_contextvars(run_id='job_1')\nlog.info('run.claimed', attempt=2, prompt='Füchse')",
        log_format=None,
    )
    said = json.loads(line)
    assert said.pop("timestamp").endswith("Z")
    assert said == {
        "event": "run.claimed",
        "level": "info",
        "logger": "daemon.test",
        "run_id": "job_1",
        "attempt": 2,
        "prompt": "Füchse",
    }


def test_pretty_is_for_people():
    (line,) = say("log.warning('listener.disconnected', failures=1)", log_format="pretty")
    assert "listener.disconnected" in line
    assert "failures=1" in line
    assert not line.startswith("{")


def test_libraries_are_quiet_and_come_out_in_the_same_form():
    (line,) = say(
        "logging.getLogger('httpx').info('HTTP Request: GET …')\nlogging.getLogger('uvicorn').error('oh %s', 'no')"
    )
    said = json.loads(line)
    assert (said["event"], said["level"], said["logger"]) == ("oh no", "error", "uvicorn")


@pytest.mark.parametrize("log_format", ["json", "pretty"])
def test_a_traceback_shows_neither_local_variables_nor_secrets(log_format):
    code = (
        "key = 'kept-to-itself'\n"
        "try:\n    local = 'from-the-frame'.upper()\n    raise ValueError('refused kept-to-itself')\n"
        "except ValueError:\n    log.exception('provider.failed', url='https://me:hunter22@example.com/x')\n"
    )
    text = "\n".join(say(code, log_format, secrets=("kept-to-itself",)))
    assert "ValueError" in text
    assert "refused ***" in text
    assert "https://me:***@example.com/x" in text
    for secret in ("kept-to-itself", "hunter22", "FROM-THE-FRAME"):
        assert secret not in text
    if log_format == "json":
        json.loads(text)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"cannot reach {DSN}", "cannot reach postgresql://postgres:***@db.example.com:5432/postgres"),
        ("Bearer abc.def", "Bearer ***"),
        ("https://api.example.com/v1?key=abc&alt=json", "https://api.example.com/v1?key=***&alt=json"),
        ("sk-proj-abcdefghijklmnop1234", "***"),
        ("sb_secret_abc_def", "***"),
        ("a token eyJhbGciOi.eyJzdWIi.c2lnbmF0dXJl here", "a token *** here"),
        ("two of them: ://a:b@c and x.y.eyJhbGci.eyJz.c2ln.z", "two of them: ://a:***@c and x.y.***.z"),
        ("mask me: a\\b'c\"d", "mask me: ***"),
        (r"as JSON: a\\b'c\"d", "as JSON: ***"),
        ("https://127.0.0.1:54321/storage, an http://user@host, a 16:9 sketch-like fox", None),
    ],
)
def test_secrets_are_masked_and_the_rest_is_not(text, masked):
    assert masker(["a\\b'c\"d"])(text) == (masked or text)


def test_secrets_too_short_to_be_any_are_not_looked_for():
    assert masker(["a", ""])("a banana") == "a banana"


def test_secrets_include_the_password_of_the_database_url():
    settings = Settings(_env_file=None, DATABASE_URL=SecretStr(DSN), OPENAI_API_KEY=SecretStr("key-of-openai"))
    assert {DSN, "s3cret%2Fword", "s3cret/word", "key-of-openai"} <= set(secrets_of(settings))


@pytest.mark.parametrize("log_format", ["json", "pretty"])
def test_a_run_is_found_by_its_id_and_its_words_are_masked(log_format):
    run = "sk-SK-hero-image-2026-11-27"
    code = f"log.info('run.finished', run_id={run!r}, provider='openai', error='openai has no {run}')"
    (line,) = say(code, log_format, secrets=("openai",))
    assert line.count(run) == 1
    assert line.count("openai") == 1
    assert "*** has no ***" in line


LONG = {
    "beginnings of passwords": lambda size: "://a:" * (size // 5),
    "beginnings of passwords before an at": lambda size: "://a" * (size // 4) + "@",
    "beginnings of tokens": lambda size: "eyJ-" * (size // 4),
    "tokens of two parts": lambda size: "eyJ-a.a " * (size // 8),
    "parts of tokens": lambda size: "eyJ." * (size // 4),
    "beginnings of keys": lambda size: "sk-AIza-" * (size // 8),
    "blanks behind a scheme": lambda size: "Bearer" + " " * size + "'",
    "parameters": lambda size: "?key=" * (size // 5),
    "nearly the secret": lambda size: "a" * size,
}


@pytest.mark.parametrize("text", LONG)
def test_masking_takes_linear_time(text):
    assert_linear(masker(["a" * 40 + "b"]), LONG[text])
