"""Shared by all commands: settings from the environment, and output."""

import json
import sys
from collections.abc import Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer
from pydantic import ValidationError

from daemon import dsn, environment, running_dev
from daemon.errors import ImageJobsError, Misconfigured
from daemon.settings import Settings
from daemon.terminal import has_all_characters
from daemon.variables import stripped

DEV_ENVIRONMENT = Path(".image-jobs/env")
"""Written by `image-jobs dev`; read by commands where DATABASE_URL is not set and no registered dev runs."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's id.")]


def load_settings(*, beside_dev: bool = True) -> Settings:
    """Read the settings from the environment and `.env`.

    Args:
        beside_dev: Without a DATABASE_URL, read those of the `image-jobs dev` that runs, and say which.

    Raises:
        Misconfigured: If a value cannot be read; it is not repeated: it may be a secret. Or if several dev run.
    """
    try:
        settings = Settings.model_validate({})
        if beside_dev and settings.database_url is None and (file := _dev_environment()) is not None:
            note(f"Using {file}, written by image-jobs dev.")
            settings = Settings.model_validate(environment.read_file(file))
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False, include_context=False)
        reasons = {str(each["loc"][0]): each["msg"].removeprefix("Value error, ") for each in wrong}
        complaints = [f"{name} is wrong ({reason[:1].lower()}{reason[1:]})" for name, reason in reasons.items()]
        meanings = {field.alias: f"{field.alias} is: {field.description}." for field in Settings.model_fields.values()}
        meanings["DATABASE_URL"] = dsn.HOW_TO_WRITE_IT
        hints = [meanings[name] for name in reasons if name in meanings]
        raise Misconfigured(f"{', and '.join(complaints)}.", " ".join(hints)) from error
    for remark in remarks() if beside_dev else ():
        note(remark)
    return settings


def _dev_environment() -> Path | None:
    """Return the environment of the `image-jobs dev` that is meant here; None if there is none."""
    directory = Path.cwd()
    if (dev := running_dev.nearest(directory)) is not None:
        inside = dev.environment.is_relative_to(directory)
        return dev.environment.relative_to(directory) if inside else dev.environment
    return DEV_ENVIRONMENT if DEV_ENVIRONMENT.is_file() else None


def remarks() -> list[str]:
    """Return what is set and has no effect, a sentence for each; `run` and `dev` log them."""
    found = environment.variables()
    known = [str(field.alias) for field in Settings.model_fields.values()]
    told = environment.remarks(found, known)
    if url := stripped(found.get("DATABASE_URL", "")):
        told += [
            f"{name} in DATABASE_URL is ignored: only other drivers know it." for name in dsn.understand(url).dropped
        ]
    return told


def database_url(settings: Settings) -> str:
    """Return DATABASE_URL.

    Raises:
        Misconfigured: If it is not set.
    """
    require(settings, "DATABASE_URL")
    return settings.database_url.get_secret_value() if settings.database_url else ""


def require(settings: Settings, *names: str) -> None:
    """Require that the variables are set.

    Raises:
        Misconfigured: If one is not.
    """
    fields = {field.alias: name for name, field in Settings.model_fields.items()}
    if missing := [name for name in names if getattr(settings, fields[name]) is None]:
        raise Misconfigured(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set.",
            "Set it in the environment or in a file .env; beside a running image-jobs dev neither is needed.",
        )


def print_error(error: ImageJobsError) -> None:
    """Print an error on stderr, and its hint on a line of its own. Secrets are masked."""
    from daemon.log import masker

    mask = masker()
    typer.secho(f"image-jobs: {mask(error.message)}", err=True, fg="red")
    if error.hint:
        typer.echo(mask(error.hint), err=True)


def note(text: str) -> None:
    """Print a remark on stderr."""
    typer.secho(text, err=True, dim=True)


def print_json(value: object) -> None:
    """Print one line of JSON on stdout."""
    typer.echo(json.dumps(value, default=_plain, ensure_ascii=not has_all_characters(sys.stdout)))


def dollars(amount: float | Decimal) -> str:
    """Return an amount as `$0.053`: at least two digits after the point, at most four, which small images need."""
    cents = f"{amount:.4f}"
    return "$" + (cents[:-2] + cents[-2:].rstrip("0"))


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a database row to JSON values: times to ISO 8601, intervals to seconds."""
    return {name: _plain(value) if isinstance(value, _TRANSLATED) else value for name, value in row.items()}


_TRANSLATED = (datetime, timedelta, Decimal, UUID)


def _plain(value: object) -> str | float:
    match value:
        case datetime():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case Decimal():
            return float(value)
        case UUID():
            return str(value)
        case _:
            raise TypeError(f"{type(value).__name__} has no place in JSON")
