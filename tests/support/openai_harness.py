"""Daemons that call a fake of OpenAI: of its Images API, or of its Responses API in the background."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from daemon.providers.openai.models import estimate
from tests.fakes.openai_api import KEY, OpenAIAPI
from tests.fakes.openai_responses import ResponsesAPI
from tests.support.daemon_harness import DaemonHarness, start_harness
from tests.support.storage_gate import StorageGate

FLARE = "gpt-image-2.5-flare"
OPENAI = f"openai:{FLARE}"
COST = (13 * 5 + (196 + 2 * 100) * 30) / 1e6
"""USD that the fake of the Images API counts: the prompt, the image and two previews."""
POSSIBLE_COST = estimate(FLARE, (1024, 1024), "medium", previews=2)


@dataclass(kw_only=True)
class OpenAIHarness(DaemonHarness):
    """A daemon and the Images API that it calls."""

    api: OpenAIAPI


@asynccontextmanager
async def openai_harness(dsn: str, api: OpenAIAPI, **environment: str) -> AsyncIterator[OpenAIHarness]:
    """A daemon that claims, with these settings besides."""
    environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": api.url, **environment}
    async with start_harness(OpenAIHarness, dsn, environment=environment, processor=OPENAI, api=api) as harness:
        yield harness


def background_harness(
    dsn: str, api: ResponsesAPI, *, gate: StorageGate | None = None, **environment: str
) -> AbstractAsyncContextManager[DaemonHarness]:
    """A daemon that claims, and whose runs are made in the background, with these settings besides; `gate` before Storage."""
    environment = {
        "OPENAI_API_KEY": KEY,
        "OPENAI_BASE_URL": api.base_url,
        "IMAGE_JOBS_LEASE": "2",
        "IMAGE_JOBS_POLL_INTERVAL": "0.2",
        **environment,
    }
    return start_harness(
        DaemonHarness,
        dsn,
        environment=environment,
        processor=OPENAI,
        metadata={"mode": "background"},
        behind=(gate or StorageGate()).before,
    )
