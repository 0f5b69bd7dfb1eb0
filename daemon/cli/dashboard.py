"""dashboard: the page for whoever runs image-jobs."""

from typing import Annotated

import typer

from daemon.cli.console import database_url, load_settings
from daemon.errors import Misconfigured


def dashboard(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it listens.")] = 54380,
    host: Annotated[str, typer.Option(help="An address of this machine alone; others are refused.")] = "127.0.0.1",
) -> None:
    """Serve a page for whoever runs this.

    It shows what waits, runs, fails and costs, and requeues, pauses, limits and cancels. It listens on this machine only; who has
    the printed address may do what an operator may. Ctrl-C ends it.

    Example: image-jobs dashboard --port 54380
    """
    dsn = database_url(load_settings())
    try:
        from daemon.pages.dashboard.server import serve
    except ModuleNotFoundError as error:
        raise Misconfigured(
            f"image-jobs dashboard needs more than the daemon does: {error.name} is not installed.",
            "Run pip install 'image-job-orchestrator[dashboard]', or in a checkout pip install '.[dashboard]'.",
        ) from error
    try:
        serve(dsn, host=host, port=port, opened=_print_address)
    except KeyboardInterrupt:
        raise typer.Exit from None


def _print_address(address: str) -> None:
    typer.echo(f"  Dashboard  {typer.style(address, bold=True)}")
    typer.secho("  Whoever has this address may do what an operator may. Ctrl-C ends it.", dim=True)
