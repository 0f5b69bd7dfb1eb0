"""Tables and percentiles of the benchmarks."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: names in the first column, numbers in the others."""
    it = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        it.add_column(column, justify="right" if number else "left")
    for row in rows:
        it.add_row(*row)
    Console(width=110).print("", it)


def remark(text: str) -> None:
    """Print a sentence below a table, or above it."""
    Console(width=110, highlight=False).print(text)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which that share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
