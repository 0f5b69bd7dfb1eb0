"""The registry of `image-jobs dev`: which one is meant in a directory, and that dead ones are ignored."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from daemon.errors import Misconfigured
from daemon.running_dev import nearest, registered, running


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state/image-jobs/dev"


@pytest.fixture
def locks() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(locks: ExitStack, state: Path, started_in: Path, data: str = ".image-jobs", *, pid: int = 1) -> Path:
    """Register a dev of another process, whose lock is held; return its data directory."""
    directory = started_in / data
    directory.mkdir(parents=True)
    held = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)
    locks.callback(os.close, held)
    fcntl.flock(held, fcntl.LOCK_EX)
    os.write(held, f"{pid}\n".encode())
    state.mkdir(parents=True, exist_ok=True)
    entry = {"pid": pid, "data": str(directory), "started_in": str(started_in), "url": f"http://127.0.0.1:{pid}"}
    (state / f"{pid}.json").write_text(json.dumps(entry))
    return directory


def test_a_dev_is_registered_while_it_runs(tmp_path: Path, locks: ExitStack, monkeypatch: pytest.MonkeyPatch):
    data = tmp_path / "my data"
    data.mkdir()
    held = os.open(data / "lock", os.O_RDWR | os.O_CREAT)
    locks.callback(os.close, held)
    fcntl.flock(held, fcntl.LOCK_EX)
    os.write(held, f"{os.getpid()}\n".encode())
    monkeypatch.chdir(tmp_path)
    with registered(Path("my data"), "http://127.0.0.1:54321"):
        (one,) = running()
        assert one == (os.getpid(), data, tmp_path, "http://127.0.0.1:54321")
        assert nearest(Path("/")) == one
    assert running() == []


def test_the_file_of_a_killed_dev_is_ignored(tmp_path: Path, locks: ExitStack, state: Path):
    start(locks, state, tmp_path / "killed")
    locks.close()
    (state / "half.json").write_text('{"pid": 1')
    assert running() == []
    assert nearest(tmp_path / "killed") is None


def test_the_file_of_a_killed_dev_is_ignored_beside_the_next(tmp_path: Path, locks: ExitStack, state: Path):
    data = start(locks, state, tmp_path / "restarted", pid=2)
    entry = json.loads((state / "2.json").read_text())
    (state / "1.json").write_text(json.dumps(entry | {"pid": 1}))
    found = nearest(tmp_path)
    assert found is not None
    assert (found.pid, found.data) == (2, data)


def test_the_dev_of_the_directory_wins_over_others(tmp_path: Path, locks: ExitStack, state: Path):
    outer = start(locks, state, tmp_path / "a", pid=1)
    inner = start(locks, state, tmp_path / "a/b", pid=2)
    other = start(locks, state, tmp_path / "c", pid=3)
    beside = start(locks, state, tmp_path / "c", "second", pid=4)
    for directory, expected in (("a", outer), ("a/x", outer), ("a/b/src", inner), ("c", other)):
        found = nearest(tmp_path / directory)
        assert found is not None
        assert found.data == expected
    with pytest.raises(Misconfigured, match="Several image-jobs dev are running, in ") as caught:
        nearest(tmp_path)
    assert str(beside) in caught.value.message


def test_an_unwritable_state_directory_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with registered(tmp_path, "http://127.0.0.1:54321"):
        assert running() == []
