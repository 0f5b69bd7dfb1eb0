"""Define what a provider is, and find the providers there are.

A provider is one module in this folder with three names: `MODELS`, its catalogue; `SETTING`, the environment variable that
turns it on; and `create`, which returns it, or None where that variable is not set. It turns a `Request` into an image on
disk. What all providers have in common (claims, attempts, deadlines, cancellation, downloads, limits, storage, events) is
the worker's.

To add a provider, add its file; `stability.py` is the example to read. `PROVIDERS` lists every module or package of this
folder that has a line `SETTING = …`; the modules without one are helpers.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import date, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit, urlunsplit

from daemon.prompt import PromptSpec
from daemon.settings import Settings

_SETTING = re.compile(r"^SETTING\b", re.MULTILINE)


def find_providers(folder: Path) -> dict[str, str]:
    """Find the provider modules of a folder, by reading them. None is imported: an SDK takes a second.

    Returns:
        Module names by the providers' names, in alphabetical order.
    """
    sources = {path.stem: path / "__init__.py" if path.is_dir() else path for path in sorted(folder.iterdir())}
    return {
        name: f"{__name__}.{name}"
        for name, source in sources.items()
        if source.suffix == ".py" and source.is_file() and _SETTING.search(source.read_text("utf-8"))
    }


PROVIDERS = find_providers(Path(__file__).parent)
"""Provider → module."""


@dataclass(frozen=True, slots=True)
class Price:
    """USD for one image of a quality (a value of `promptSpec.quality`) and size; None where not known. A height of 0: of any
    size whose longest edge is at most the width; 0 x 0: of any size."""

    quality: str
    price: float | None
    width: int = 0
    height: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """One model of a provider's catalogue, as the view `image_models` shows it to frontends.

    Prices are USD for one image at the default size and quality; None where there is no price per image.
    `prices` has more of them, where quality or size make a difference.
    `qualities` are the values of `promptSpec.quality` that make a difference, the default among them; empty where there is
    one quality. `retired` is the day from which the provider refuses it; `successor` the model it names instead.
    """

    name: str
    price: float | None = None
    typical_seconds: float | None = None
    sizes: tuple[str, ...] = ()
    ratios: tuple[str, ...] = ()
    qualities: tuple[str, ...] = ()
    seed: bool = False
    negative_prompt: bool = False
    previous_image: bool = False
    previews: bool = False
    retired: date | None = None
    successor: str | None = None
    as_of: date = date(2026, 11, 23)
    source: str = ""
    prices: tuple[Price, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """All that a provider may know of a run.

    Args:
        run_id: The run.
        model: The model to call; a retired one has been replaced by its successor.
        prompt: The validated `promptSpec`.
        workdir: A directory of this attempt alone, removed afterwards.
        attempt: Counted from 1.
        previous_image: A file in `workdir`, fetched and validated already. It goes with the submission, so `check` does not
            get it again.
        metadata: The caller's.
        ticket: Drawn when the run is inserted and at each requeue: it tells a provider job from one that was submitted
            before the requeue.
        previous_conversation: The file that a `Conversational` provider returned along with the previous image, where that
            is known and of the same workflow.
    """

    run_id: str
    model: str
    prompt: PromptSpec
    workdir: Path
    attempt: int = 1
    previous_image: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    ticket: int = 0
    previous_conversation: Path | None = None


@dataclass(frozen=True, slots=True)
class Generated:
    """An image on disk. `cost` is USD, settled from what the provider reported; None where unknown, never 0 for unknown."""

    path: Path
    cost: float | None = None
    revised_prompt: str | None = None
    original_url: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """More for the audit trail: usage, request id."""
    extra: tuple[Path, ...] = ()
    """Further images that came with it, in order."""
    grid: bool = False
    """Whether the image is a grid of two by two: its quarters are stored as further images."""
    conversation: Path | None = None
    """A JSON file of a `Conversational` provider, to be stored beside the image."""
    seed: int | None = None
    """The seed that was used: the provider's, where it says one, else the one that was sent. None where not known."""
    quality: str | None = None
    """The quality that was used, by the provider's name. None where not known, or there is one only."""

    @property
    def shown_url(self) -> str | None:
        """`original_url` without its query, which is often a signature."""
        return (
            None
            if self.original_url is None
            else urlunsplit(urlsplit(self.original_url)._replace(query="", fragment=""))
        )


@dataclass(frozen=True, slots=True)
class Submitted:
    """The provider accepted a job and delivers later: any daemon can check it by `job_id` (`provider_job_id` of the run)."""

    job_id: str
    message: str | None = None
    check_in: timedelta | None = None
    """Pause before the first check; None leaves it to the poll interval."""
    webhook: bool = False
    """Whether a webhook will come, by `webhook_<provider>`: then the job is polled only if that does not come in time."""


@dataclass(frozen=True, slots=True)
class Charge:
    """The charge of a job that was cancelled, as the provider says; `cost` is USD, None where unknown."""

    charged: bool
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class Waiting:
    """The job is not ready yet. `progress` is 0-100 where the provider reports it."""

    progress: float | None = None
    message: str | None = None


