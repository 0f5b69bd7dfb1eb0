"""status: the queue, the daemons and the latest failures on one screen."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from daemon.cli.console import AsJson, database_url, load_settings, plain, print_json
from daemon.cli.tables import fold, screen_width, table
from daemon.database import Connection, connected

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

Snapshot: TypeAlias = dict[str, list[dict[str, Any]]]

REFRESH = 1.0
QUEUE = "select * from image_jobs.queue_stats order by provider"
DAEMONS = """
select name, state, version, in_flight, slots, providers, started_at, seen_at from image_jobs.daemon_status
where state in ('alive', 'draining', 'silent') order by started_at"""
FAILURES = """
select r.id, r.finished_at, r.processor, r.attempt, r.payload ->> 'error' as error, r.payload ->> 'hint' as hint
from public.runs r where r.kind = 'image_gen' and r.status = 'failed' order by r.finished_at desc limit 5"""


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Keep looking, once a second, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the queue, the daemons and what failed last.

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
            print_json(await _snapshot(connection))
            while watch:
                await asyncio.sleep(REFRESH)
                print_json(await _snapshot(connection))
            return
        if not watch:
            Console().print(_screen(await _snapshot(connection)), soft_wrap=True)
            return
        console = Console()
        with Live(_screen(await _snapshot(connection)), console=console, auto_refresh=False, screen=False) as live:
            while True:
                await asyncio.sleep(REFRESH)
                live.update(_screen(await _snapshot(connection)), refresh=True)


async def _snapshot(connection: Connection) -> Snapshot:
    return {
        "queue": [plain(dict(row)) for row in await connection.fetch(QUEUE)],
        "daemons": [plain(dict(row)) for row in await connection.fetch(DAEMONS)],
        "failures": [plain(dict(row)) for row in await connection.fetch(FAILURES)],
    }


def _screen(snapshot: Snapshot) -> "Group":
    from rich.console import Group
    from rich.text import Text

    width = screen_width()
    queue = [
        {
            "provider": row["provider"],
            **{state: row[state] for state in ("pending", "running", "completed", "failed")},
            **{
                state: row[state]
                for state in ("delayed", "parked", "cancelled")
                if any(r[state] for r in snapshot["queue"])
            },
            "oldest": _duration(row["oldest_wait"]),
            "note": _closed(row),
        }
        for row in snapshot["queue"]
    ]
    daemons = [
        {
            "daemon": row["name"],
            "state": row["state"],
            "runs": f"{row['in_flight']} of {row['slots']}",
            "version": row["version"],
            "providers": ", ".join(row["providers"]),
        }
        for row in snapshot["daemons"]
    ]
    failures = [
        {"failed": row["id"], "processor": row["processor"], "why": row["error"]} for row in snapshot["failures"]
    ]
    nobody = "No daemon is running: start one with image-jobs run."
    parts = [
        _table(queue, width, "note") if queue else Text("No runs yet."),
        _table(daemons, width, "providers") if daemons else Text("\n".join(fold(nobody, width)), style="yellow"),
        *([_table(failures, width, "why")] if failures else []),
    ]
    return Group(*(part for each in parts for part in (each, Text())))


def _table(rows: Sequence[Mapping[str, Any]], width: int, sentence: str) -> "Text":
    from rich.text import Text

    header, *others = table(rows, width, sentence=sentence)
    shown = Text("\n".join(header), style="bold")
    return Text("\n").join([*([shown] if header else []), *(Text("\n".join(lines)) for lines in others)])


def _closed(row: Mapping[str, Any]) -> str:
    """Return why a provider starts nothing, and until when by this machine's clock."""
    if row["paused"]:
        return "paused"
    if not row["blocked_until"]:
        return ""
    until, today = datetime.fromisoformat(row["blocked_until"]).astimezone(), datetime.now().astimezone().date()
    return f"blocked until {until:{'' if until.date() == today else '%Y-%m-%d '}%H:%M:%S}"


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))
