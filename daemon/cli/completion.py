"""completion: what a shell needs to complete commands and options, as typer has it."""

import os
from contextlib import redirect_stdout
from enum import StrEnum
from io import StringIO
from typing import Annotated

import typer
import typer.completion

PROGRAM = "image-jobs"
VARIABLE = "_IMAGE_JOBS_COMPLETE"
"""Set by the shell's function while it asks for completions."""


class Shell(StrEnum):
    """The shells that are served."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def completion(
    called: typer.Context, shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]
) -> None:
    """Print what a shell needs to complete.

    For bash and zsh, in ~/.bashrc or ~/.zshrc (there below compinit): eval "$(image-jobs completion bash)".
    For fish: image-jobs completion fish > ~/.config/fish/completions/image-jobs.fish

    Example: image-jobs completion zsh
    """
    prepare(always=True)
    with redirect_stdout(StringIO()) as script:
        typer.completion.shell_complete(called.find_root().command, {}, PROGRAM, VARIABLE, f"source_{shell.value}")
    typer.echo(script.getvalue().strip())  # zsh wants its #compdef in the first line


def prepare(*, always: bool = False) -> None:
    """Register typer's shells where one of them asks; typer does so only for apps with its own two options."""
    if always or VARIABLE in os.environ:
        typer.completion.get_completion_inspect_parameters()
