"""Fixtures of databases: servers once a session, a template once a server, a database of its own for every test.

A test that asks for `postgres`, `database` or `db` gets PostgreSQL 18. Below tests/sql it runs on the two that Supabase hosts,
unless it is marked `one_postgres`; one that is marked `every_postgres` runs on all three. The nearest mark counts. A version
that is not installed is an error, never a skip.
"""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import asyncpg
import pytest
import structlog

from daemon.dev.postgres import version
from daemon.errors import ImageJobsError
from tests.support.postgres import DEFAULT, VERSIONS, Cluster, bin_dir, connect

SQL_TESTS = Path(__file__).parent / "sql"
HOSTED = ("pg15", "pg17")
"""PostgreSQL 18 has the tests of all other rooms, which go through the same SQL."""
VERSIONS_OF = {"every_postgres": VERSIONS, "one_postgres": ()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    of_room = HOSTED if metafunc.definition.path.is_relative_to(SQL_TESTS) else ()
    marked = (VERSIONS_OF[mark.name] for mark in metafunc.definition.iter_markers() if mark.name in VERSIONS_OF)
    versions = next(marked, of_room)
    if versions and "postgres" in metafunc.fixturenames:
        metafunc.parametrize("postgres", versions, indirect=True, scope="session")


def pytest_report_header() -> list[str]:
    return [f"{name}: {_installed(name)}" for name in VERSIONS]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _forbidden_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if skipped := _forbidden_skips(terminalreporter.config):
        terminalreporter.write_line(f"{skipped} skipped: with CI=true a skipped test is a failure.", red=True)


def _forbidden_skips(config: pytest.Config) -> int:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or os.environ.get("CI") != "true":
        return 0
    return len(reporter.stats.get("skipped", ()))


def _installed(name: str) -> str:
    try:
        return f"PostgreSQL {version(bin_dir(name))}"
    except ImageJobsError as error:
        return f"MISSING. {error.message}"


@pytest.fixture(scope="session", autouse=True)
def plain_tracebacks() -> None:
    """Print tracebacks of workers in this process without rich, if that is installed: its frames take a second."""
    plain = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*structlog.get_config()["processors"][:-1], plain])


@pytest.fixture(scope="session")
def clusters() -> Iterator[Callable[[str], Cluster]]:
    """A function that starts a server on first use; all stop at the end."""
    started: dict[str, Cluster] = {}

    def cluster(name: str) -> Cluster:
        if name not in started:
            started[name] = Cluster(name)
            started[name].start()
        return started[name]

    yield cluster
    for each in started.values():
        each.stop()


@pytest.fixture(scope="session")
def postgres(clusters: Callable[[str], Cluster], request: pytest.FixtureRequest) -> Cluster:
    """The server. Its `database()` is for tests that need several databases, or one per example."""
    return clusters(getattr(request, "param", DEFAULT))


@pytest.fixture
async def database(postgres: Cluster) -> AsyncIterator[str]:
    """The DSN of a fresh, migrated database."""
    async with postgres.database() as dsn:
        yield dsn


@pytest.fixture
async def db(database: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A connection to `database` as `postgres`; json and jsonb are Python objects."""
    connection = await connect(database)
    yield connection
    await connection.close()
