"""What happens to runs, one line each, for whoever watches `image-jobs dev`."""

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import typer

from daemon.database import Connection

INTERVAL = 0.2
"""Seconds between two looks."""

OVERLAP = 1000
"""How many events back each look begins: a transaction may commit after a later one."""

LOOKS_AFTER = 25
"""Looks after the last number was drawn: so long may its transaction take to commit."""

COLOURS = {
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "retry": "yellow",
    "fallback": "yellow",
    "taken_over": "yellow",
    "warning": "yellow",
    "incident": "yellow",
    "claimed": None,
    "parked": None,
    "requeued": None,
}
"""The events that are shown."""

BEFORE = "select seq from public.run_events order by seq desc limit $1"
EVENTS = """
select e.seq, e.ts, e.payload, r.id, r.created_at, r.metadata -> 'promptSpec' ->> 'basePrompt' as prompt
from public.run_events e join public.runs r on r.id = e.run_id
where e.seq > $1 and r.kind = 'image_gen' and e.payload ->> 'event' = any ($2)
order by e.seq"""


class Feed:
    """Prints what is new since it was made.

    Args:
        connection: For its use alone.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last: int | None = None
        self._seen: set[int] = set()
        self._drawn = 0
        self._quiet = 0

    async def run(self) -> None:
        """Prints until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(INTERVAL)

    async def look(self) -> None:
        """Prints what has happened since the last look. The first one only takes note of what was there before."""
        if self._last is None:
            before = await self._connection.fetch(BEFORE, OVERLAP)
            self._seen = {row["seq"] for row in before}
            self._last = max(self._seen, default=0)
        elif await self._stirred():
            last = self._last
            rows = await self._connection.fetch(EVENTS, last - OVERLAP, list(COLOURS))
            for row in rows:
                if row["seq"] not in self._seen:
                    self._seen.add(row["seq"])
                    typer.secho(line(dict(row)), fg=COLOURS[row["payload"]["event"]])
            self._last = max((row["seq"] for row in rows), default=last)
            self._seen = {seq for seq in self._seen if seq > last - OVERLAP}

    async def _stirred(self) -> bool:
        """Whether events may have been written: if none was numbered for a while, reading them all is in vain."""
        drawn: int = await self._connection.fetchval("select last_value from private.event_order")
        self._quiet = self._quiet + 1 if drawn == self._drawn else 0
        self._drawn = drawn
        return self._quiet < LOOKS_AFTER


def line(row: Mapping[str, Any]) -> str:
    """Time, run, event, and what matters about it."""
    time = row["ts"].astimezone().strftime("%H:%M:%S")
    payload: dict[str, Any] = row["payload"]
    return f"  {time}  {row['id']}  {payload['event']:<10}  {_about(row, payload, payload.get('data') or {})}"


def _about(row: Mapping[str, Any], payload: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    message = str(payload.get("message", ""))
    match payload["event"]:
        case "claimed":
            return f'{data.get("processor")}  "{_short(row["prompt"])}"  attempt {data.get("attempt", 1)}'
        case "completed":
            seconds = (row["ts"] - row["created_at"]).total_seconds()
            return f"{seconds:.1f} s  {data.get('imageUrl', '')}"
        case "retry":
            return f"{message} Again{_in(row['ts'], data.get('dueAt'))}."
        case _:
            return message


def _in(now: datetime, due: str | None) -> str:
    if due is None:
        return ""
    seconds = (datetime.fromisoformat(due) - now).total_seconds()
    return f" in {max(seconds, 0):.0f} s"


def _short(prompt: str | None) -> str:
    one_line = " ".join((prompt or "").split())
    return one_line if len(one_line) <= 40 else f"{one_line[:39]}…"
