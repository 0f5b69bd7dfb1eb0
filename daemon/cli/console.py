"""What all commands share: what the environment says, and how things are printed."""

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer
from pydantic import ValidationError

from daemon.errors import ImageJobsError, Misconfigured
from daemon.log import masker
from daemon.settings import Settings

DEV_ENVIRONMENT = Path(".image-jobs/env")
"""Written by `image-jobs dev`; where DATABASE_URL is not set, commands take what stands there."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's id.")]


def load_settings(*, beside_dev: bool = True) -> Settings:
    """What the environment, `.env` and, if `beside_dev`, a running `image-jobs dev` say.

    Raises:
        Misconfigured: If a value cannot be read. The value is not repeated: it may be a secret.
    """
    try:
        settings = Settings.model_validate({})
        if beside_dev and settings.database_url is None and DEV_ENVIRONMENT.is_file():
            note(f"Using {DEV_ENVIRONMENT}, written by image-jobs dev.")
            lines = DEV_ENVIRONMENT.read_text().splitlines()
            settings = Settings.model_validate(dict(line.split("=", 1) for line in lines if "=" in line))
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False, include_context=False)
        complaints = [f"{each['loc'][0]} is wrong ({each['msg'][:1].lower()}{each['msg'][1:]})" for each in wrong]
        meanings = {field.alias: field.description for field in Settings.model_fields.values()}
        hints = [f"{name} is: {meanings[name]}." for each in wrong if (name := str(each["loc"][0])) in meanings]
        raise Misconfigured(f"{', and '.join(complaints)}.", " ".join(hints)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise Misconfigured(f".env cannot be read ({type(error).__name__}).", "Mend the file, or remove it.") from error
    return settings


def database_url(settings: Settings) -> str:
    """The database's address.

    Raises:
        Misconfigured: If it is not set.
    """
    require(settings, "DATABASE_URL")
    return settings.database_url.get_secret_value() if settings.database_url else ""


def require(settings: Settings, *names: str) -> None:
    """Makes sure that the variables are set.

    Raises:
        Misconfigured: If one is not.
    """
    fields = {field.alias: name for name, field in Settings.model_fields.items()}
    if missing := [name for name in names if getattr(settings, fields[name]) is None]:
        raise Misconfigured(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set.",
            "Set it in the environment or in a file .env; image-jobs dev needs neither.",
        )


def complain(error: ImageJobsError) -> None:
    """Says what is wrong, and on a line of its own what to do about it."""
    mask = masker()
    typer.secho(f"image-jobs: {mask(error.message)}", err=True, fg="red")
    if error.hint:
        typer.echo(mask(error.hint), err=True)


def note(text: str) -> None:
    """Says something beside the point, on stderr."""
    typer.secho(text, err=True, dim=True)


def print_json(value: object) -> None:
    """Prints one line of JSON on stdout."""
    typer.echo(json.dumps(value, default=_plain, ensure_ascii=False))


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A database row as JSON has it: times in ISO 8601, intervals in seconds."""
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
