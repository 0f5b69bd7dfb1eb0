"""Daemons that call a fake of midjourney-proxy."""

from contextlib import AbstractAsyncContextManager

from tests.fakes.midjourney_api import KEY, MidjourneyAPI
from tests.fakes.server import Call
from tests.support.daemon_harness import DaemonHarness, start_harness

MIDJOURNEY = "midjourney:v7"


def midjourney_environment(api: MidjourneyAPI, **environment: str) -> dict[str, str]:
    """Settings of a daemon that calls the proxy, and these besides."""
    return {
        "MIDJOURNEY_API_URL": api.url,
        "MIDJOURNEY_API_KEY": KEY,
        "IMAGE_JOBS_LEASE": "2",
        "IMAGE_JOBS_POLL_INTERVAL": "0.2",
        **environment,
    }


def midjourney_harness(dsn: str, api: MidjourneyAPI, **environment: str) -> AbstractAsyncContextManager[DaemonHarness]:
    """A daemon that claims, with these settings besides."""
    return start_harness(
        DaemonHarness, dsn, environment=midjourney_environment(api, **environment), processor=MIDJOURNEY
    )


def polls(api: MidjourneyAPI) -> list[Call]:
    """The requests for the state of a provider job."""
    return [call for call in api.requests if call.path.endswith("/fetch")]


def cancels(api: MidjourneyAPI) -> list[str]:
    """The paths of the requests to cancel a provider job."""
    return [call.path for call in api.requests if call.path.endswith("/cancel")]
