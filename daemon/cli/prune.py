"""prune: delete runs that ended long ago."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Annotated, NamedTuple, cast

import typer

from daemon.cli.console import AsJson, database_url, load_settings, print_json
from daemon.database import Connection, connected
from daemon.errors import ImageJobsError, Misconfigured
from daemon.variables import days

STEP = 5000
"""Runs that one statement looks at: each is a transaction of its own, and locks no more than it deletes."""


def prune(
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="DAYS", help="As 90d: ended longer ago than that.")
    ],
    as_json: AsJson = False,
) -> None:
    """Delete runs that ended long ago, with their events. A running daemon removes their files.

    Kept are runs whose picture a node shows, or an unfinished run starts from. What calls have cost stays in the books.

    Example: image-jobs prune --older-than 90d
    """
    try:
        age = cast("timedelta", days(older_than.strip()))
    except ValueError as error:
        raise Misconfigured(f"--older-than is wrong: {error}.", "Write --older-than 90d.") from None
    pruned = asyncio.run(_prune(database_url(load_settings()), age))
    if as_json:
        print_json({"pruned": pruned.runs, "refused": pruned.refused, "reason": pruned.reason})
    else:
        typer.echo(f"{pruned.runs} {'run was' if pruned.runs == 1 else 'runs were'} deleted.")
    if pruned.refused:
        raise ImageJobsError(
            f"{pruned.refused} could not be deleted: {pruned.reason}.",
            "A foreign key or a trigger of your own keeps them: let that one go along (on delete cascade), then prune again.",
        )


class Pruned(NamedTuple):
    """Result of `prune_before`: runs that were deleted, those that the database refused to delete, and one's reason."""

    runs: int
    refused: int
    reason: str | None


async def _prune(dsn: str, age: timedelta) -> Pruned:
    async with connected(dsn) as connection:
        return await prune_before(connection, age)


async def prune_before(connection: Connection, age: timedelta) -> Pruned:
    """Delete what ended longer ago than `age`, in steps; rest after each for as long as it took."""
    before, after, done = datetime.now(UTC) - age, "", Pruned(0, 0, None)
    while after is not None:
        started = time.monotonic()
        step = await connection.fetchval("select image_jobs.prune_runs($1, $2, $3)", before, after, STEP)
        done = Pruned(done.runs + step["pruned"], done.refused + step["refused"], step["reason"] or done.reason)
        after = step["after"]
        await asyncio.sleep(time.monotonic() - started)
    return done
