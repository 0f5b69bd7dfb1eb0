"""Folders for the files of attempts: gone with the attempt, and after a kill at the next start of any daemon."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import structlog

log = structlog.stdlib.get_logger()

_PREFIX = "image-jobs-work-"
_LOCK = "lock"


class Workdirs:
    """The temporary folder of one daemon, with one below it for each attempt.

    The system holds a lock in it for as long as the daemon lives, and drops it with the process: that tells what a living
    daemon uses from what a killed one has left behind.

    Args:
        parent: Where to make it; None for the system's place for temporary files.
    """

    def __init__(self, parent: Path | None) -> None:
        self._parent = parent
        self._own: Path | None = None
        self._lock: int | None = None

    def new(self) -> tempfile.TemporaryDirectory[str]:
        """Make a folder for an attempt. Files that cannot be removed at its end cost nothing.

        Raises:
            OSError: If the disk cannot be used.
        """
        return tempfile.TemporaryDirectory(prefix="run-", dir=self._folder(), ignore_cleanup_errors=True)

    def sweep(self) -> None:
        """Remove the folders of daemons that live no more."""
        with suppress(OSError), os.scandir(self._parent or tempfile.gettempdir()) as entries:
            for entry in entries:
                if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False):
                    _remove_abandoned(Path(entry.path))

    def close(self) -> None:
        """Remove the folder of this daemon."""
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._own = self._lock = None

    def _folder(self) -> Path:
        """Return the daemon's folder. It is made when it is needed, and anew where it has vanished.

        What is in it stays: where the system's cleaner of old files took the lock alone, pictures may be on their way there.
        """
        if self._own is None or not (self._own / _LOCK).exists():
            self._unlock()
            self._make()
        assert self._own is not None
        return self._own

    def _make(self) -> None:
        # By another name until it is locked: nothing that is being made is taken for abandoned.
        hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=self._parent))
        try:
            self._lock = os.open(hidden / _LOCK, os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._own = hidden.rename(hidden.with_name(hidden.name[1:]))
        except OSError:
            shutil.rmtree(hidden, ignore_errors=True)
            self._unlock()
            raise


def _remove_abandoned(folder: Path) -> None:
    """Remove a folder if no process holds its lock; the lock goes last, for a daemon that is killed in the middle of this."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        with suppress(OSError):
            folder.rmdir()
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in folder.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        log.info("workdir.removed", folder=folder.name, reason="its daemon lives no more")
    except OSError:
        return  # held
    finally:
        os.close(lock)
