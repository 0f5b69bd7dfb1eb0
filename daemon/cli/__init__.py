"""The command `image-jobs`: the only place that reads the environment, and the last one that catches errors.

Exit codes: 0 done, 1 it failed, 2 the command line or the environment is wrong.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from daemon.cli.completion import PROGRAM, completion, prepare
from daemon.cli.console import print_error
from daemon.cli.dashboard import dashboard
from daemon.cli.doctor.doctor import doctor
from daemon.cli.generate import generate
from daemon.cli.list import list_runs
from daemon.cli.operate import check, dev, migrate, run
from daemon.cli.prune import prune
from daemon.cli.runs import cancel, events, requeue
from daemon.cli.status import status
from daemon.cli.watch.watch import watch
from daemon.errors import ImageJobsError, Misconfigured
from daemon.terminal import spare_characters

app = typer.Typer(
    name=PROGRAM,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)
for command in (dev, run, migrate, generate, status, dashboard):
    app.command()(command)
app.command("list")(list_runs)
for command in (events, watch, cancel, requeue, prune, doctor, check, completion):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

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
    providers. While `image-jobs dev` runs, nothing needs to be set: commands find it, wherever they are started.
    """


def _refuse_bytes(arguments: Sequence[str]) -> None:
    """Refuse arguments that are no text: neither the database nor a terminal can take them.

    Raises:
        Misconfigured: If there is one.
    """
    for number, argument in enumerate(arguments, 1):
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise Misconfigured(f"Argument {number} is no UTF-8 text.", "Write it anew, in a terminal that uses UTF-8.")


def main() -> None:
    """Run a command. Print an `ImageJobsError` as one sentence and a cure on stderr, and exit with 1 or 2."""
    spare_characters()
    prepare()
    try:
        _refuse_bytes(sys.argv[1:])
        app(prog_name=PROGRAM)
    except ImageJobsError as error:
        print_error(error)
        sys.exit(2 if isinstance(error, Misconfigured) else 1)
