"""What the README says is true: its commands, its settings, its links, what `dev` prints."""

import re
from datetime import timedelta

import typer
from pydantic_core import PydanticUndefined

from daemon.cli import app
from daemon.settings import Settings
from tests.postgres import ROOT

README = (ROOT / "README.md").read_text()


def settings_table() -> str:
    """The table of all settings, as the README has it."""
    rows = ["| Variable | Default | Meaning |", "|---|---|---|"]
    for field in Settings.model_fields.values():
        default = field.default
        match default:
            case timedelta():
                shown = f"{default.total_seconds():g} s"
            case None | False | ():
                shown = ""
            case _:
                assert default is not PydanticUndefined
                shown = str(default)
        rows.append(f"| `{field.alias}` | {shown} | {field.description} |")
    return "\n".join(rows)


def test_the_two_commands_stand_at_the_top_word_for_word() -> None:
    commands = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)
    assert commands[:2] == ["pip install '.[dev]' && image-jobs dev", "tests/run"]


def test_every_setting_is_documented_as_it_is() -> None:
    assert settings_table() in README


def test_every_command_is_named_and_there_are_no_others() -> None:
    named = set(re.findall(r"`(?:image-jobs )?(\w+)[^`]*`", README.split("From a terminal:")[1].split("\n## ")[0]))
    commands = set(typer.main.get_command(app).commands)
    assert commands <= named


def test_every_link_and_every_file_named_exists() -> None:
    for path in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"\b((?:daemon|sql|tests)/[\w/.]+\w)", README):
        assert path.startswith("http") or (ROOT / path).exists(), path
