"""run, dev, migrate, check: start the daemon, everything on one machine, prepare a database, probe a daemon."""

import asyncio
import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.console import AsJson, database_url, load_settings, note, print_json, remarks, require
from daemon.database import connected, refuse_transaction_pooler
from daemon.errors import ImageJobsError, Misconfigured


def run() -> None:
    """Run the daemon: claim runs, make their images, store them.

    The first SIGTERM or Ctrl-C lets it finish what it has begun, the second hands its runs back to others.

    Example: DATABASE_URL=postgresql://… OPENAI_API_KEY=… image-jobs run
    """
    import structlog

    from daemon import log

    logger = structlog.stdlib.get_logger(__name__)
    pretty = log.configure(os.environ.get("IMAGE_JOBS_LOG_FORMAT"))  # the settings may be wrong themselves
    try:
        settings = load_settings(beside_dev=False)  # dev has a daemon, with its own providers
        pretty = log.configure(settings.log_format, secrets=log.secrets_of(settings))
        for remark in remarks():
            logger.warning("environment.ignored", remark=remark)
        require(settings, "DATABASE_URL", "SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY")
        refuse_transaction_pooler(database_url(settings))

        from daemon.service import serve

        asyncio.run(serve(settings))
    except ImageJobsError as error:
        if pretty:
            raise
        logger.critical("daemon.failed", error=error.message, hint=error.hint)
        raise typer.Exit(2 if isinstance(error, Misconfigured) else 1) from error


def dev(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where the local Supabase endpoints listen.")] = 54321,
    data: Annotated[Path, typer.Option(help="Where everything is kept.", file_okay=False)] = Path(".image-jobs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what is kept there, and begin anew.")] = False,
    realtime_limit: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Let Realtime drop what goes beyond N messages a second, as a project does."
        ),
    ] = None,
) -> None:
    """Start everything on this machine.

    Postgres, storage, the daemon and a canvas: no Docker, no account.

    The provider `demo` needs no key; others join when their keys are set. Ctrl-C stops everything and keeps the data.

    Example: image-jobs dev --fresh
    """
    from daemon import log

    settings = load_settings(beside_dev=False)
    try:
        from daemon.dev.stack import start
    except ModuleNotFoundError as error:
        raise Misconfigured(
            f"image-jobs dev needs more than the daemon does: {error.name} is not installed.",
            "Run pip install 'image-job-orchestrator[dev]', or in a checkout pip install '.[dev]'.",
        ) from error
    log.configure(settings.log_format, secrets=log.secrets_of(settings))
    for remark in remarks():
        note(remark)
    start(data=data, port=port, fresh=fresh, realtime_limit=realtime_limit, settings=settings)


def migrate(
    export: Annotated[
        Path | None, typer.Option(help="Write the migrations into this directory of the Supabase CLI, and run none.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring the database up to date. Running it again, or several at once, does no harm.

    It makes the buckets, the policies and the publication, too, as soon as Storage and Realtime are there.

    Example: DATABASE_URL=postgresql://… image-jobs migrate

    Example: image-jobs migrate --export supabase/migrations
    """
    from daemon.migrate import migrate as apply

    if export is not None:
        _export(export, as_json=as_json)
        return
    settings = load_settings()
    done = asyncio.run(apply(database_url(settings), bucket=settings.bucket, private=settings.private))
    made = [step.step for step in done.steps if step.state == "made"]
    lacking = [step for step in done.steps if step.state in ("refused", "later")]
    if as_json:
        print_json({"applied": done.applied, "made": made, "lacking": [asdict(step) for step in lacking]})
        return
    for name in done.applied:
        typer.echo(f"applied {name}")
    for name in made:
        typer.echo(f"made {name}")
    for step in lacking:
        when = "when it is there" if step.state == "later" else "as a role that may"
        note(
            f"{step.title} could not be made: {step.note}.\nRun image-jobs migrate again {when}, or this:\n{step.command}"
        )
    if not done.applied and not made:
        typer.echo("The database is up to date.")


def _export(directory: Path, *, as_json: bool) -> None:
    from daemon.migrate import export

    written = [str(path) for path in export(directory)]
    if as_json:
        print_json({"written": written})
        return
    for name in written:
        typer.echo(f"wrote {name}")
    if written:
        typer.echo(
            "Now run supabase db push, or commit this for whatever does so. It changes nothing where image-jobs migrate has run."
        )
        note("A migration with an older timestamp that is merged after this push needs supabase db push --include-all.")
    else:
        typer.echo(f"{directory} has them all.")


def check(as_json: AsJson = False) -> None:
    """Check whether this host's daemon is alive.

    It is the health probe of a container.

    Example: HEALTHCHECK CMD ["image-jobs", "check"]
    """
    host = socket.gethostname()
    states = asyncio.run(_states(database_url(load_settings()), host))
    alive = not {"alive", "draining"}.isdisjoint(states)
    if as_json:
        print_json({"host": host, "alive": alive, "states": states})
    elif alive:
        typer.echo(f"The daemon on {host} is alive.")
    if not alive:
        raise ImageJobsError(
            f"The daemon on {host} is {states[0]}." if states else f"No daemon has ever run on {host}.",
            "Start it with image-jobs run, and look at its log.",
        )


async def _states(dsn: str, host: str) -> list[str]:
    """Return the states of the daemons that have run on this host, the last seen first."""
    async with connected(dsn, timeout=5) as connection:
        rows = await connection.fetch(
            "select state from image_jobs.daemon_status where name = $1 order by seen_at desc", host
        )
        return [row["state"] for row in rows]
