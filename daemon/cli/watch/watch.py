"""watch: follow a workflow in the terminal as a canvas would."""

import asyncio
import logging
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from daemon.cli.console import AsJson, load_settings, note, print_json, require
from daemon.cli.watch.nodes import Node, Nodes
from daemon.errors import ImageJobsError

if TYPE_CHECKING:
    from daemon.cli.watch.channel import Changes, Channel

QUIET = 10.0
"""Refetch after this many seconds without a message while a run is under way: over its rate limits Realtime drops
messages silently."""

PATIENCE = 2.0
"""Seconds without a message after which runs in line are asked why they wait."""

LONGEST_PAUSE = 5.0
"""Seconds between two tries to connect."""

COLOURS = {"completed": "green", "error": "red", "cancelled": "yellow"}


def watch(
    workflow: Annotated[UUID, typer.Argument(metavar="WORKFLOW", help="The workflow's id.")],
    token: Annotated[
        str | None,
        typer.Option(envvar="IMAGE_JOBS_TOKEN", help="Of a member who is signed in: see what that member sees."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Follow the nodes of a workflow until Ctrl-C.

    Over Supabase Realtime, as a canvas does: a line for each node, then one for each change of its status, progress,
    image or error. When the server goes away, it is tried again until it is back, and what was missed is fetched. Needs
    SUPABASE_URL and SUPABASE_SERVICE_ROLE_KEY, or with a token SUPABASE_ANON_KEY.

    Example: image-jobs watch 00000000-0000-4000-8000-000000000001
    """
    from daemon.cli.watch.channel import Channel

    settings = load_settings()
    require(settings, "SUPABASE_URL", "SUPABASE_ANON_KEY" if token else "SUPABASE_SERVICE_ROLE_KEY")
    key = settings.anon_key if token else settings.service_role_key
    assert settings.supabase_url is not None
    assert key is not None
    logging.getLogger("realtime").addHandler(logging.NullHandler())  # its errors are printed here
    channel = Channel(settings.supabase_url, key.get_secret_value(), token, workflow)
    try:
        asyncio.run(Watch(channel, as_json=as_json).run())
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


class Watch:
    """Print the changes of a workflow's nodes.

    Args:
        channel: Of the workflow.
        as_json: Print JSON, a line for each change.
    """

    def __init__(self, channel: "Channel", *, as_json: bool) -> None:
        self._channel = channel
        self._as_json = as_json
        self._nodes = Nodes()
        self._reasons: dict[str, str] = {}
        self._was_connected = False
        self._away_since: float | None = None
        self._pause = 1.0

    async def run(self) -> None:
        """Follow the workflow until cancelled.

        Raises:
            ImageJobsError: If access is denied, or the first connection fails.
        """
        from daemon.cli.watch.channel import Away

        while True:
            try:
                async with self._channel.joined() as changes:
                    await self._load()
                    self._note_connected()
                    await self._follow(changes)
            except Away as away:
                if not self._was_connected:
                    raise ImageJobsError(f"{away}.", "Check SUPABASE_URL, and that the server is running.") from away
                await self._wait(away)

    async def _follow(self, changes: "Changes") -> None:
        quiet = 0.0
        while True:
            try:
                async with asyncio.timeout(PATIENCE):
                    nodes = await changes.next()
            except TimeoutError:
                quiet += PATIENCE
                if quiet >= QUIET and self._nodes.unfinished:
                    quiet = 0.0
                    await self._load()
                if self._nodes.pending:
                    self._explain(await self._channel.reasons())
            else:
                quiet = 0.0
                self._print(self._nodes.merge(nodes))

    def _explain(self, reasons: dict[str, str]) -> None:
        """Print why the runs of nodes wait, where that has changed."""
        for node in self._nodes.pending:
            run = str(node.data.get("runId", ""))
            reason = reasons.get(run)
            if reason is not None and reason != self._reasons.get(run):
                self._print([replace(node, data={**node.data, "message": reason, "updatedAt": None})])
        self._reasons = reasons

    async def _load(self) -> None:
        """Fetch all nodes: messages sent while the connection was away are lost."""
        self._print(self._nodes.load(await self._channel.rows()))

    def _note_connected(self) -> None:
        if not self._was_connected:
            note("Watching. Ctrl-C stops.")
        elif self._away_since is not None:
            note(
                f"Connected again after {time.monotonic() - self._away_since:.0f} s; what changed meanwhile stands above."
            )
        self._was_connected = True
        self._away_since = None
        self._pause = 1.0

    async def _wait(self, away: Exception) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            note(f"The connection is lost: {away}. Trying again until it is back.")
        await asyncio.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _print(self, news: list[Node]) -> None:
        for node in news:
            if self._as_json:
                print_json({"node": node.id, "version": node.version, "deleted": node.deleted, **node.shown})
            else:
                typer.secho(line(node), fg=COLOURS.get(node.shown.get("status", "")))


def line(node: Node) -> str:
    """Format a node: when it changed, its id, its status, its message, error or image."""
    changed = node.data.get("updatedAt")
    when = datetime.fromisoformat(changed) if changed else datetime.now(UTC)
    status = "deleted" if node.deleted else node.data.get("status", "new")
    percent = f"{node.data.get('progress', 0):>3} %" if status == "running" else ""
    about = node.data.get("message", "")
    if status == "error":
        about = f"{node.data.get('error', '')} {about}"
    elif status == "completed":
        about = node.data.get("imageUrl", "")
    return f"{when.astimezone():%H:%M:%S}  {node.id}  {status:<10} {percent:<5}  {about}".rstrip()
