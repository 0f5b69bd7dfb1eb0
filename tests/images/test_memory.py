"""The limits of memory that a cgroup sets, in trees of files as the kernel shows them."""

from pathlib import Path

import pytest

from daemon.images.memory import CHILDREN, children_that_fit, memory_limit

MIB = 1 << 20


def tree(root: Path, files: dict[str, str]) -> Path:
    """Make files below a folder; return it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/a.slice/b.service\n", "sys/fs/cgroup/cgroup.controllers": "cpu memory\n"}
V1 = {"proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({**V2, "sys/fs/cgroup/a.slice/b.service/memory.max": "max\n"}, None),
        ({**V2, "sys/fs/cgroup/a.slice/b.service/memory.max": f"{512 * MIB}\n"}, 512 * MIB),
        ({**V2, "sys/fs/cgroup/a.slice/memory.max": f"{256 * MIB}\n"}, 256 * MIB),
        (
            {
                **V2,
                "sys/fs/cgroup/a.slice/b.service/memory.max": f"{512 * MIB}\n",
                "sys/fs/cgroup/a.slice/memory.max": f"{256 * MIB}\n",
            },
            256 * MIB,
        ),
        ({**V2, "sys/fs/cgroup/memory.max": f"{300 * MIB}\n"}, 300 * MIB),
        ({**V1, "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": f"{512 * MIB}\n"}, 512 * MIB),
        ({**V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{512 * MIB}\n"}, 512 * MIB),
        ({**V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ({**V1, "sys/fs/cgroup/unified/memory.max": f"{400 * MIB}\n"}, 400 * MIB),
        ({"proc/self/cgroup": "nonsense\n\n4:memory\n"}, None),
    ],
)
def test_the_smallest_limit_counts(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    assert memory_limit(tree(tmp_path, files)) == limit


@pytest.mark.parametrize(
    ("limit", "children"),
    [(None, CHILDREN), (8192 * MIB, 2), (512 * MIB, 2), (400 * MIB, 1), (256 * MIB, 1), (1, 1)],
)
def test_small_containers_have_one_child(limit: int | None, children: int) -> None:
    assert children_that_fit(limit) == children
