"""A provider in one file: put into `daemon/providers/` as `example.py`, it is the provider `example`, and nothing else changes.

It submits jobs, which are files in a folder, so that every daemon sees them. A job is done once a file `done` lies there.
"""

from pathlib import Path

from PIL import Image
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from daemon.providers import Generated, Model, Provider, Reporter, Request, Submitted, Waiting
from daemon.settings import Directory, Settings

SETTING = "EXAMPLE_FOLDER"
MODELS = (Model("colour", price=0.01, typical_seconds=1, source="this file"),)


class ExampleSettings(BaseSettings):
    """The provider's own variables, from the environment or `.env` as all others are."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore")

    folder: Directory = Field(None, alias=SETTING)


def create(_settings: Settings) -> Provider | None:
    """Create the provider; None without `EXAMPLE_FOLDER`."""
    folder = ExampleSettings().folder
    return Example(folder) if folder else None


class Example:
    """Fills an image with the colour that the prompt names."""

    models = MODELS

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def aclose(self) -> None:
        """Has no connections to close."""

    async def generate(self, request: Request, report: Reporter) -> Submitted:
        """Submit a job."""
        job_id = f"{request.run_id}.{request.ticket}"
        report.submitted({"colour": request.prompt.text}, estimate=0.01)
        (self._folder / job_id).write_text(request.prompt.text)
        return Submitted(job_id, "The example took the job")

    async def check(self, job_id: str, request: Request, report: Reporter) -> Generated | Waiting:
        """Check a job; generate its image once it is done."""
        if not (self._folder / "done").exists():
            return Waiting(40, "The example is at work")
        path = request.workdir / "image"
        Image.new("RGB", (64, 48), (self._folder / job_id).read_text()).save(path, "PNG")
        return Generated(path, cost=0.01)

    async def cancel(self, job_id: str) -> None:
        """Cancel a job: its file is removed."""
        (self._folder / job_id).unlink(missing_ok=True)
