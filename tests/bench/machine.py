"""Describe the machine of a measurement, and read what backends use of it."""

import os
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import asyncpg

from tests.support.postgres import Cluster


def describe(cluster: Cluster) -> str:
    """Return a line about this machine, its load and its disk."""
    return (
        f"{datetime.now(UTC):%d %b %Y %H:%M} UTC, {os.cpu_count()} x {_processor()}, load {_load()}, "
        f"PostgreSQL {cluster.server.version} (fsync on, {_fsync(cluster):.2f} ms each), "
        f"Python {platform.python_version()}, pgqueuer {version('pgqueuer')}"
    )


@dataclass(frozen=True, slots=True)
class Used:
    """The use that other connections have made of a database: seconds of a processor, and bytes of WAL of the server."""

    backends: float
    wal: int

    def since(self, earlier: "Used") -> "Used":
        """Return the difference."""
        return Used(self.backends - earlier.backends, self.wal - earlier.wal)


async def used(db: "asyncpg.Connection[asyncpg.Record]") -> Used:
    """Read it. Two readings can be compared if no other connection was closed in between."""
    pids = await db.fetch(
        """select pid from pg_stat_activity
        where datname = current_database() and backend_type = 'client backend' and pid <> pg_backend_pid()"""
    )
    wal = await db.fetchval("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
    return Used(sum(seconds_of_cpu(row["pid"]) for row in pids), int(wal))


def seconds_of_cpu(pid: int) -> float:
    """Read what a process has used of a processor, its threads included."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def _load() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def _fsync(cluster: Cluster, times: int = 50) -> float:
    """Milliseconds to have 8 kB on the disk that the server writes to."""
    path = cluster.server.data_dir.with_name("fsync")
    with path.open("wb") as file:
        started = time.perf_counter()
        for _ in range(times):
            file.write(bytes(8192))
            file.flush()
            os.fdatasync(file.fileno())
        seconds = time.perf_counter() - started
    path.unlink()
    return 1000 * seconds / times
