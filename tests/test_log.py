"""What a log line looks like, and that no secret is ever in one."""

import json
import subprocess
import sys

import pytest
from pydantic import SecretStr

from daemon.log import masker, secrets_of
from daemon.settings import Settings
from tests.postgres import ROOT

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
        ("mask me: a\\b'c\"d", "mask me: ***"),
        (r"as JSON: a\\b'c\"d", "as JSON: ***"),
        ("https://127.0.0.1:54321/storage, an http://user@host, a 16:9 sketch-like fox", None),
    ],
)
def test_what_is_masked_and_what_is_not(text, masked):
    assert masker(["a\\b'c\"d"])(text) == (masked or text)


def test_secrets_too_short_to_be_any_are_not_looked_for():
    assert masker(["a", ""])("a banana") == "a banana"


def test_the_settings_know_their_secrets_and_the_password_within_the_database_url():
    settings = Settings(_env_file=None, DATABASE_URL=SecretStr(DSN), OPENAI_API_KEY=SecretStr("key-of-openai"))
    assert {DSN, "s3cret%2Fword", "s3cret/word", "key-of-openai"} <= set(secrets_of(settings))
