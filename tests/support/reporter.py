"""Record the reports of a provider."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Recorder:
    """A `Reporter` that remembers. `previews` holds the bytes, as a preview's file is the reporter's to remove."""

    requests: list[dict[str, Any]] = field(default_factory=list)
    estimates: list[float | None] = field(default_factory=list)
    deferred: list[bool] = field(default_factory=list)
    percents: list[float] = field(default_factory=list)
    messages: list[str | None] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    warnings: list[tuple[str | None, str]] = field(default_factory=list)
    _heard: asyncio.Event = field(default_factory=asyncio.Event)

    def submitted(self, request: Mapping[str, Any], *, estimate: float | None = None, deferred: bool = False) -> None:
        self.deferred.append(deferred)
        self.requests.append(dict(request))
        self.estimates.append(estimate)
        self._heard.set()

    def progress(self, percent: float, message: str | None = None) -> None:
        self.percents.append(percent)
        self.messages.append(message)
        self._heard.set()

    def preview(self, image: Path) -> None:
        self.previews.append(image.read_bytes())
        image.unlink()

    def warning(self, message: str, *, field: str | None = None, **data: Any) -> None:
        self.warnings.append((field, message))

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until a report makes `condition` true."""
        while not condition():
            self._heard.clear()
            await self._heard.wait()

    @property
    def warned(self) -> set[str | None]:
        """The fields that were warned about."""
        return {name for name, _ in self.warnings}
