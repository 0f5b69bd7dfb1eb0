"""The database as a command sees it: one connection, and every mishap said in one sentence with a cure."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TypeAlias
from urllib.parse import urlsplit

import asyncpg

from daemon.errors import ImageJobsError, Misconfigured

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

TRANSACTION_POOLER = 6543
"""There, neither LISTEN nor prepared statements work, and LISTEN fails without a word."""

HOW_TO_WRITE_IT = (
    "Write it like postgresql://USER@HOST:5432/DATABASE, with a colon and the password behind USER, "
    "special characters as %XX."
)


@asynccontextmanager
async def connected(dsn: str, *, timeout: float = 10.0) -> AsyncGenerator[Connection, None]:
    """A connection on which json and jsonb are Python objects, both ways.

    Args:
        dsn: Direct connection or pooler.
        timeout: Seconds to connect, and for each statement.

    Raises:
        Misconfigured: If the address, the user, the password or the database's name is wrong.
        ImageJobsError: For everything else that the database says, here or inside the block.
    """
    connection = await _connect(dsn, timeout)
    try:
        for name in ("json", "jsonb"):
            await connection.set_type_codec(name, schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
        yield connection
    except asyncpg.PostgresError as error:
        raise explain(error) from error
    except BrokenPipeError:
        raise  # stdout's: whoever read what a command prints has read enough
    except (ConnectionError, TimeoutError, asyncpg.InterfaceError) as error:
        raise ImageJobsError(
            f"The connection to {place(dsn)} was lost ({type(error).__name__}).", "Try again."
        ) from error
    finally:
        connection.terminate()


def refuse_transaction_pooler(dsn: str) -> None:
    """Refuses port 6543 of Supabase, where a daemon would be deaf.

    Raises:
        Misconfigured: If the address names it.
    """
    if place(dsn).endswith(f":{TRANSACTION_POOLER}"):
        raise Misconfigured(
            f"DATABASE_URL leads to a pooler in transaction mode (port {TRANSACTION_POOLER}), which knows no LISTEN.",
            "Use the direct connection or the session pooler: port 5432.",
        )


def explain(error: asyncpg.PostgresError) -> ImageJobsError:
    """What the database said, with a cure where we know one."""
    message = _sentence(error)
    match error:
        case (
            asyncpg.UndefinedTableError()
            | asyncpg.UndefinedFunctionError()
            | asyncpg.UndefinedColumnError()
            | asyncpg.InvalidSchemaNameError()
        ):
            return ImageJobsError(f"The database is not ready for image-jobs: {message}", "Run image-jobs migrate.")
        case asyncpg.InsufficientPrivilegeError():
            return ImageJobsError(
                f"The database user is not allowed to: {message}", "Use the user postgres, who owns the tables."
            )
        case _:
            return ImageJobsError(message, getattr(error, "hint", None) or "")


def place(dsn: str) -> str:
    """Host and port of a DSN, which is all of it that may be shown."""
    try:
        parts = urlsplit(dsn)
        return f"{parts.hostname}:{parts.port or 5432}" if parts.hostname else "the database"
    except ValueError:
        return "the database"


async def _connect(dsn: str, timeout: float) -> Connection:
    try:
        return await asyncpg.connect(
            dsn,
            timeout=timeout,
            command_timeout=timeout,
            statement_cache_size=0,  # a pooler in transaction mode knows no prepared statements
            server_settings={"application_name": "image-jobs command"},
        )
    except (asyncpg.InvalidPasswordError, asyncpg.InvalidAuthorizationSpecificationError) as error:
        raise Misconfigured(
            f"{place(dsn)} refuses the user or the password.", "Correct them in DATABASE_URL."
        ) from error
    except asyncpg.InvalidCatalogNameError as error:
        raise Misconfigured(f"{_sentence(error)}", "Correct the database's name in DATABASE_URL.") from error
    except asyncpg.PostgresError as error:
        raise ImageJobsError(
            f"{place(dsn)} accepts no connection: {_sentence(error)}", "Wait until it does, or correct DATABASE_URL."
        ) from error
    except TimeoutError as error:
        raise ImageJobsError(
            f"{place(dsn)} did not answer within {timeout:.0f} seconds.",
            "Check DATABASE_URL and the network (a direct Supabase connection needs IPv6; its session pooler does not).",
        ) from error
    except OSError as error:
        reason = "connection refused" if isinstance(error, ConnectionRefusedError) else error.strerror or str(error)
        raise ImageJobsError(
            f"There is no database at {place(dsn)} ({reason}).",
            "Start it, or correct DATABASE_URL.",
        ) from error
    except (ValueError, OverflowError) as error:  # said without its words: they may be a piece of the password
        raise Misconfigured("DATABASE_URL is not the address of a Postgres database.", HOW_TO_WRITE_IT) from error


def _sentence(error: asyncpg.PostgresError) -> str:
    message = str(getattr(error, "message", None) or type(error).__name__)
    return f"{message[:1].upper()}{message[1:].rstrip('.')}."
