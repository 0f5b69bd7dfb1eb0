"""The Dockerfile, read and not built: no container engine is needed to run these tests.

Checked is what goes wrong unnoticed: a shell that swallows SIGTERM, root, dev parts in production.
"""

import json
import tomllib

import pytest

from tests.support.postgres import ROOT

Instruction = tuple[str, str]


@pytest.fixture(scope="module")
def stages() -> list[list[Instruction]]:
    """Return the instructions of each stage, continuation lines joined, comments gone."""
    text = (ROOT / "Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")).replace("\\\n", " ")
    stages: list[list[Instruction]] = []
    for line in filter(str.strip, lines.splitlines()):
        name, value = line.split(maxsplit=1)
        if name == "FROM":
            stages.append([])
        stages[-1].append((name, value))
    return stages


def values(stage: list[Instruction], name: str) -> list[str]:
    return [value for instruction, value in stage if instruction == name]


def test_python_is_the_first_process_and_gets_signals(stages):
    assert json.loads(values(stages[-1], "ENTRYPOINT")[0]) == ["image-jobs"]
    assert json.loads(values(stages[-1], "CMD")[0]) == ["run"]
    assert values(stages[-1], "STOPSIGNAL") == ["SIGTERM"]


def test_entry_point_is_a_command_of_the_package(stages):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"image-jobs": "daemon.cli:main"}


def test_health_check_runs_without_a_shell(stages):
    _, command = values(stages[-1], "HEALTHCHECK")[0].split("CMD")
    assert json.loads(command) == ["image-jobs", "check"]


def test_nothing_runs_as_root_after_the_installation(stages):
    names = [name for name, _ in stages[-1]]
    user = names.index("USER")
    assert values(stages[-1], "USER") == ["10001"]  # a number: Kubernetes checks runAsNonRoot without the image's names
    assert not {"RUN", "COPY", "ADD"} & set(names[user:])


def test_stages_share_a_python_and_tools_stay_in_the_first(stages):
    images = [values(stage, "FROM")[0].split()[0] for stage in stages]
    assert len(images) == 2
    assert images[0] == images[1]
    assert "slim" in images[0]
    assert not any("pip" in command for command in values(stages[-1], "RUN"))


def test_image_has_no_dev_parts_and_no_secrets(stages):
    everything = (ROOT / "Dockerfile").read_text()
    assert "[dev" not in everything
    assert "[test" not in everything
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert "daemon/dev" in ignored
    wanted = {"!README.md", "!pyproject.toml", "!daemon", "!sql"}
    hook = "!daemon/dev/canvas/build.py"  # pyproject.toml names it, and it leaves the canvas out
    assert {line for line in ignored if line.startswith("!")} == {*wanted, hook}
    assert any("IMAGE_JOBS_SKIP_CANVAS=1" in command for command in values(stages[0], "RUN"))
    assert not any(word in line for line in values(stages[-1], "ENV") for word in ("KEY", "SECRET", "DATABASE_URL"))
