"""The data directory of `image-jobs dev`: its marker, its lock, its files."""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from daemon.errors import ImageJobsError, Misconfigured

DATABASE_PORT = 54322
"""As the Supabase CLI has it."""

MARKER = "# The data of image-jobs dev. --fresh deletes this directory's content.\n*\n"
"""Content of `.gitignore`: git ignores the directory, and dev may delete its content."""


GUARD_TIMEOUT = 20.0
"""Seconds to wait for the guard of a dev that was killed."""


class Home:
    """The data directory. While the context lasts, it is locked by this process.

    Args:
        directory: Created if it does not exist.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.database = directory / "postgres"
        self.storage = directory / "storage"
        self.environment = directory / "env"
        self.daemon_log = directory / "daemon.log"
        self._marker = directory / ".gitignore"
        self._lock = directory / "lock"
        self._held: int | None = None

    def __enter__(self) -> Self:
        """Lock the directory.

        Raises:
            Misconfigured: If it holds files that dev did not make.
            ImageJobsError: If it cannot be created, or another process holds the lock.
        """
        try:
            self._mark()
            held = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ImageJobsError(
                f"{self.directory} cannot be used ({error.strerror}).", "Choose another directory with --data."
            ) from error
        deadline = time.monotonic() + GUARD_TIMEOUT
        while not _try_lock(held):
            holder = self._lock.read_text().strip()
            if _is_running(holder) or time.monotonic() > deadline:
                os.close(held)
                raise ImageJobsError(
                    f"Another image-jobs dev, process {holder}, is using {self.directory}.",
                    "Use that one, stop it first, or choose another directory with --data, and another --port.",
                )
            time.sleep(0.05)  # its holder was killed, and the guard is stopping the holder's processes
        os.truncate(held, 0)
        os.write(held, f"{os.getpid()}\n".encode())
        self._held = held
        return self

    @property
    def lock(self) -> int:
        """The file descriptor of the lock: a process that inherits it holds the lock, too."""
        if self._held is None:
            raise RuntimeError("the directory is not entered")
        return self._held

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held is not None:
            os.close(self._held)  # and with it the lock; the file stays, or two could hold locks on two files
            self._held = None

    def clear(self) -> None:
        """Delete all data. Marker and lock stay."""
        for path in self.directory.iterdir():
            if path in (self._marker, self._lock):
                continue
            if path.is_symlink():  # Postgres as `nobody` keeps its files where it can reach them
                shutil.rmtree(path.resolve(), ignore_errors=True)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def remembered_port(self) -> int:
        """Return the port that the database had last time."""
        try:
            found = re.search(r"^DATABASE_URL=.*:(\d+)/", self.environment.read_text(), re.MULTILINE)
        except FileNotFoundError:
            return DATABASE_PORT
        return int(found[1]) if found else DATABASE_PORT

    def write_environment(self, values: Mapping[str, str]) -> None:
        """Write `env`, one NAME=value a line, readable by its owner alone."""
        unfinished = self.directory / "env.new"
        unfinished.unlink(missing_ok=True)
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.writelines(f"{name}={value}\n" for name, value in values.items())
        unfinished.rename(self.environment)

    def _mark(self) -> None:
        if self._marker.is_file() and self._marker.read_text() == MARKER:
            return
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        if any(self.directory.iterdir()):
            raise Misconfigured(
                f"{self.directory} holds files that image-jobs dev did not make.",
                "Choose an empty or a new directory with --data.",
            )
        self._marker.write_text(MARKER)


def _try_lock(file: int) -> bool:
    """Take the lock if it is free. Return whether it was."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
