"""The command `image-jobs`: the only place that reads the environment, and the last one that catches errors.

Exit codes: 0 done, 1 it failed, 2 the command line or the environment is wrong.
"""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from daemon.cli.console import complain
from daemon.cli.generate import generate
from daemon.cli.health import check, doctor
from daemon.cli.operate import dev, migrate, run
from daemon.cli.runs import cancel, events, requeue
from daemon.cli.status import status
from daemon.cli.watch import watch
from daemon.errors import ImageJobsError, Misconfigured

app = typer.Typer(
    name="image-jobs", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)
for command in (dev, run, migrate, generate, status, events, watch, cancel, requeue, doctor, check):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("image-job-orchestrator"))
        raise typer.Exit


@app.callback()
def _image_jobs(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Images out of Postgres: insert a row into `runs`, and a daemon makes the image.

    The environment, or a file .env, says where: DATABASE_URL, SUPABASE_URL, SUPABASE_SERVICE_ROLE_KEY and the keys of
    providers. Beside a running `image-jobs dev` nothing needs to be set.
    """


def main() -> None:
    """Runs a command. What the operator can mend is one sentence and a cure, on stderr."""
    try:
        app()
    except ImageJobsError as error:
        complain(error)
        sys.exit(2 if isinstance(error, Misconfigured) else 1)
