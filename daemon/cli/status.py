"""status: the queue, the daemons and the latest failures on one screen."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from daemon.cli.console import AsJson, database_url, load_settings, plain, print_json
from daemon.database import Connection, connected

if TYPE_CHECKING:
    from rich.console import Group

Snapshot: TypeAlias = dict[str, list[dict[str, Any]]]

REFRESH = 1.0
QUEUE = "select * from public.queue_stats order by provider"
DAEMONS = """
select name, state, version, in_flight, slots, providers, started_at, seen_at from public.daemons
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
            print_json(await _look(connection))
            while watch:
                await asyncio.sleep(REFRESH)
                print_json(await _look(connection))
            return
        console = Console()
        if not watch:
            console.print(_screen(await _look(connection)))
            return
        with Live(_screen(await _look(connection)), console=console, auto_refresh=False, screen=False) as live:
            while True:
                await asyncio.sleep(REFRESH)
                live.update(_screen(await _look(connection)), refresh=True)


async def _look(connection: Connection) -> Snapshot:
    return {
        "queue": [plain(dict(row)) for row in await connection.fetch(QUEUE)],
        "daemons": [plain(dict(row)) for row in await connection.fetch(DAEMONS)],
        "failures": [plain(dict(row)) for row in await connection.fetch(FAILURES)],
    }


def _screen(seen: Snapshot) -> "Group":
    from rich.console import Group
    from rich.text import Text

    queue = [
        {
            "provider": row["provider"],
            **{state: row[state] for state in ("pending", "running", "completed", "failed")},
            **{
                state: row[state]
                for state in ("delayed", "parked", "cancelled")
                if any(r[state] for r in seen["queue"])
            },
            "oldest waits": _duration(row["oldest_wait"]),
            "note": _closed(row),
        }
        for row in seen["queue"]
    ]
    daemons = [
        {
            "daemon": row["name"],
            "state": row["state"],
            "runs": f"{row['in_flight']} of {row['slots']}",
            "providers": ", ".join(row["providers"]),
            "version": row["version"],
        }
        for row in seen["daemons"]
    ]
    failures = [{"failed": row["id"], "processor": row["processor"], "why": row["error"]} for row in seen["failures"]]
    return Group(
        _table(queue) if queue else Text("No runs yet."),
        _table(daemons) if daemons else Text("No daemon is running: start one with image-jobs run.", style="yellow"),
        *([_table(failures)] if failures else []),
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    last = list(rows[0])[-1]
    for name, value in rows[0].items():
        table.add_column(name, justify="right" if isinstance(value, int) else "left", no_wrap=name != last)
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row.values()))  # Text: what stands in the database is no markup
    return table


def _closed(row: Mapping[str, Any]) -> str:
    if row["paused"]:
        return "paused"
    return f"blocked until {row['blocked_until']}" if row["blocked_until"] else ""


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))
