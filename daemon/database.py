"""Connects commands to the database, and turns each of its errors into one sentence with a cure."""

import json
import os
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TypeAlias

import asyncpg

from daemon.dsn import WrongAddress, address, understand
from daemon.errors import DaemonTooOld, ImageJobsError, Misconfigured

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

TRANSACTION_POOLER = 6543
"""Neither LISTEN nor prepared statements work on this port, and LISTEN fails without a word."""

CONNECTIONS = 5
"""Connections that a daemon holds at most."""

EXPECTED = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""Errors of a connection or a statement."""

FINAL = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
    asyncpg.InvalidParameterValueError,
    DaemonTooOld,
)
"""Of these: what waiting does not mend."""

REFUSED_SETTINGS = (
    asyncpg.InvalidParameterValueError,
    asyncpg.UndefinedObjectError,
    asyncpg.CantChangeRuntimeParamError,
    asyncpg.PostgresSyntaxError,
)
"""Errors of connecting with a parameter, or one of `options`, that the server does not take."""


@asynccontextmanager
async def connected(dsn: str, *, timeout: float = 10.0) -> AsyncGenerator[Connection, None]:
    """Yield a connection on which json and jsonb are Python objects, both ways.

    Args:
        dsn: Direct connection or pooler.
        timeout: Seconds to connect, and for each statement.

    Raises:
        Misconfigured: If the address, the user, the password or the database's name is wrong.
        ImageJobsError: For every other error of the database, here or inside the block.
    """
    connection = await _connect(dsn, timeout)
    try:
        for name in ("json", "jsonb"):
            await connection.set_type_codec(name, schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
        yield connection
    except asyncpg.PostgresError as error:
        raise explain(error) from error
    except BrokenPipeError:
        raise  # stdout's: the reader of a command's output has closed it
    except (ConnectionError, TimeoutError, asyncpg.InterfaceError) as error:
        raise ImageJobsError(
            f"The connection to {place(dsn)} was lost ({type(error).__name__}).", "Try again."
        ) from error
    finally:
        connection.terminate()


def refuse_transaction_pooler(dsn: str) -> None:
    """Refuse port 6543 of Supabase, where no notification arrives.

    Raises:
        Misconfigured: If the address names it.
    """
    if place(dsn).endswith(f":{TRANSACTION_POOLER}"):
        raise Misconfigured(
            f"DATABASE_URL leads to a pooler in transaction mode (port {TRANSACTION_POOLER}), which knows no LISTEN.",
            "Use the direct connection or the session pooler: port 5432.",
        )


def explain(error: asyncpg.PostgresError) -> ImageJobsError:
    """Return the error of the database as one sentence, with a cure where we know one."""
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
        case asyncpg.CheckViolationError() if "base64" in (error.constraint_name or ""):
            return ImageJobsError(
                "There is a word in it that looks like base64, which the database does not keep.",
                "Put blanks into it, or name a picture by its URL.",
            )
        case asyncpg.DataError() if getattr(error, "message", None) is None:  # from asyncpg, before it was sent
            return ImageJobsError("A value does not fit the database.", "Correct what was typed.")
        case _:
            return ImageJobsError(message, getattr(error, "hint", None) or "")


def may_pass(error: BaseException) -> bool:
    """Return whether waiting may mend an error of the database, as it came or as it was explained."""
    if isinstance(error, Misconfigured):
        return False
    cause = error.__cause__ if isinstance(error, ImageJobsError) else error
    return isinstance(cause, EXPECTED) and not isinstance(cause, FINAL)


def place(dsn: str) -> str:
    """Return host and port of a DSN, which is all of it that may be shown."""
    try:
        return understand(dsn).place
    except WrongAddress:
        return "the database"


async def _connect(dsn: str, timeout: float) -> Connection:
    try:
        return await asyncpg.connect(
            address(dsn),
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
    except REFUSED_SETTINGS as error:
        raise Misconfigured(
            f"{place(dsn)} refuses a setting: {_sentence(error)}",
            "Correct the parameters of DATABASE_URL, or PGOPTIONS.",
        ) from error
    except asyncpg.PostgresError as error:
        raise ImageJobsError(
            f"{place(dsn)} accepts no connection: {_sentence(error)}", "Wait until it does, or correct DATABASE_URL."
        ) from error
    except TimeoutError as error:
        raise ImageJobsError(
            f"{place(dsn)} did not answer within {timeout:.0f} seconds.",
            "Check DATABASE_URL and the network (a direct Supabase connection needs IPv6; its session pooler does not).",
        ) from error
    except ssl.SSLCertVerificationError as error:
        raise Misconfigured(
            f"{place(dsn)} shows a certificate that cannot be verified.",
            "Name the certificate of its authority by sslrootcert in DATABASE_URL; Supabase has it in the database settings.",
        ) from error
    except OSError as error:
        reason = "connection refused" if isinstance(error, ConnectionRefusedError) else error.strerror or str(error)
        raise ImageJobsError(
            f"There is no database at {place(dsn)} ({reason}).",
            "Start it, or correct DATABASE_URL.",
        ) from error
    except (ValueError, OverflowError) as error:  # without its words: they may be a piece of the password
        named = ", ".join(sorted(name for name in os.environ if name.startswith("PG"))) or "a service file"
        raise Misconfigured(
            f"There is no connecting with DATABASE_URL and what else speaks of Postgres ({named}).",
            "Unset these variables, or correct them.",
        ) from error


def _sentence(error: asyncpg.PostgresError) -> str:
    message = str(getattr(error, "message", None) or type(error).__name__)
    if message.endswith("."):  # ours, which may begin with the name of a field
        return message
    return f"{message[:1].upper()}{message[1:]}."
