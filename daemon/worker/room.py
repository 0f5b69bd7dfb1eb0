"""Makes sure, before a call is paid for, that its picture can be kept: room on the disk, and file descriptors.

What runs out is waited for: fewer runs are claimed, or none, until there is enough again.
"""

import errno
import os
import resource
import tempfile
import time
from pathlib import Path

import structlog

from daemon.errors import describe_shortage

log = structlog.stdlib.get_logger()

FILES_PER_RUN = 8
"""File descriptors of one run: the call and its file, three uploads at once with theirs, a preview."""
FILES_SPARE = 16
"""File descriptors for the rest: connections to the database that are made anew, look-ups of names."""
LOOK_INTERVAL = 1.0
"""Seconds between two tries to write, after one has failed."""
_WRITTEN = bytes(64 * 1024)


class Room:
    """How many pictures this machine can keep at once.

    Args:
        folder: Where pictures lie until they are stored; None for the system's folder of temporary files.
        picture_bytes: Size of the largest picture.
    """

    def __init__(self, folder: Path | None, *, picture_bytes: int) -> None:
        self._folder = folder or Path(tempfile.gettempdir())
        self._picture_bytes = picture_bytes
        self._failure: OSError | None = None
        self._look_at = 0.0
        self._short = False

    @property
    def short(self) -> bool:
        """Whether there is no room for a single run."""
        return self._short

    def fits(self, held: int) -> int:
        """Return for how many runs there is room beside `held` ones, each of which may yet need its whole share."""
        if self._failure is not None and not self._works_again():
            return 0
        pictures, descriptors = self._pictures(), self._files()
        room = max(0, min(pictures, descriptors) - held)
        if not (room or held):
            self._ran_out(OSError(errno.ENOSPC if pictures <= descriptors else errno.EMFILE, ""))
        elif self._short:
            self._short = False
            log.info("room.enough")
        return room

    def check(self) -> None:
        """Make sure, right before a call is sent, that there is room for its picture.

        Raises:
            OSError: If there is none.
        """
        largest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if resource.RLIM_INFINITY != largest < self._picture_bytes:
            raise self.failed(OSError(errno.EFBIG, os.strerror(errno.EFBIG)))
        if self._pictures() < 1:
            raise self.failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        if self._files() < 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def failed(self, error: OSError) -> OSError:
        """Claim nothing more until files can be written again. Returns the error."""
        self._failure = error
        self._look_at = time.monotonic() + LOOK_INTERVAL
        self._ran_out(error)
        return error

    def _works_again(self) -> bool:
        """Return whether files can be written again; looked at once a second."""
        if time.monotonic() < self._look_at:
            return False
        self._look_at = time.monotonic() + LOOK_INTERVAL
        try:
            with tempfile.TemporaryFile(prefix="image-jobs-", dir=self._folder, buffering=0) as file:
                file.write(_WRITTEN)
            self.check()
        except OSError:
            return False
        self._failure = None
        return True

    def _pictures(self) -> int:
        """Return how many of the largest pictures fit on the disk; trouble with the disk shows when it is used."""
        try:
            disk = os.statvfs(self._folder)
        except OSError:
            return _UNLIMITED
        return disk.f_bavail * disk.f_frsize // self._picture_bytes

    def _files(self) -> int:
        """Return for how many runs there are file descriptors."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        opened = _opened()
        if limit == resource.RLIM_INFINITY or opened is None:
            return _UNLIMITED
        return (limit - opened - FILES_SPARE) // FILES_PER_RUN

    def _ran_out(self, error: OSError) -> None:
        if not self._short:
            reason, cure = describe_shortage(error)
            log.warning("room.short", reason=reason, cure=cure, consequence="no run is claimed until there is enough")
        self._short = True


_UNLIMITED = 1_000_000


def raise_file_limit(runs: int) -> None:
    """Raise the soft limit of open files to what `runs` runs at once need; warn where the hard limit forbids it."""
    wanted = (_opened() or 32) + FILES_SPARE * 2 + FILES_PER_RUN * runs
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    except (OSError, ValueError):  # a system may have a limit of its own below the hard one
        possible = soft
    if possible < wanted:
        log.warning(
            "files.few",
            limit=possible,
            wanted=wanted,
            cure=f"Raise the limit of open files (ulimit -n) to {wanted}, or lower IMAGE_JOBS_CONCURRENCY.",
            consequence="fewer runs are worked on at once",
        )


def _opened() -> int | None:
    """Return how many file descriptors are open; None where the system does not say."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        try:
            return len(os.listdir(folder))  # noqa: PTH208 - a count, many times a second
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE}:
                return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None
