"""The data directory: its marker, its lock, and what `clear` deletes."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.dev.home import DATABASE_PORT, Home
from daemon.errors import ImageJobsError, Misconfigured
from tests.support.postgres import ROOT


def test_a_new_directory_is_created_and_ignored_by_git(tmp_path: Path):
    with Home(tmp_path / "a/b") as home:
        assert (home.directory / ".gitignore").read_text().splitlines()[-1] == "*"


def test_a_directory_with_other_files_is_refused_untouched(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(Misconfigured, match="did not make"), Home(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_gitignore_is_not_the_marker(tmp_path: Path):
    (tmp_path / ".gitignore").write_text("*\n")
    with pytest.raises(Misconfigured), Home(tmp_path):
        pass


def test_an_unwritable_place_is_refused_in_one_sentence(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ImageJobsError, match="cannot be used"), Home(tmp_path / "file/data"):
        pass


def test_a_second_dev_is_refused_until_the_first_ends(tmp_path: Path):
    hold = "import sys; from pathlib import Path; from daemon.dev.home import Home\n"
    hold += "with Home(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, tmp_path / "data"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as twin:
        assert twin.stdout is not None
        assert twin.stdout.readline() == "held\n"
        with pytest.raises(ImageJobsError, match=f"process {twin.pid}, is using"), Home(tmp_path / "data"):
            pass
        twin.kill()
    with Home(tmp_path / "data"):
        pass


def test_clear_deletes_data_behind_links_and_keeps_the_lock(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "PG_VERSION").touch()
    with Home(tmp_path / "data") as home:
        (home.storage / "images").mkdir(parents=True)
        home.write_environment({"DATABASE_URL": "postgresql://postgres@127.0.0.1:5/postgres"})
        home.database.symlink_to(outside)
        home.clear()
        assert sorted(path.name for path in home.directory.iterdir()) == [".gitignore", "lock"]
    assert not outside.exists()
    with Home(tmp_path / "data"):
        pass


def test_the_environment_is_private_and_has_the_port(tmp_path: Path):
    with Home(tmp_path / "data") as home:
        assert home.remembered_port() == DATABASE_PORT
        for port in (50001, 50002):
            home.write_environment(
                {"SUPABASE_URL": "http://a:1/", "DATABASE_URL": f"postgresql://p@127.0.0.1:{port}/p"}
            )
            assert home.remembered_port() == port
        assert stat.S_IMODE(home.environment.stat().st_mode) == 0o600
        assert home.environment.read_text().splitlines()[0] == "SUPABASE_URL=http://a:1/"
