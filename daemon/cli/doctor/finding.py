"""The result of one check."""

from dataclasses import dataclass
from typing import Literal

from daemon.errors import ImageJobsError


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `doctor`.

    Attributes:
        name: The thing that was checked.
        state: `problem` makes the command fail; `info` does not.
        message: A sentence for operators.
        cure: A sentence that says how to mend it; empty where there is nothing to do.
    """

    name: str
    state: Literal["ok", "info", "problem"]
    message: str
    cure: str = ""


def failed(name: str, error: ImageJobsError) -> Finding:
    """Make a problem of an error that a check ended with."""
    return Finding(name, "problem", error.message, error.hint)
