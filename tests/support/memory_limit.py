"""Limit the memory of a process tree by a cgroup, where this machine lets us make one (v1 or v2)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

ROOTS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
)
"""A place for cgroups, the file with the limit in each, and that with the most that was used."""


@dataclass(frozen=True)
class MemoryLimit:
    """A cgroup. What a process in it starts later is in it, too."""

    folder: Path
    most: str

    def add(self, process: int) -> None:
        """Move a process into it."""
        (self.folder / "cgroup.procs").write_text(str(process))

    @property
    def peak(self) -> int | None:
        """Bytes that were used at most, with the cache of files; None where the system does not tell."""
        file = self.folder / self.most
        return int(file.read_text()) if file.exists() else None


@contextmanager
def memory_limit(limit: int) -> Iterator[MemoryLimit | None]:
    """Make a cgroup with a limit of so many bytes; None where that is not allowed here."""
    for root, name, most in ROOTS:
        folder = root / f"image-jobs-{uuid4().hex}"
        if not os.access(root, os.W_OK):
            continue
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if not (folder / name).exists():
                continue
            (folder / name).write_text(str(limit))
            yield MemoryLimit(folder, most)
            return
        finally:
            folder.rmdir()
    yield None
