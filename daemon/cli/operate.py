"""run, dev, migrate: what keeps going, and what it stands on."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from daemon import log
from daemon.cli.console import AsJson, database_url, load_settings, print_json, require
from daemon.database import refuse_transaction_pooler
from daemon.errors import Misconfigured
from daemon.log import secrets_of


def run() -> None:
    """Run the daemon: claim runs, make their images, store them.

    The first SIGTERM or Ctrl-C lets it finish what it has begun, the second hands its runs back to others.

    Example: DATABASE_URL=postgresql://… OPENAI_API_KEY=… image-jobs run
    """
    settings = load_settings(beside_dev=False)  # dev has a daemon, with its own providers
    require(settings, "DATABASE_URL", "SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY")
    refuse_transaction_pooler(database_url(settings))
    log.configure(settings.log_format, secrets=secrets_of(settings))

    from daemon.service import serve

    asyncio.run(serve(settings))


def dev(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where the local Supabase endpoints listen.")] = 54321,
    data: Annotated[Path, typer.Option(help="Where everything is kept.", file_okay=False)] = Path(".image-jobs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what is kept there, and begin anew.")] = False,
) -> None:
    """Start everything on this machine: Postgres, storage, the daemon. No Docker, no account.

    The provider `demo` needs no key; others join when their keys are set. Ctrl-C stops everything and keeps the data.

    Example: image-jobs dev --fresh
    """
    settings = load_settings(beside_dev=False)
    try:
        from daemon.dev.stack import start
    except ModuleNotFoundError as error:
        raise Misconfigured(
            f"image-jobs dev needs more than the daemon does: {error.name} is not installed.",
            "Run pip install 'image-job-orchestrator[dev]', or in a checkout pip install '.[dev]'.",
        ) from error
    log.configure(settings.log_format, secrets=secrets_of(settings))
    start(data=data, port=port, fresh=fresh, settings=settings)


def migrate(as_json: AsJson = False) -> None:
    """Bring the database up to date. Running it again, or several at once, does no harm.

    Example: DATABASE_URL=postgresql://… image-jobs migrate
    """
    from daemon.migrate import migrate as apply

    settings = load_settings()
    done = asyncio.run(apply(database_url(settings), bucket=settings.bucket))
    if as_json:
        print_json({"applied": done})
    for name in () if as_json else done:
        typer.echo(f"applied {name}")
    if not done and not as_json:
        typer.echo("The database is up to date.")
