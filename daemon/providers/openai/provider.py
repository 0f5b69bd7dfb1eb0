"""Choose the API by a run's `metadata.mode`: the Images API, or the Responses API in background mode."""

from collections.abc import Sequence
from datetime import timedelta

import httpx2
from openai import AsyncOpenAI
from pydantic import SecretStr

from daemon.fetch.client import Fetcher
from daemon.http_clients import client2
from daemon.providers import Charge, Generated, Model, Reporter, Request, Submitted, Waiting
from daemon.providers.openai.background import OpenAIBackground
from daemon.providers.openai.errors import CALL_ERRORS, translate
from daemon.providers.openai.images import OpenAIImages
from daemon.providers.sending import follow, shorten

BACKGROUND = "background"
"""The `metadata.mode` of runs that are submitted now and checked later."""
_BASE_URL = "https://api.openai.com/v1"
_NO_SCOPE = "Missing scopes"
"""Of OpenAI's sentence for a key that may do other things than this one."""
_LIMITS = httpx2.Limits(max_connections=1000, max_keepalive_connections=100)
"""The SDK's own."""


class OpenAI:
    """Generate images at once by the Images API, or in the background by the Responses API.

    Args:
        api_key: Sent to `base_url` and nowhere else.
        base_url: A compatible server; None for OpenAI itself.
        organization, project: Who pays; None where the key alone says it.
        models: The catalogue of that server; empty if it is not known.
        webhook: Whether the database has a secret to verify OpenAI's webhooks with.
        timeout: Longest silence of the server.
        download_deadline: How long an image is asked for that the server returned as a URL.
        max_bytes: Largest image that is accepted.
    """

    def __init__(
        self,
        api_key: SecretStr,
        *,
        base_url: str | None,
        organization: SecretStr | None,
        project: SecretStr | None,
        models: Sequence[Model],
        webhook: bool,
        timeout: timedelta,
        download_deadline: timedelta,
        max_bytes: int,
    ) -> None:
        self.models = models
        base_url = base_url or _BASE_URL
        self._client = AsyncOpenAI(
            api_key=api_key.get_secret_value().strip(),
            base_url=base_url,
            max_retries=0,  # its retries send no idempotency key: one picture could be paid for three times
            organization=organization.get_secret_value() if organization else None,
            project=project.get_secret_value() if project else None,
            timeout=httpx2.Timeout(timeout.total_seconds(), connect=10, pool=10),
            http_client=client2(
                limits=_LIMITS,
                follow_redirects=False,  # the prompt and the organization would go to wherever it is sent
                headers={"accept-encoding": "identity"},
                event_hooks={"request": [follow], "response": [shorten]},
            ),
        )
        self._fetcher = Fetcher([base_url])
        self._images = OpenAIImages(
            self._client, self._fetcher, download_deadline=download_deadline, max_bytes=max_bytes
        )
        self._background = OpenAIBackground(
            self._client, self._fetcher, webhook=webhook, download_deadline=download_deadline, max_bytes=max_bytes
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.close()
        await self._fetcher.aclose()

    async def check_key(self) -> None:
        """List the models, which is free. A key that is restricted to making images is accepted, too."""
        try:
            await self._client.models.with_raw_response.list()
        except CALL_ERRORS as error:
            refusal = translate(error, "", api="list of models")
            if refusal.code != "permission" or _NO_SCOPE not in refusal.message:
                raise refusal from error

    async def generate(self, request: Request, report: Reporter) -> Generated | Submitted:
        """Generate the image, or submit a job for it. Raises `RunError`."""
        mode = request.metadata.get("mode")
        if mode == BACKGROUND:
            return await self._background.submit(request, report)
        if mode is not None:
            report.warning(f"mode {str(mode)[:40]!r} is unknown; the image is made at once.", field="mode")
        return await self._images.generate(request, report)

    async def check(self, job_id: str, request: Request, report: Reporter) -> Generated | Waiting:  # noqa: ARG002 - there is no progress to report
        """Check a job once."""
        return await self._background.check(job_id, request)

    async def cancel(self, job_id: str) -> Charge | None:
        """Cancel a job. Return what OpenAI says about its charge."""
        return await self._background.cancel(job_id)

    async def owner(self, job_id: str) -> tuple[str, int] | None:
        """Return the run id and ticket that a job was submitted with."""
        return await self._background.owner(job_id)
