"""OpenAI as one provider: each run says by its `mode` which API makes its picture."""

from collections.abc import Sequence
from datetime import timedelta

import httpx2
from openai import AsyncOpenAI
from pydantic import SecretStr

from daemon.fetch import Fetcher
from daemon.providers import Generated, Model, Reporter, Request, Submitted, Waiting
from daemon.providers.openai_background import OpenAIBackground
from daemon.providers.openai_images import OpenAIImages

BACKGROUND = "background"
"""The `metadata.mode` of runs that are ordered and fetched later."""
_BASE_URL = "https://api.openai.com/v1"


class OpenAI:
    """Draws at once by the Images API, or in the background by the Responses API.

    Args:
        api_key: Sent to `base_url` and nowhere else.
        base_url: A compatible server; None for OpenAI itself.
        models: What that server has on offer, as far as it is known.
        webhook: Whether OpenAI's webhooks are verified here.
        timeout: Longest silence of the server.
        max_bytes: Largest image that is accepted.
    """

    def __init__(
        self,
        api_key: SecretStr,
        *,
        base_url: str | None,
        models: Sequence[Model],
        webhook: bool,
        timeout: timedelta,
        max_bytes: int,
    ) -> None:
        self.models = models
        base_url = base_url or _BASE_URL
        self._client = AsyncOpenAI(
            api_key=api_key.get_secret_value().strip(),
            base_url=base_url,
            max_retries=0,  # its retries send no idempotency key: one picture could be paid for three times
            timeout=httpx2.Timeout(timeout.total_seconds(), connect=10, pool=10),
        )
        self._fetcher = Fetcher([base_url])
        self._images = OpenAIImages(self._client, self._fetcher, max_bytes=max_bytes)
        self._background = OpenAIBackground(self._client, webhook=webhook, max_bytes=max_bytes)

    async def aclose(self) -> None:
        """Lets go of connections."""
        await self._client.close()
        await self._fetcher.aclose()

    async def generate(self, request: Request, report: Reporter) -> Generated | Submitted:
        """Makes the picture, or orders it."""
        mode = request.metadata.get("mode")
        if mode == BACKGROUND:
            return await self._background.order(request, report)
        if mode is not None:
            report.warning(f"mode {str(mode)[:40]!r} is unknown; the image is made at once.", field="mode")
        return await self._images.generate(request, report)

    async def check(self, job_id: str, request: Request, report: Reporter) -> Generated | Waiting:  # noqa: ARG002 - it does not tell how far it is
        """Asks about an order once."""
        return await self._background.check(job_id, request)

    async def cancel(self, job_id: str) -> None:
        """Has an order stopped."""
        await self._background.cancel(job_id)

    async def owner(self, job_id: str) -> tuple[str, int] | None:
        """The run and the ticket that an order was made for."""
        return await self._background.owner(job_id)
