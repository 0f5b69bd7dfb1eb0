"""generate: insert a run and follow it to the image."""

import asyncio
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID, uuid4

import asyncpg
import typer

from daemon.cli.console import AsJson, database_url, dollars, load_settings, note, print_json
from daemon.database import Connection, connected, explain
from daemon.errors import ImageJobsError, Misconfigured
from daemon.prompt import MAX_PROMPT
from daemon.settings import Settings

POLL_INTERVAL = 0.2
"""Seconds between two reads of the run."""
PATIENCE = 1.0
"""Seconds that a run waits before it is asked why, and between two times."""

REASON = """
select s.sentence from public.runs r
join public.image_provider_status s on s.provider = split_part(coalesce(r.routed_to, r.processor), ':', 1)
  and (s.model is null or s.provider || ':' || s.model = coalesce(r.routed_to, r.processor))
where r.id = $1 and r.status = 'pending' order by s.model nulls last limit 1"""
"""Why a run waits: the state of its model, where that has one of its own, else of its provider; null while that is open."""

WARNINGS = """
select e.payload ->> 'message' as message from public.run_events e
where e.run_id = $1 and e.payload ->> 'event' in ('warning', 'incident') order by e.seq"""

Show = Callable[[int, str], None]


def generate(  # noqa: PLR0917 - typer makes options of them
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the image should show.")],
    processor: Annotated[
        str | None,
        typer.Option(help="provider:model. The painter that is free, else what a living daemon has to offer."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="Like 1024x1024.")] = None,
    ratio: Annotated[str | None, typer.Option(help="Like 16:9.")] = None,
    quality: Annotated[str | None, typer.Option(help="standard or hd")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same seed gives the same image, where supported.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    image: Annotated[str | None, typer.Option(metavar="URL", help="An image to start from.")] = None,
    workflow: Annotated[UUID | None, typer.Option(help="The workflow it belongs to. A new one if left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to save the image.", dir_okay=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Make one image, and print its URL or where it was saved.

    Inserts a run and follows it to the end. Some daemon has to be running, here or elsewhere. Ctrl-C stops the following, not the run.

    Example: image-jobs generate "a red fox" --ratio 16:9 --out fox.png
    """
    if len(prompt) > MAX_PROMPT:  # the database would call one without blanks base64
        raise Misconfigured(f"PROMPT has more than {MAX_PROMPT:,} characters.", "Say it in fewer words.")
    if out is not None:
        _try(out)
    prompt_spec = {
        "basePrompt": prompt,
        "size": size,
        "aspectRatio": ratio,
        "quality": quality,
        "seed": seed,
        "negativePrompt": negative,
        "previousImage": image,
    }
    metadata = {"promptSpec": {name: value for name, value in prompt_spec.items() if value is not None}}
    settings = load_settings()
    try:
        asyncio.run(_generate(settings, processor, workflow or uuid4(), metadata, out, as_json=as_json))
    except KeyboardInterrupt:
        raise typer.Exit(1) from None


def _try(out: Path) -> None:
    """Make sure that the file can be written, before anything is paid for. Leaves no trace.

    Raises:
        Misconfigured: If it cannot.
    """
    try:
        if not out.absolute().parent.is_dir():
            raise Misconfigured(f"There is no directory {out.absolute().parent}.", "Make it, or choose another --out.")
        there = out.exists()
        if not there or out.is_file():
            with out.open("ab"):
                pass
        if not there:
            out.unlink()
    except OSError as error:
        raise Misconfigured(f"{out} cannot be written ({error.strerror or error}).", "Choose another --out.") from error


async def _generate(
    settings: Settings,
    processor: str | None,
    workflow: UUID,
    metadata: dict[str, Any],
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    async with connected(database_url(settings)) as connection:
        run_id = await _insert(connection, processor or await _default_processor(connection), workflow, metadata)
        try:
            if not await connection.fetchval(
                "select exists (select from image_jobs.daemon_status where state = 'alive')"
            ):
                note(f"No daemon is running: {run_id} waits until one starts (image-jobs run).")
            with _progress() as show:
                run = await _follow(connection, run_id, show)
            warnings = [row["message"] for row in await connection.fetch(WARNINGS, run_id)]
        except asyncio.CancelledError:
            note(f"{run_id} goes on. To stop it: image-jobs cancel {run_id}")
            raise
    payload: dict[str, Any] = run["payload"] or {}
    saved = run["status"] == "completed" and out is not None
    if saved and out is not None:
        await _download(settings, payload["imageUrl"], out)
    if as_json:
        ended = {"jobId": run_id, "status": run["status"], "file": str(out) if saved else None, "warnings": warnings}
        print_json({**ended, **payload})
    else:
        for warning in warnings:
            typer.secho(f"Warning: {warning}", err=True, fg="yellow")
        if cost := _cost(run["status"], payload):
            note(cost)
        if run["status"] == "completed":
            typer.echo(str(out) if saved else payload["imageUrl"])
    if run["status"] != "completed":
        raise ImageJobsError(
            payload.get("error") or f"{run_id} was {run['status']}.",
            payload.get("hint") or f"What happened: image-jobs events {run_id}",
        )


def _cost(status: str, payload: Mapping[str, Any]) -> str:
    """Return what the run cost, and what it may have cost besides. Empty if it ended before a call."""
    known, possible = payload.get("cost"), payload.get("possibleCost")
    said = f"Cost: {dollars(known)}." if known is not None else "Cost: not known." if status == "completed" else ""
    if possible:
        said += f" Of other calls the outcome is not known: up to {dollars(possible)} more."
    return said.strip()


async def _default_processor(connection: Connection) -> str:
    """Return the cheapest model that a living daemon serves: a free one, if there is one."""
    found: str | None = await connection.fetchval(
        """
        select m.provider || ':' || m.model from public.image_models m
        where (m.retired is null or m.retired > current_date)
          and exists (select from image_jobs.daemon_status d where d.state = 'alive' and m.provider = any (d.providers))
        order by m.price, m.provider, m.model limit 1
        """
    )
    return found or "demo:painter"


async def _insert(connection: Connection, processor: str, workflow: UUID, metadata: dict[str, Any]) -> str:
    try:
        run_id: str = await connection.fetchval(
            "insert into public.runs (kind, subject_id, status, processor, metadata) "
            "values ('image_gen', $1, 'pending', $2, $3) returning id",
            workflow,
            processor,
            metadata,
        )
    except (asyncpg.DataError, asyncpg.CheckViolationError) as error:
        told = explain(error)
        raise Misconfigured(told.message, told.hint) from error
    return run_id


async def _follow(connection: Connection, run_id: str, show: Show) -> asyncpg.Record:
    """Read a run until its status is terminal; pass its progress and message to `show`, and say why it waits."""
    loop = asyncio.get_running_loop()
    ask_at = loop.time() + PATIENCE
    reason: str | None = None
    while True:
        run = await connection.fetchrow(
            "select status, progress, message, payload from public.runs where id = $1", run_id
        )
        if run is None:
            raise ImageJobsError(f"{run_id} was deleted.", "Whoever did so can say why.")
        if run["status"] not in ("pending", "running"):
            return run
        if loop.time() >= ask_at:
            ask_at = loop.time() + PATIENCE
            before, reason = reason, await connection.fetchval(REASON, run_id)
            if reason not in (None, before):
                note(str(reason))
        waiting = "Waiting in line." if run["status"] == "pending" else "Working on it."
        show(run["progress"] or 0, (reason if run["status"] == "pending" else None) or run["message"] or waiting)
        await asyncio.sleep(POLL_INTERVAL)


@contextmanager
def _progress() -> Generator[Show, None, None]:
    """Show a progress bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=100)
        yield lambda percent, message: progress.update(bar, completed=percent, description=message)


async def _download(settings: Settings, url: str, out: Path) -> None:
    import httpx

    from daemon.http_clients import client as http_client

    headers: dict[str, str] = {}
    if "/object/authenticated/" in url:
        key, ours = settings.service_role_key, settings.supabase_url
        if key is None or ours is None or not url.startswith(f"{ours.rstrip('/')}/"):
            raise ImageJobsError(
                f"The image is ready, and private: {url} opens with a key of its project alone.",
                "Set SUPABASE_URL and SUPABASE_SERVICE_ROLE_KEY here, too.",
            )
        headers = {"apikey": key.get_secret_value(), "authorization": f"Bearer {key.get_secret_value()}"}
    try:
        async with http_client(follow_redirects=not headers, timeout=60) as client:
            response = await client.get(url, headers=headers)
            response.raise_for_status()
    except httpx.HTTPError as error:
        raise ImageJobsError(
            f"The image is ready, but could not be fetched from {url} ({type(error).__name__}).",
            "Check SUPABASE_URL of the daemon: it must be an address that is reachable from here.",
        ) from error
    try:
        await asyncio.to_thread(out.write_bytes, response.content)
    except OSError as error:
        raise ImageJobsError(
            f"The image is at {url}, but could not be saved as {out} ({error.strerror}).", "Choose another --out."
        ) from error
