"""status: alerts, the queue, the daemons and the latest failures on one screen, drawn from `image_jobs.dashboard`."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from daemon.cli.console import AsJson, database_url, dollars, load_settings, print_json
from daemon.cli.tables import fold, screen_width, table
from daemon.database import Connection, connected

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

Board: TypeAlias = dict[str, Any]
"""The result of `image_jobs.dashboard`; sql/README.md lists the keys."""

REFRESH = 1.0
LATEST = 5
"""Failures that are shown; JSON has ten."""


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Keep looking, once a second, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show alerts, the queue, the daemons and what failed last.

    With --watch --json: one line of JSON a second.

    Example: image-jobs status --watch
    """
    try:
        asyncio.run(_status(database_url(load_settings()), watch=watch, as_json=as_json))
    except KeyboardInterrupt:
        raise typer.Exit(0 if watch else 1) from None


async def _status(dsn: str, *, watch: bool, as_json: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    async with connected(dsn) as connection:
        if as_json:
            print_json(await _look(connection))
            while watch:
                await asyncio.sleep(REFRESH)
                print_json(await _look(connection))
            return
        if not watch:
            Console().print(_screen(await _look(connection)), soft_wrap=True)
            return
        console = Console()
        with Live(_screen(await _look(connection)), console=console, auto_refresh=False, screen=False) as live:
            while True:
                await asyncio.sleep(REFRESH)
                live.update(_screen(await _look(connection)), refresh=True)


async def _look(connection: Connection) -> Board:
    board: Board = await connection.fetchval("select image_jobs.dashboard()")
    return board


def _screen(board: Board) -> "Group":
    from rich.console import Group
    from rich.text import Text

    width = screen_width()
    alerts = [
        {
            "alert": alert["severity"],
            "since": _time(alert["since"]),
            "what": f"{alert['sentence']} {alert['cure']}",
        }
        for alert in board["alerts"]
    ]
    queue = [
        {
            "provider": row["provider"],
            **{state: row[state] for state in ("pending", "running", "completed", "failed")},
            **{
                state: row[state]
                for state in ("delayed", "parked", "cancelled")
                if any(other[state] for other in board["queue"])
            },
            "oldest": _duration(row["oldest_wait"]),
            "note": _closed(row),
        }
        for row in board["queue"]
    ]
    daemons = [
        {
            "daemon": row["name"],
            "state": row["state"],
            "runs": f"{row['in_flight']} of {row['slots']}",
            "version": row["version"],
            "providers": ", ".join(row["providers"]),
        }
        for row in board["daemons"]
    ]
    failures = [
        {"failed": row["id"], "processor": row["processor"], "why": row["error"]} for row in board["failures"][:LATEST]
    ]
    missing = "No daemon is running: start one with image-jobs run."
    parts = [
        *([_table(alerts, width, "what", style="yellow")] if alerts else []),
        _table(queue, width, "note") if queue else Text("No runs in the last hour."),
        *([Text("\n".join(fold(_sums(board["totals"]), width)))] if queue else []),
        _table(daemons, width, "providers") if daemons else Text("\n".join(fold(missing, width)), style="yellow"),
        *([_table(failures, width, "why")] if failures else []),
    ]
    return Group(*(part for each in parts for part in (each, Text())))


def _sums(totals: Mapping[str, Any]) -> str:
    """Return the hour in a sentence."""
    possible = totals["possible_usd_today"]
    return (
        f"Last hour: {totals['completed']} completed, {totals['failed']} failed, {dollars(totals['usd'])}. "
        f"Today (UTC): {dollars(totals['usd_today'])}{f', perhaps {dollars(possible)} more' if possible else ''}. "
        f"{totals['running']} of {totals['slots']} slots are in use."
    )


def _table(rows: Sequence[Mapping[str, Any]], width: int, sentence: str, *, style: str = "") -> "Text":
    from rich.text import Text

    header, *others = table(rows, width, sentence=sentence)
    shown = Text("\n".join(header), style="bold")
    return Text("\n").join([*([shown] if header else []), *(Text("\n".join(lines), style=style) for lines in others)])


def _closed(row: Mapping[str, Any]) -> str:
    """Return why runs of a provider wait, and until when by this machine's clock."""
    if row["state"] == "open":
        return ""
    return f"{row['state']} until {_time(row['until'])}" if row["until"] else row["state"]


def _time(instant: str) -> str:
    """Return a time by this machine's clock, with its date unless that is today's."""
    local, today = datetime.fromisoformat(instant).astimezone(), datetime.now().astimezone().date()
    return f"{local:{'' if local.date() == today else '%Y-%m-%d '}%H:%M:%S}"


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))
