"""What a provider is, and which there are.

A provider is one module with three names: `MODELS`, what it has on offer; `SETTING`, the variable that turns it on; and
`create`, which makes it from the settings or answers None where that variable is missing. It does one thing: turn a
`Request` into a picture on disk. Everything that providers have in common (claims, attempts, deadlines, cancellation,
downloads, limits, storage, events) is done once, outside, by the worker.

To add one: write the module, add its line to `PROVIDERS`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit, urlunsplit

from daemon.prompt import PromptSpec
from daemon.settings import Settings

PROVIDERS = {
    "openai": "daemon.providers.openai",
    "google": "daemon.providers.google",
    "stability": "daemon.providers.stability",
    "midjourney": "daemon.providers.midjourney",
    "demo": "daemon.providers.demo",
}
"""Provider → module. Modules are imported when needed: the SDKs take a second each."""


@dataclass(frozen=True, slots=True)
class Model:
    """One model on offer, as `image_models` shows it to frontends.

    Prices are USD for one image at the default size and quality; None where there is no price per image.
    `qualities` are the values of promptSpec.quality that make a difference, the usual one among them; empty where there is
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


@dataclass(frozen=True, slots=True)
class Request:
    """All that a provider may know of a run.

    `model` is the effective one (a retired name has been replaced). `workdir` is a directory of this attempt's own,
    removed afterwards. `previous_image` is a file in it, fetched and checked already; it goes with the order, so `check`
    does not get it again. `previous_context` is what a `Recalling` provider had given along with it, where that is known
    and was of the same workflow. `metadata` is the caller's. `ticket` is drawn when the run is inserted and at each requeue: it
    tells an order from one that was made before the requeue.
    """

    run_id: str
    model: str
    prompt: PromptSpec
    workdir: Path
    attempt: int = 1
    previous_image: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    ticket: int = 0
    previous_context: Path | None = None


@dataclass(frozen=True, slots=True)
class Generated:
    """A picture, on disk. `cost` is USD, settled from what the provider reported; None where unknown, never 0 for unknown."""

    path: Path
    cost: float | None = None
    revised_prompt: str | None = None
    original_url: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """More for the audit trail: usage, request id."""
    extra: tuple[Path, ...] = ()
    """Further pictures that came with it, in order."""
    context: Path | None = None
    """A JSON file of a `Recalling` provider's, to be kept beside the picture."""

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
    """The provider took the order and will deliver later: `job_id` finds it again, from any daemon."""

    job_id: str
    message: str | None = None
    check_in: timedelta | None = None
    """When to ask for the first time; None leaves it to the poll interval."""
    webhook: bool = False
    """Whether its webhook will come, by `webhook_<provider>`: then it is asked for only if that does not come in time."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Not ready yet. `progress` is 0-100 where the provider tells."""

    progress: float | None = None
    message: str | None = None


class Reporter(Protocol):
    """What a provider says while it works. Calls return at once; writing is the daemon's business."""

    def submitted(self, request: Mapping[str, Any], *, estimate: float | None = None, order: bool = False) -> None:
        """The exact request, without secrets and image bytes, just before it is sent. `estimate` in USD.

        `order`: the answer will be an id and no picture. It is waited for even if the run is taken away meanwhile,
        since only by its id an order can be cancelled.
        """

    def progress(self, percent: float, message: str | None = None) -> None:
        """How far it is, 0-100."""

    def preview(self, image: Path) -> None:
        """A picture that is still forming, as a file in the request's `workdir`. The reporter takes the file over."""

    def warning(self, message: str, *, field: str | None = None, **data: Any) -> None:
        """Something asked for that this model cannot do, and what was done instead."""


@runtime_checkable
class Provider(Protocol):
    """Makes pictures. All methods raise `RunError` and nothing else for what the outside world does wrong."""

    @property
    def models(self) -> Sequence[Model]:
        """What it has on offer as it is set up here: its module's `MODELS`, or nothing for a server they are not about.

        Where there is nothing, nobody knows better than the caller: every name is passed on as it is.
        """
        ...

    async def generate(self, request: Request, report: Reporter) -> Generated | Submitted:
        """Makes the picture, or orders it. Called at most once per attempt; cancelled when the run is taken away."""
        ...

    async def aclose(self) -> None:
        """Lets go of connections."""
        ...


@runtime_checkable
class Recalling(Provider, Protocol):
    """A provider that refines a picture better when it hears again what it had said of it. That may look like base64, or
    be of no concern to anybody: it lies in a bucket of its own, which is not public."""

    @property
    def largest_context(self) -> int:
        """Bytes; a larger one is of no use to it."""
        ...


@runtime_checkable
class Deferred(Provider, Protocol):
    """A provider that may answer `Submitted`: it can be asked again, by any daemon."""

    async def check(self, job_id: str, request: Request, report: Reporter) -> Generated | Waiting:
        """Asks once. Raises `Refused` if the job failed for good, `Retryable` if it should be submitted anew."""
        ...

    async def cancel(self, job_id: str) -> None:
        """Tells the provider to stop, as far as it can. Never raises for a job that has ended."""
        ...


@runtime_checkable
class Traceable(Deferred, Protocol):
    """A provider whose orders tell whose they are: one that was not written down is found by its webhook."""

    async def owner(self, job_id: str) -> tuple[str, int] | None:
        """Run id and ticket that an order was made with; None if it is none of ours, or not there."""
        ...


def models(provider: str) -> tuple[Model, ...]:
    """What `provider` has on offer. Imports its module."""
    return tuple(import_module(PROVIDERS[provider]).MODELS)


def setting(provider: str) -> str:
    """The variable that turns `provider` on. Imports its module."""
    name: str = import_module(PROVIDERS[provider]).SETTING
    return name


def create(provider: str, settings: Settings) -> Provider | None:
    """Makes a provider; None where the settings hold no key for it."""
    made: Provider | None = import_module(PROVIDERS[provider]).create(settings)
    return made


async def available(settings: Settings) -> list[str]:
    """The providers that the settings hold a key for. Makes each one, and lets it go again."""
    made = {name: create(name, settings) for name in PROVIDERS}
    for provider in made.values():
        if provider is not None:
            await provider.aclose()
    return [name for name, provider in made.items() if provider is not None]


def find_model(provider: str, name: str) -> Model | None:
    """The catalogue's entry for a model; None if the catalogue does not know it."""
    return next((model for model in models(provider) if model.name == name), None)
