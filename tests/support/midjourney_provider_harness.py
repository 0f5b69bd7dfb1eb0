"""Test Midjourney by itself: the provider, its fake proxy, and a recorder of its reports."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from daemon.errors import RunError
from daemon.prompt import PromptSpec
from daemon.providers import Deferred, Generated, Request, Submitted, Waiting, create
from daemon.settings import Settings
from tests.fakes.midjourney_api import KEY, MidjourneyAPI
from tests.support.reporter import Recorder

STATE = "run_1:7"
SECRET = "a webhook secret of the tests"
ANON_KEY = "an anon key+"
HOOKED = {
    "SUPABASE_URL": "https://example.supabase.co/",
    "SUPABASE_ANON_KEY": ANON_KEY,
    "WEBHOOK_SECRET_MIDJOURNEY": f"{SECRET},the secret before that one",
}
OURS = "https://example.supabase.co/rest/v1/rpc/webhook_midjourney?apikey="
THEIRS = "https://93.184.215.14/hook?token=theirs"


@dataclass
class Harness:
    """One provider and its fake proxy."""

    api: MidjourneyAPI
    folder: Path
    recorder: Recorder = field(default_factory=Recorder)

    def __post_init__(self) -> None:
        self.provider = self._create(self.api.url)

    def _create(self, url: str, key: str = KEY, **settings: str) -> Deferred:
        made = create(
            "midjourney", Settings(_env_file=None, MIDJOURNEY_API_URL=url, MIDJOURNEY_API_KEY=key, **settings)
        )
        assert isinstance(made, Deferred)
        return made

    async def set_up(self, url: str | None = None, key: str = KEY, **settings: str) -> None:
        """Replace the provider by one with other settings."""
        await self.provider.aclose()
        self.provider = self._create(url or self.api.url, key, **settings)

    def request(
        self,
        model: str = "v7",
        *,
        attempt: int = 1,
        previous: bytes | None = None,
        hook: str | None = None,
        **spec: Any,
    ) -> Request:
        """Return a request for red foxes. Further arguments belong to the promptSpec."""
        image = None
        if previous is not None:
            image = self.folder / "previous"
            image.write_bytes(previous)
        prompt = PromptSpec.parse({"promptSpec": {"basePrompt": "a red fox", **spec}})
        metadata = {} if hook is None else {"webhookUrl": hook}
        return Request("run_1", model, prompt, self.folder, attempt, image, metadata, ticket=7)

    async def submit(self, model: str = "v7", **options: Any) -> Submitted:
        """Submit a job."""
        made = await self.provider.generate(self.request(model, **options), self.recorder)
        assert isinstance(made, Submitted)
        return made

    async def submit_id(self, model: str = "v7", **options: Any) -> str:
        """Submit a job; return its id."""
        return (await self.submit(model, **options)).job_id

    async def check(self, job_id: str) -> Generated | Waiting:
        """Check a job once."""
        return await self.provider.check(job_id, self.request(), self.recorder)

    async def fail(self, **options: Any) -> RunError:
        """Submit a job in vain; return the error."""
        with pytest.raises(RunError) as caught:
            await self.submit_id(**options)
        assert KEY not in str(vars(caught.value))
        return caught.value

    @property
    def line(self) -> str:
        """The prompt of the one job that was submitted."""
        (call,) = self.api.jobs
        return str(call.fields["prompt"])
