"""The data directory: ours or not, ours alone, and nothing else ever deleted."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.dev.home import DATABASE_PORT, Home
from daemon.errors import ImageJobsError, Misconfigured
from tests.postgres import ROOT


def test_a_new_directory_is_made_and_git_looks_away(tmp_path: Path):
    with Home(tmp_path / "a/b") as home:
        assert (home.directory / ".gitignore").read_text().splitlines()[-1] == "*"


def test_a_directory_with_files_of_others_is_refused_and_left_as_it_is(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(Misconfigured, match="did not make"), Home(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_gitignore_of_somebody_else_does_not_make_it_ours(tmp_path: Path):
    (tmp_path / ".gitignore").write_text("*\n")
    with pytest.raises(Misconfigured), Home(tmp_path):
        pass


def test_where_nothing_can_be_made_one_sentence_says_so(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ImageJobsError, match="cannot be used"), Home(tmp_path / "file/data"):
        pass


def test_a_twin_is_refused_by_name_and_may_come_later(tmp_path: Path):
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


def test_clearing_deletes_the_data_also_behind_links_and_keeps_it_ours(tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "PG_VERSION").touch()
    with Home(tmp_path / "data") as home:
        (home.storage / "images").mkdir(parents=True)
        home.write_environment({"DATABASE_URL": "postgresql://postgres@127.0.0.1:5/postgres"})
        home.database.symlink_to(elsewhere)
        home.clear()
        assert sorted(path.name for path in home.directory.iterdir()) == [".gitignore", "lock"]
    assert not elsewhere.exists()
    with Home(tmp_path / "data"):
        pass


def test_the_environment_is_for_the_owner_alone_and_remembers_the_port(tmp_path: Path):
    with Home(tmp_path / "data") as home:
        assert home.remembered_port() == DATABASE_PORT
        for port in (50001, 50002):
            home.write_environment(
                {"SUPABASE_URL": "http://a:1/", "DATABASE_URL": f"postgresql://p@127.0.0.1:{port}/p"}
            )
            assert home.remembered_port() == port
        assert stat.S_IMODE(home.environment.stat().st_mode) == 0o600
        assert home.environment.read_text().splitlines()[0] == "SUPABASE_URL=http://a:1/"