class Reporter(Protocol):
    """Takes a provider's reports while it works. Calls return at once; the daemon writes the events."""

    def submitted(self, request: Mapping[str, Any], *, estimate: float | None = None, deferred: bool = False) -> None:
        """Record the exact request, without secrets and image bytes. Called right before its first byte leaves, and only then:
        after everything that may be waited for (a permit, a connection).

        Raises:
            RunError: If it must not leave any more, since the claim is lost. Nothing has been sent then.

        Args:
            request: For the audit trail.
            estimate: USD.
            deferred: The response will be a job id and no image. It is waited for even if the run is lost meanwhile, since a
                provider job can be cancelled by its id alone.
        """

    def progress(self, percent: float, message: str | None = None) -> None:
        """Record the progress, 0-100."""

    def preview(self, image: Path) -> None:
        """Publish an image that is still forming, a file in the request's `workdir`. The reporter takes the file over."""

    def warning(self, message: str, *, field: str | None = None, **data: Any) -> None:
        """Record an option that this model does not have, and what was done instead."""


@runtime_checkable
class Provider(Protocol):
    """Generates images. All methods raise `RunError`, and nothing else, for failures of the outside world."""

    @property
    def models(self) -> Sequence[Model]:
        """The catalogue as it is set up here: the module's `MODELS`, or nothing for a compatible server they are not about.

        Where it is empty, model names are passed through unchecked.
        """
        ...

    async def generate(self, request: Request, report: Reporter) -> Generated | Submitted:
        """Generate the image, or submit a job for it. Called at most once per attempt; cancelled when the run is lost."""
        ...

    async def aclose(self) -> None:
        """Close all connections."""
        ...


@runtime_checkable
class KeyChecked(Provider, Protocol):
    """A provider that can be asked, for nothing, whether it accepts our key."""

    async def check_key(self) -> None:
        """Send a request that is free and needs the key.

        Raises:
            Refused: `authentication` or `permission`, if the key is not accepted.
            RunError: Any other, if the provider cannot say.
        """
        ...


@runtime_checkable
class Conversational(Provider, Protocol):
    """A provider that refines an image better with the conversation that made it.

    The conversation is kept in a bucket that is not public: it may look like base64, which the database refuses.
    """

    @property
    def max_conversation_bytes(self) -> int:
        """Bytes; a larger conversation is not fetched."""
        ...


@runtime_checkable
class Limited(Provider, Protocol):
    """A provider that lets only so many requests of some kind go at once: each needs a permit while `generate` runs."""

    def permit(self, request: Request) -> AbstractAsyncContextManager[None]:
        """Wait for a permit, and hold it. Nothing is sent meanwhile: waiting is neither the provider's time nor its cost."""
        ...


@runtime_checkable
class Deferred(Provider, Protocol):
    """A provider that may return `Submitted`: its jobs can be checked and cancelled, by any daemon."""

    async def check(self, job_id: str, request: Request, report: Reporter) -> Generated | Waiting:
        """Check a job once. Raises `Refused` if the job failed for good, `Retryable` if it should be submitted anew.

        A request that failed, also by a 4xx, says nothing about the job (`providers/job_checks.py`).
        """
        ...

    async def cancel(self, job_id: str) -> Charge | None:
        """Cancel a job, as far as the provider can. Never raises for a job that has ended.

        Returns:
            What the provider says about its charge; None if it says nothing: then it may be charged.
        """
        ...


@runtime_checkable
class Traceable(Deferred, Protocol):
    """A provider whose jobs name their run: one whose id was never saved is found by its webhook."""

    async def owner(self, job_id: str) -> tuple[str, int] | None:
        """Return the run id and ticket that a job was submitted with; None if it is not ours, or not there."""
        ...


def permit(provider: Provider, request: Request) -> AbstractAsyncContextManager[None]:
    """Wait for the permit that a `Limited` provider asks for, and hold it; for any other, do nothing."""
    return provider.permit(request) if isinstance(provider, Limited) else nullcontext()


def models(provider: str) -> tuple[Model, ...]:
    """Return the catalogue of `provider`. Imports its module."""
    return tuple(import_module(PROVIDERS[provider]).MODELS)


def setting(provider: str) -> str:
    """Return the environment variable that turns `provider` on. Imports its module."""
    name: str = import_module(PROVIDERS[provider]).SETTING
    return name


def create(provider: str, settings: Settings) -> Provider | None:
    """Create a provider; None where its setting is missing."""
    created: Provider | None = import_module(PROVIDERS[provider]).create(settings)
    return created


async def available(settings: Settings) -> list[str]:
    """Return the names of the providers that are set up. Creates each one, and closes it again."""
    created = {name: create(name, settings) for name in PROVIDERS}
    for provider in created.values():
        if provider is not None:
            await provider.aclose()
    return [name for name, provider in created.items() if provider is not None]


def find_model(provider: str, name: str) -> Model | None:
    """Return a model of the catalogue by its name; None if it is not listed."""
    return next((model for model in models(provider) if model.name == name), None)
