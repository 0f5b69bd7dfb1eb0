"""Runs a second, the daemon beside pgqueuer: with no work, and with the same work by hand; with 1, 4 and 16 processes."""

from contextlib import AsyncExitStack
from statistics import median

import pytest

from tests.bench.machine import describe
from tests.bench.report import remark, table
from tests.bench.systems import SYSTEMS, Bare, Daemon, Handwritten, System
from tests.bench.workers import Measured, workers
from tests.support.postgres import Cluster

ROUNDS = 5
LOADS: dict[type[System], int] = {Daemon: 3000, Handwritten: 1500, Bare: 15_000}
"""As much as takes each of them a second or two."""
BELIEVABLE = 0.06, 0.09
"""Handwritten of bare, when both were measured first. Far from it, the handler was slowed down, or sped up, by something
else than its work, and is nothing to compare with."""


@pytest.mark.parametrize("processes", [1, 4, 16])
async def test_runs_a_second_beside_pgqueuer(durable: Cluster, processes: int) -> None:
    found: dict[type[System], list[Measured]] = {system: [] for system in SYSTEMS}
    before = describe(durable)
    async with AsyncExitStack() as stack:
        running = {}
        for kind in SYSTEMS:
            system = await stack.enter_async_context(kind.open(durable))
            running[kind] = await stack.enter_async_context(workers(system, processes))
        for _ in range(ROUNDS):
            for kind, them in running.items():
                found[kind].append(await them.work_off(LOADS[kind]))
    rates = {kind: median(each.rate for each in measured) for kind, measured in found.items()}
    of_bare = rates[Handwritten] / rates[Bare]
    remark(f"\n{before}")
    table(
        f"Runs a second with {processes} process{'es' * (processes > 1)}: medians of {ROUNDS} alternations (least, most)",
        ("", "runs/s", "x by hand", "x bare", "backends, µs", "process, µs", "WAL, bytes"),
        [
            (
                kind.name,
                f"{rates[kind]:.0f} ({min(each.rate for each in measured):.0f}-{max(each.rate for each in measured):.0f})",
                f"{rates[kind] / rates[Handwritten]:.2f}",
                f"{rates[kind] / rates[Bare]:.3f}",
                *(f"{value:.0f}" for value in per_run(measured)),
            )
            for kind, measured in found.items()
        ],
    )
    if processes == 1:
        least, most = BELIEVABLE
        void = "" if least <= of_bare <= most else f" VOID: not within {least}-{most}, so this compares nothing."
        remark(f"By hand reaches {of_bare:.3f} of bare.{void}")


def per_run(measured: list[Measured]) -> tuple[float, float, float]:
    """Return microseconds of a processor in backends and in workers, and bytes of WAL, for a run."""
    return (
        median(1e6 * each.backends / each.count for each in measured),
        median(1e6 * each.workers / each.count for each in measured),
        median(each.wal / each.count for each in measured),
    )
