"""What doctor finds."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """What `doctor` found out about one thing."""

    name: str
    state: Literal["ok", "info", "problem"]
    message: str
    cure: str = ""
