"""events, cancel, requeue: what a run went through, and what to do with it."""

import asyncio
from typing import Any

import typer

from daemon.cli.console import AsJson, RunId, database_url, load_settings, print_json
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
    for row in rows:
        payload: dict[str, Any] = row["payload"] or {}
        time = row["ts"].astimezone().strftime("%H:%M:%S.%f")[:-3]
        percent = f"{payload['progress']:>3} %" if payload.get("progress") is not None else ""
        said = f"{payload.get('event', row['kind']):<12} {percent:<5} {payload.get('message', '')}"
        typer.secho(f"{time}  {said}".rstrip(), fg="red" if row["kind"] == "error" else None)


def cancel(run: RunId, as_json: AsJson = False) -> None:
    """Stop a run. One that has ended stays as it is.

    Example: image-jobs cancel job_1763950000000_0a1b2c3d4e5f
    """
    _order("select public.cancel_run($1)", run, as_json=as_json)


def requeue(run: RunId, as_json: AsJson = False) -> None:
    """Put a run in line again, as if it were new.

    Whatever state it is in: an operator may.

    Example: image-jobs requeue job_1763950000000_0a1b2c3d4e5f
    """
    _order("select public.requeue_run($1)", run, as_json=as_json)


def _order(call: str, run_id: str, *, as_json: bool) -> None:
    """Calls one of the functions that answer with a run's ImageJobRecord."""

    async def order() -> dict[str, Any]:
        async with connected(database_url(load_settings())) as connection:
            record: dict[str, Any] = await connection.fetchval(call, run_id)
            return record

    record = asyncio.run(order())
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
            raise ImageJobsError(f"There is no run {run_id}.", "Check its id; the view image_jobs lists them all.")
        return [dict(row) for row in rows]
