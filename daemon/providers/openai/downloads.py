"""Fetch an image that a server with OpenAI's API returned as a URL."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from daemon.errors import Refused, RunError, Undecodable
from daemon.fetch.client import Fetcher, NotAnImage


async def download(
    fetcher: Fetcher,
    url: str,
    to: Path,
    max_bytes: int,
    deadline: timedelta,
    *,
    cost: float | None,
    data: Mapping[str, Any],
) -> None:
    """Fetch an image that is paid for. A failure is final: another attempt would be paid again.

    Args:
        fetcher: Fetches it.
        url: Of the image.
        to: The file.
        max_bytes: Largest image that is accepted.
        deadline: How long it is asked for again.
        cost: USD that it cost.
        data: For the audit trail.

    Raises:
        RunError: If there is none.
    """
    data = {**data, "url": url.partition("?")[0][:2000]}
    try:
        await fetcher.fetch_result(url, to, max_bytes=max_bytes, deadline=deadline)
    except NotAnImage as error:
        raise Undecodable(error.message, error.path, data=data, cost=cost) from error
    except RunError as error:
        raise Refused(
            f"The picture was made, but not handed over. {error.message}",
            code="download",
            hint="Requeueing makes a new one.",
            data=data,
            cost=cost,
            charged=True,
        ) from error
