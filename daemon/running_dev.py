"""Registry of the `image-jobs dev` that run on this machine: other commands find one, wherever they are started.

A file for each in the user's state directory. One is alive as long as it holds the lock of its data directory, in which its
process id stands: so what a killed one has left behind is ignored, also once another runs there.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from daemon.errors import Misconfigured


class RunningDev(NamedTuple):
    """A running `image-jobs dev`: its process, data directory, working directory and the address of its endpoints."""

    pid: int
    data: Path
    started_in: Path
    url: str

    @property
    def environment(self) -> Path:
        """The file with its DATABASE_URL and keys."""
        return self.data / "env"


@contextmanager
def registered(data: Path, url: str) -> Generator[None, None, None]:
    """Register this process for as long as the context lasts. Where nothing can be written, it is found in its directory.

    Args:
        data: The data directory, with its lock.
        url: Of the endpoints.
    """
    file = _directory() / f"{os.getpid()}.json"
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        entry = {"pid": os.getpid(), "data": str(data.absolute()), "started_in": str(Path.cwd()), "url": url}
        file.write_text(json.dumps(entry))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()


def running() -> list[RunningDev]:
    """Return those that run, in the order of their process ids."""
    found: list[RunningDev] = []
    for file in sorted(_directory().glob("*.json")):
        try:
            entry = json.loads(file.read_text())
            one = RunningDev(entry["pid"], Path(entry["data"]), Path(entry["started_in"]), entry["url"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # it is being written or removed
        if _holds(one.data / "lock", one.pid):
            found.append(one)
    return found


def nearest(directory: Path) -> RunningDev | None:
    """Return the one that commands in a directory mean: started there, else above it, else the only one that runs.

    Raises:
        Misconfigured: If several fit alike.
    """
    everywhere = running()
    around = [one for one in everywhere if directory.is_relative_to(one.started_in)]
    deepest = max((len(one.started_in.parts) for one in around), default=0)
    fitting = [one for one in around if len(one.started_in.parts) == deepest] or everywhere
    if len(fitting) > 1:
        fitting = [one for one in fitting if around and one.data.name == ".image-jobs"] or fitting
    if len(fitting) > 1:
        raise Misconfigured(
            f"Several image-jobs dev are running, in {' and '.join(str(one.data) for one in fitting)}.",
            "Run the command where one of them was started, or set DATABASE_URL to that of its file env.",
        )
    return fitting[0] if fitting else None


def _directory() -> Path:
    """Return the directory of the registry, by the XDG base directory specification."""
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    except RuntimeError:  # a user without a home
        state = Path(os.devnull)
    return Path(state) / "image-jobs/dev"


def _holds(lock: Path, pid: int) -> bool:
    """Return whether a process holds the lock; its holder has written its id into it."""
    try:
        file = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(file, 32).strip() == str(pid).encode()
    finally:
        os.close(file)
    return False
