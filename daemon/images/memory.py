"""How much memory this process may use, and how many children fit into it."""

from collections.abc import Iterator
from pathlib import Path

CHILDREN = 2
"""Children at most: two pictures at once keep two processors busy."""
CHILD = 160_000_000
"""Bytes of memory of a child at most: 20 MB at rest, and 140 for a picture."""
DAEMON = 150_000_000
"""Bytes of the daemon itself."""


def children_that_fit(limit: int | None) -> int:
    """Return how many children to have, at least one.

    Args:
        limit: Bytes of memory for all processes together; None for no limit.
    """
    return CHILDREN if limit is None else max(1, min(CHILDREN, (limit - DAEMON) // CHILD))


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process's cgroup (version 1 or 2), or one above it, allows; None where none does.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max), …/cgroup-v1/memory.html (memory.limit_in_bytes).
    In a container, `/proc/self/cgroup` may name the host's path, which is not there: then the mount's root is the container's.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    limits = [limit for line in lines for file in _files(root, line) if (limit := _read(file)) is not None]
    return min(limits, default=None)


def _files(root: Path, line: str) -> Iterator[Path]:
    """Yield the files with limits for a line of `/proc/self/cgroup`, from the inmost group to the mount."""
    number, _, rest = line.partition(":")
    controllers, _, path = rest.partition(":")
    mount, name = root / "sys/fs/cgroup", "memory.max"
    if number != "0":
        if "memory" not in controllers.split(","):
            return
        mount, name = mount / "memory", "memory.limit_in_bytes"
    elif not (mount / "cgroup.controllers").exists():
        mount /= "unified"  # beside version 1
    group = mount / path.strip().lstrip("/")
    for folder in (group, *group.parents):
        yield folder / name
        if folder == mount:
            return


def _read(file: Path) -> int | None:
    """Return the limit in a file; None for `max`, and for version 1's own word for it, a number close to 2^63."""
    try:
        limit = int(file.read_text())
    except (OSError, ValueError):
        return None
    return limit if limit < 1 << 60 else None
