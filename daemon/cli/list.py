"""list: the newest runs."""

import asyncio
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

import typer

from daemon.cli.console import AsJson, database_url, dollars, load_settings, plain, print_json
from daemon.cli.tables import screen_width, table
from daemon.database import connected

WINDOW = 20_000
"""How many of the runs that have ended are looked at, the last ones: a filter that nothing passes would walk a whole table."""
MOST = 100_000
"""Runs that are shown at once."""

# Each part is an index of its own. The ids come first, so that only the payloads of rows that are shown are read.
_PARTS = " union all ".join(
    f"(select r.* from public.runs r where r.kind = 'image_gen' and {condition})"  # noqa: S608 - of constants
    for condition in (
        "r.queue_state = 'pending' and r.rank is not null",
        "r.queue_state = 'pending' and r.rank is null",
        "r.queue_state = 'running'",
        f"r.queue_state is null and r.ticket is not null order by r.claim desc limit greatest($4, {WINDOW})",
        # From before the migration, in the order of their ids: nothing says which of them is the newest.
        f"r.queue_state is null and r.ticket is null order by r.id desc limit greatest($4, {WINDOW})",
    )
)
RUNS = f"""
select r.id, r.status, coalesce(r.routed_to, r.processor) as processor, r.subject_id as workflow, r.metadata ->> 'nodeId' as node,
  r.created_at, r.started_at, r.finished_at, r.attempt, r.progress, r.message, r.payload ->> 'code' as code,
  r.payload ->> 'error' as error, r.payload ->> 'hint' as hint, r.payload ->> 'imageUrl' as image_url,
  (r.payload ->> 'cost')::float8 as cost, r.metadata -> 'promptSpec' ->> 'basePrompt' as prompt
from (
  select n.id from ({_PARTS}) n
  where ($1::text is null or n.status = $1)
    and ($2::text is null or split_part(coalesce(n.routed_to, n.processor), ':', 1) = $2)
    and ($3::text is null or n.payload ->> 'code' = $3)
  order by n.created_at desc nulls last, n.id desc limit $4
) newest
join public.runs r on r.id = newest.id
order by r.created_at desc nulls last, r.id desc"""  # noqa: S608 - of constants


class Status(StrEnum):
    """The states of a run."""

    pending = "pending"
    running = "running"
    completed = "completed"
    failed = "failed"
    cancelled = "cancelled"


def list_runs(
    status: Annotated[Status | None, typer.Option(help="Only runs in this state.")] = None,
    provider: Annotated[str | None, typer.Option(help="Only runs that go to this provider, like openai.")] = None,
    code: Annotated[str | None, typer.Option(help="Only runs that failed with this code, like refused.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=MOST, help="How many at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List runs, the newest first.

    Of those that have ended, the last 20,000 are looked at.

    Example: image-jobs list --status failed --provider openai --limit 5
    """
    rows = asyncio.run(_fetch(database_url(load_settings()), status, provider, code, limit))
    if as_json:
        print_json(rows)
    elif not rows:
        typer.echo("There is no such run." if status or provider or code else "No runs yet.")
    else:
        _print(rows)


async def _fetch(
    dsn: str, status: Status | None, provider: str | None, code: str | None, limit: int
) -> list[dict[str, Any]]:
    async with connected(dsn) as connection:
        rows = await connection.fetch(RUNS, status and status.value, provider, code, limit)
        return [plain(dict(row)) for row in rows]


def _print(rows: list[dict[str, Any]]) -> None:
    shown = [
        {
            "run": row["id"],
            "status": row["status"],
            "age": _age(row["created_at"]),
            "cost": _cost(row),
            "what": " - ".join(filter(None, (row["processor"], _said(row)))),
        }
        for row in rows
    ]
    header, *runs = table(shown, screen_width(), sentence="what")
    for line in header:
        typer.secho(line, dim=True)
    for row, lines in zip(rows, runs, strict=True):
        typer.secho("\n".join(lines), fg="red" if row["status"] == "failed" else None)


def _said(row: dict[str, Any]) -> str:
    match row["status"]:
        case "failed":
            return ": ".join(filter(None, (row["code"], row["error"])))
        case "running":
            return " ".join(filter(None, (f"{row['progress'] or 0} %", row["message"])))
        case "pending":
            return row["message"] or ""
        case _:
            return ""


def _cost(row: dict[str, Any]) -> str:
    if row["cost"] is not None:
        return dollars(row["cost"])
    return "?" if row["status"] == "completed" else ""


def _age(created_at: str | None) -> str:
    """Return how long ago that was, in its greatest unit."""
    if created_at is None:
        return ""
    age = max(datetime.now(UTC) - datetime.fromisoformat(created_at), timedelta(0))
    for unit, letter in ((timedelta(days=1), "d"), (timedelta(hours=1), "h"), (timedelta(minutes=1), "m")):
        if age >= unit:
            return f"{age // unit} {letter}"
    return f"{age.seconds} s"
