"""The documents are true: commands, settings, links, and the paths they name."""

import os
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import typer
from pydantic_core import PydanticUndefined

from daemon.cli import app
from daemon.settings import Settings
from tests.support.postgres import ROOT

README = (ROOT / "README.md").read_text()
DAEMON_README = (ROOT / "daemon/README.md").read_text()

NOT_OURS = {"node_modules", "build", "dist", "venv"}
MADE = {"daemon/dev/canvas/dist", "daemon/pages/dashboard/dist"}
"""Named in documents, and not in git."""


def _documents() -> Iterator[str]:
    """Yield the path of every Markdown file of the repository, but none that a tool brought."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name == ".github" or (name[0] != "." and name not in NOT_OURS)]
        yield from (str(Path(folder, name).relative_to(ROOT)) for name in files if name.endswith(".md"))


DOCUMENTS = sorted(_documents())


def settings_table() -> str:
    """Return the table of all settings, as `daemon/README.md` has it."""
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


def unresolved_links(document: str, text: str) -> list[str]:
    """Return the relative links that lead nowhere: no such file, or no such heading in it."""
    found: list[str] = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = link.partition("#")
        if "://" in path:
            continue
        target = (ROOT / document).parent / path if path else ROOT / document
        if not target.exists() or (heading and heading not in headings(target.read_text())):
            found.append(link)
    return found


def headings(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    return {
        re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


def missing_paths(document: str, text: str) -> list[str]:
    """Return the paths of ours that are named and do not exist.

    Checked are all that begin with one of our folders, and all in backticks that end like a file of ours or with a slash;
    these may also begin where the document stands. A file's name alone is checked where the document is not at the top.
    """
    here = (ROOT / document).parent
    named = set(re.findall(r"(?<![\w/.])((?:daemon|sql|tests|\.ci|\.github)/[\w/.-]*\w)", text))
    quoted = set(re.findall(r"`([\w./-]+(?:\.(?:py|sql|md|tsx?|mjs|css)|/))`", text))
    if here == ROOT:
        quoted = {path for path in quoted if "/" in path}
    places = {path: [ROOT / path] for path in named} | {path: [ROOT / path, here / path] for path in quoted}
    made = {ROOT / path for path in MADE}
    return sorted(
        path
        for path, found in places.items()
        if "NNNN" not in path and not any(each.exists() or each in made for each in found)
    )


def test_two_commands_open_the_readme() -> None:
    commands = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)
    assert commands[:2] == ["pip install '.[dev]' && image-jobs dev", "tests/run"]
    assert README.index("```") == README.index(f"```sh\n{commands[0]}")


def test_clone_and_environment_precede_the_commands() -> None:
    opening = README.split("```")[0]
    assert opening.index("git clone") < opening.index("python3 -m venv .venv && . .venv/bin/activate")


def test_every_setting_is_documented_and_no_other() -> None:
    (table,) = re.findall(r"^\| Variable \|.*(?:\n\|.*)*", DAEMON_README, re.MULTILINE)
    assert table == settings_table()


def test_settings_named_in_documents_exist() -> None:
    known = {field.alias for field in Settings.model_fields.values()} | {"IMAGE_JOBS_SKIP_CANVAS"}
    for document in DOCUMENTS:
        named = set(re.findall(r"\bIMAGE_JOBS_[A-Z_]+\b", (ROOT / document).read_text()))
        assert named <= known, document


def test_every_file_for_prometheus_is_named() -> None:
    files = sorted(path.name for path in (ROOT / "daemon/observability").iterdir())
    assert [name for name in files if f"(observability/{name})" not in DAEMON_README] == []


def test_every_command_is_named_in_the_readme() -> None:
    rows = re.findall(
        r"^\| (`image-jobs [^|]*) \|", README.split("From a terminal:")[1].split("\n## ")[0], re.MULTILINE
    )
    named = [name for row in rows for name in re.findall(r"`(?:image-jobs )?(\w+)[^`]*`", row)]
    assert sorted(named) == sorted(typer.main.get_command(app).commands)


def test_render_blueprint_is_a_worker_that_may_drain() -> None:
    (blueprint,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    values = dict(re.findall(r"^ +(?:- )?(\w+): ([^#\n]*\w)", blueprint, re.MULTILINE))
    assert (values["type"], values["runtime"]) == ("worker", "docker")
    assert values["preDeployCommand"] == "image-jobs migrate"
    drain = Settings.model_fields["drain_timeout"].default.total_seconds()
    assert drain < int(values["maxShutdownDelaySeconds"]) <= 300  # Render's maximum
    variables = re.findall(r"- key: (\w+).*\n +sync: false$", blueprint, re.MULTILINE)
    assert len(variables) == blueprint.count("key:")
    assert {"DATABASE_URL", "SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY"} <= set(variables)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_documents_resolve(document: str) -> None:
    assert unresolved_links(document, (ROOT / document).read_text()) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_named_in_documents_exist(document: str) -> None:
    assert missing_paths(document, (ROOT / document).read_text()) == []


def test_broken_links_and_paths_are_found() -> None:
    text = "[a](no.md) [b](README.md#no-heading) [c](#settings) [d](https://example.com) `queue/no.py` `no.py` `sql/no`"
    assert unresolved_links("daemon/README.md", text) == ["no.md", "README.md#no-heading"]
    assert missing_paths("daemon/README.md", text) == ["no.py", "queue/no.py", "sql/no"]


def test_commands_of_benchmarks_select_one():
    text = (ROOT / "tests/bench/README.md").read_text()
    names = " ".join(
        re.findall(r"def (test_\w+)", "".join(p.read_text() for p in (ROOT / "tests/bench").glob("test_*.py")))
    )
    chosen = re.findall(r"tests/run --bench -k (\w+)", text)
    assert len(chosen) == 4
    assert [name for name in chosen if name not in names] == []
