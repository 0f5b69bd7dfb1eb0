"""Temporary folders of daemons that live, and of those that were killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from daemon.worker.workdirs import Workdirs
from tests.support.postgres import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from daemon.worker.workdirs import Workdirs

with Workdirs(Path(sys.argv[1])).new() as folder:
    (Path(folder) / "image").write_bytes(bytes(1000))
    print(folder, flush=True)
    time.sleep(60)
"""


def test_folders_go_with_a_killed_daemon_and_no_other(tmp_path: Path) -> None:
    others = tmp_path / "image-jobs-work-of-somebody", tmp_path / "image-jobs-dev-1"
    for folder in others:
        folder.mkdir()
        (folder / "file").write_text("not ours")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        folder = Path(holder.stdout.readline().strip())
        Workdirs(tmp_path).sweep()
        assert (folder / "image").exists()
        holder.kill()
    assert folder.exists()
    Workdirs(tmp_path).sweep()
    assert {path.name for path in tmp_path.iterdir()} == {folder.name for folder in others}


def test_the_folder_is_removed_with_its_daemon(tmp_path: Path) -> None:
    workdirs = Workdirs(tmp_path)
    with workdirs.new() as first, workdirs.new() as second:
        assert Path(first).parent == Path(second).parent
        Workdirs(tmp_path).sweep()
        assert Path(first).exists()
    assert not Path(first).exists()
    workdirs.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_vanished_is_made_anew(tmp_path: Path) -> None:
    parent = tmp_path / "pictures"
    parent.mkdir()
    workdirs = Workdirs(parent)
    with workdirs.new():
        parent.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        workdirs.new()
    parent.mkdir()
    with workdirs.new() as folder:
        assert Path(folder).is_relative_to(parent)
    workdirs.close()


def test_a_lock_that_vanished_takes_no_picture_along(tmp_path: Path) -> None:
    """A system's cleaner of temporary files removes what has not been touched for days: the lock, and nothing else."""
    workdirs = Workdirs(tmp_path)
    with workdirs.new() as first:
        picture = Path(first) / "image"
        picture.write_bytes(bytes(1000))
        (Path(first).parent / "lock").unlink()
        with workdirs.new() as second:
            Workdirs(tmp_path).sweep()
            assert picture.exists()
            assert Path(second).exists()
    workdirs.close()
    Workdirs(tmp_path).sweep()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_sweep_are_removed(tmp_path: Path) -> None:
    (tmp_path / "image-jobs-work-1").mkdir()
    (tmp_path / "image-jobs-work-2").mkdir()
    (tmp_path / "image-jobs-work-2" / "lock").touch()
    (tmp_path / "image-jobs-work-3").symlink_to(tmp_path)
    Workdirs(tmp_path).sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["image-jobs-work-3"]


def test_a_place_that_cannot_be_looked_at_ends_nothing(tmp_path: Path) -> None:
    Workdirs(tmp_path / "nowhere").sweep()
