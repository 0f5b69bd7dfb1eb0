"""events, cancel, requeue: the audit trail of a run, and its two RPCs."""

import asyncio
from typing import Any

import typer

from daemon.cli.console import AsJson, RunId, database_url, load_settings, print_json
from daemon.cli.tables import BESIDE, fold, screen_width
from daemon.database import connected
from daemon.errors import ImageJobsError


def events(run: RunId, as_json: AsJson = False) -> None:
    """Tell what has happened to a run, from first to last.

    Example: image-jobs events job_1763950000000_0a1b2c3d4e5f
    """
    rows = asyncio.run(_events(database_url(load_settings()), run))
    if as_json:
        print_json(rows)
        return
    width = screen_width()
    for row in rows:
        typer.secho("\n".join(_lines(row, width)), fg="red" if row["kind"] == "error" else None)


def _lines(event: dict[str, Any], width: int) -> list[str]:
    """Lay out one event: its message folds beside time and name, or where that leaves little, below them."""
    payload: dict[str, Any] = event["payload"] or {}
    time = event["ts"].astimezone().strftime("%H:%M:%S.%f")[:-3]
    percent = f"{payload['progress']:>3} %" if payload.get("progress") is not None else ""
    begin = f"{time}  {payload.get('event', event['kind']):<12} {percent:<5} "
    left = width - len(begin)
    if left >= BESIDE:
        first, *others = fold(payload.get("message") or "", left)
        return [(begin + first).rstrip(), *(" " * len(begin) + line for line in others)]
    return [begin.rstrip(), *("    " + line for line in fold(payload.get("message") or "", width - 4) if line)]


def cancel(run: RunId, as_json: AsJson = False) -> None:
    """Stop a run. One that has ended stays as it is.

    Example: image-jobs cancel job_1763950000000_0a1b2c3d4e5f
    """
    _call("select public.cancel_run($1)", run, as_json=as_json)


def requeue(run: RunId, as_json: AsJson = False) -> None:
    """Put a run in line again, as if it were new.

    Whatever state it is in: an operator may.

    Example: image-jobs requeue job_1763950000000_0a1b2c3d4e5f
    """
    _call("select public.requeue_run($1)", run, as_json=as_json)


def _call(statement: str, run_id: str, *, as_json: bool) -> None:
    """Run a statement that returns a run's ImageJobRecord, and print it."""

    async def fetch() -> dict[str, Any]:
        async with connected(database_url(load_settings())) as connection:
            record: dict[str, Any] = await connection.fetchval(statement, run_id)
            return record

    record = asyncio.run(fetch())
    if as_json:
        print_json(record)
    else:
        typer.echo(f"{run_id} is {record['status']}.")


async def _events(dsn: str, run_id: str) -> list[dict[str, Any]]:
    async with connected(dsn) as connection:
        rows = await connection.fetch(
            "select seq, ts, kind, payload from public.run_events where run_id = $1 order by seq", run_id
        )
        if not rows and not await connection.fetchval("select exists (select from public.runs where id = $1)", run_id):
            raise ImageJobsError(f"There is no run {run_id}.", "Check its id: image-jobs list shows the newest.")
        return [dict(row) for row in rows]
