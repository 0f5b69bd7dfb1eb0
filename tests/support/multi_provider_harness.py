"""Daemons that have the keys of three providers, and fakes of the three APIs."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.fakes import google_api, stability_api
from tests.fakes.google_api import GoogleAPI
from tests.fakes.openai_api import KEY, OpenAIAPI
from tests.fakes.server import FakeAPI
from tests.fakes.stability_api import StabilityAPI
from tests.support.daemon_harness import DaemonHarness, start_harness
from tests.support.openai_harness import OPENAI

NANO = "gemini-nano-banana-2.1"
GOOGLE, STABILITY = f"google:{NANO}", "stability:core"


@dataclass(kw_only=True)
class MultiProviderHarness(DaemonHarness):
    """A daemon and the APIs that it calls."""

    openai: OpenAIAPI
    google: GoogleAPI
    stability: StabilityAPI

    def api(self, processor: str) -> FakeAPI:
        """The API that a processor calls."""
        apis: dict[str, FakeAPI] = {"openai": self.openai, "google": self.google, "stability": self.stability}
        return apis[processor.partition(":")[0]]

    @property
    def requests(self) -> tuple[int, int, int]:
        """How many requests OpenAI, Google and Stability AI have had."""
        return len(self.openai.requests), len(self.google.requests), len(self.stability.requests)

    async def reset(self) -> None:
        """Make the APIs as new, and lift all limits."""
        for api in (self.openai, self.google, self.stability):
            api.reset()
        await self.reset_limits()


@asynccontextmanager
async def multi_provider_harness(dsn: str, **environment: str) -> AsyncIterator[MultiProviderHarness]:
    """A daemon that claims, with these settings besides; its lease is short, for those that are killed."""
    async with OpenAIAPI() as openai, GoogleAPI() as google, StabilityAPI() as stability:
        environment = {
            "OPENAI_API_KEY": KEY,
            "OPENAI_BASE_URL": openai.url,
            "GOOGLE_API_KEY": google_api.KEY,
            "GOOGLE_BASE_URL": google.url,
            "STABILITY_API_KEY": stability_api.KEY,
            "STABILITY_BASE_URL": stability.url,
            "IMAGE_JOBS_LEASE": "2",
            **environment,
        }
        apis = {"openai": openai, "google": google, "stability": stability}
        async with start_harness(
            MultiProviderHarness, dsn, environment=environment, processor=OPENAI, **apis
        ) as harness:
            yield harness
