"""Compare the books (`image_jobs.calls`) with the ledger of the API that was called, run by run and to the cent."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from tests.support.paid_api import UNDERSTOOD, Entry

INTERRUPTIONS = ("taken_over", "cancelled", "requeued", "unknown_outcome", "late")
"""Events of a run whose call may have been broken off, before or after its request was accepted."""


@dataclass
class Books:
    """Counts, sums, and the faults that were found: every list must be empty."""

    counts: Counter[str] = field(default_factory=Counter)
    charged: Decimal = Decimal(0)
    lost: Decimal = Decimal(0)
    """Charges that are in the books as unknown."""
    open: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    """Charged in the books, and not in the ledger, or twice."""
    unexplained: list[str] = field(default_factory=list)
    """Charged in the ledger, and neither charged nor unknown in the books."""
    invented: list[str] = field(default_factory=list)
    """Unknown in the books without a request, though nothing had interrupted the run."""
    forgotten: list[str] = field(default_factory=list)
    """The response said what it cost and was delivered, nothing had interrupted the run, and the books do not say it."""

    @property
    def faults(self) -> list[str]:
        return [*self.open, *self.foreign, *self.unexplained, *self.invented, *self.forgotten]


def compare(ledger: Iterable[Entry], calls: Iterable[Mapping[str, Any]], events: Mapping[str, Counter[str]]) -> Books:
    """Compare a ledger with the rows of `image_jobs.calls` (`run_id, state, cost`), each run for itself.

    Args:
        ledger: The accepted requests.
        calls: The rows.
        events: How many events of each name a run has.
    """
    books = Books()
    requests: dict[str, list[Entry]] = {}
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for entry in ledger:
        requests.setdefault(entry.run, []).append(entry)
    for call in calls:
        rows.setdefault(call["run_id"], []).append(call)
    for run in sorted({*requests, *rows}):
        _compare_run(books, run, requests.get(run, []), rows.get(run, []), events.get(run, Counter()))
    return books


def _compare_run(
    books: Books, run: str, entries: list[Entry], rows: list[Mapping[str, Any]], events: Counter[str]
) -> None:
    states = Counter(str(row["state"]) for row in rows)
    books.counts.update(requests=len(entries), **states)
    story = f"{run}: {[(e.number, e.fate, e.delivered) for e in entries]}, {[(r['state'], r['cost']) for r in rows]}, {dict(events)}"
    if states["open"]:
        books.open.append(f"open: {story}")
    prices = {entry.price: entry for entry in entries if entry.price}
    for row in rows:
        if row["state"] == "charged":
            if prices.pop(row["cost"], None) is None:
                books.foreign.append(f"foreign: {story}")
            else:
                books.charged += row["cost"]
    lost = list(prices.values())
    books.counts["lost"] += len(lost)
    books.lost += sum((entry.price for entry in lost), Decimal(0))
    if len(lost) > states["unknown"]:
        books.unexplained.append(f"unexplained: {story}")
    interruptions = sum(events[name] for name in INTERRUPTIONS)
    unclear = [entry for entry in entries if not entry.price and (entry.fate not in UNDERSTOOD or not entry.delivered)]
    books.counts["unheard"] += max(0, states["unknown"] - len(lost) - len(unclear))
    if states["unknown"] - len(lost) - len(unclear) > interruptions:
        books.invented.append(f"invented: {story}")
    if len([entry for entry in lost if entry.fate in UNDERSTOOD and entry.delivered]) > interruptions:
        books.forgotten.append(f"forgotten: {story}")
