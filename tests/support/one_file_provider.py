"""A provider in one file, as anybody may add one: a lantern that throws a colour on a wall, once somebody trims its wick.

Its orders are files in a folder, so every daemon sees the same ones.
"""

import os
from pathlib import Path

from PIL import Image

from daemon.providers import Generated, Model, Provider, Reporter, Request, Submitted, Waiting
from daemon.settings import Settings

SETTING = "LANTERN_FOLDER"
MODELS = (Model("magic", price=0.01, typical_seconds=1, source="this file"),)


def create(_settings: Settings) -> Provider | None:
    """The lantern; None without a folder."""
    folder = os.environ.get(SETTING)
    return Lantern(Path(folder)) if folder else None


class Lantern:
    """Throws the colour that the prompt names."""

    models = MODELS

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def aclose(self) -> None:
        """Holds nothing."""

    async def generate(self, request: Request, report: Reporter) -> Submitted:
        """Lights it."""
        job_id = f"{request.run_id}.{request.ticket}"
        report.submitted({"colour": request.prompt.text}, estimate=0.01)
        (self._folder / job_id).write_text(request.prompt.text)
        return Submitted(job_id, "The lantern is lit")

    async def check(self, job_id: str, request: Request, report: Reporter) -> Generated | Waiting:
        """Looks at the wall."""
        if not (self._folder / "trimmed").exists():
            return Waiting(40, "The lantern smokes")
        path = request.workdir / "wall"
        Image.new("RGB", (64, 48), (self._folder / job_id).read_text()).save(path, "PNG")
        return Generated(path, cost=0.01)

    async def cancel(self, job_id: str) -> None:
        """Blows it out."""
        (self._folder / job_id).unlink(missing_ok=True)
