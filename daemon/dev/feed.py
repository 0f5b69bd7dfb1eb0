"""Events of runs in the terminal of `image-jobs dev`, a line each."""

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import typer

from daemon.database import Connection

INTERVAL = 0.2
"""Seconds between two polls."""

OVERLAP = 1000
"""Events before the last one that each poll reads again: a transaction may commit after a later one."""

POLLS_AFTER = 25
"""Polls after the sequence has last grown: so long may the transaction take to commit."""

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
    """Print the events that follow the first poll.

    Args:
        connection: Used by nothing else.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last: int | None = None
        self._seen: set[int] = set()
        self._drawn = 0
        self._quiet = 0

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            await self.poll()
            await asyncio.sleep(INTERVAL)

    async def poll(self) -> None:
        """Print the events since the last poll. The first poll only notes the events that are there."""
        if self._last is None:
            before = await self._connection.fetch(BEFORE, OVERLAP)
            self._seen = {row["seq"] for row in before}
            self._last = max(self._seen, default=0)
        elif await self._may_have_events():
            last = self._last
            rows = await self._connection.fetch(EVENTS, last - OVERLAP, list(COLOURS))
            for row in rows:
                if row["seq"] not in self._seen:
                    self._seen.add(row["seq"])
                    typer.secho(line(dict(row)), fg=COLOURS[row["payload"]["event"]])
            self._last = max((row["seq"] for row in rows), default=last)
            self._seen = {seq for seq in self._seen if seq > last - OVERLAP}

    async def _may_have_events(self) -> bool:
        """Whether events may have been written: while the sequence stands still, there is nothing to read."""
        drawn: int = await self._connection.fetchval("select last_value from image_jobs.event_numbers")
        self._quiet = self._quiet + 1 if drawn == self._drawn else 0
        self._drawn = drawn
        return self._quiet < POLLS_AFTER


def line(row: Mapping[str, Any]) -> str:
    """Format an event: time, run, name, details."""
    time = row["ts"].astimezone().strftime("%H:%M:%S")
    payload: dict[str, Any] = row["payload"]
    return f"  {time}  {row['id']}  {payload['event']:<10}  {_details(row, payload, payload.get('data') or {})}"


def _details(row: Mapping[str, Any], payload: Mapping[str, Any], data: Mapping[str, Any]) -> str:
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
