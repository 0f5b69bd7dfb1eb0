"""Test OpenAI's background mode by itself: the provider, its fake API, and a recorder of its reports."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from daemon.errors import RunError
from daemon.prompt import PromptSpec
from daemon.providers import Generated, Request, Submitted, Traceable, Waiting, create
from daemon.providers.openai.models import MAINLINE
from daemon.settings import Settings
from tests.fakes.openai_api import KEY
from tests.fakes.openai_responses import ResponsesAPI
from tests.support.reporter import Recorder

FLARE = "gpt-image-2.5-flare"
JOB = "resp_known"


@dataclass
class Harness:
    """One provider and its fake API."""

    api: ResponsesAPI
    folder: Path
    recorder: Recorder = field(default_factory=Recorder)

    def __post_init__(self) -> None:
        self.provider = self._create(self.api.base_url)

    def _create(self, url: str, *, key: str = KEY, **settings: Any) -> Traceable:
        made = create("openai", Settings(_env_file=None, OPENAI_API_KEY=key, OPENAI_BASE_URL=url, **settings))
        assert isinstance(made, Traceable)
        return made

    async def set_up(self, url: str | None = None, **settings: Any) -> None:
        """Replace the provider by one with other settings."""
        await self.provider.aclose()
        self.provider = self._create(url or self.api.base_url, **settings)

    def request(self, model: str = FLARE, *, previous: bytes | None = None, **spec: Any) -> Request:
        """Return a request for red foxes. `metadata` stands beside the promptSpec; further arguments belong to it."""
        image = None
        if previous is not None:
            image = self.folder / "previous"
            image.write_bytes(previous)
        metadata = {"mode": "background", **spec.pop("metadata", {})}
        prompt = PromptSpec.parse({"promptSpec": {"basePrompt": "a red fox", **spec}})
        return Request("run_1", model, prompt, self.folder, previous_image=image, metadata=metadata, ticket=7)

    async def submit(self, model: str = FLARE, **options: Any) -> Submitted:
        """Submit a job."""
        made = await self.provider.generate(self.request(model, **options), self.recorder)
        assert isinstance(made, Submitted)
        return made

    async def check(self, job_id: str = JOB, model: str = FLARE) -> Generated | Waiting:
        """Check a job once."""
        return await self.provider.check(job_id, self.request(model), self.recorder)

    async def found(self, **response: Any) -> Generated | Waiting:
        """Check a job whose response is like this."""
        self.api.known(JOB, model=MAINLINE)
        self.api.stages = [response]
        return await self.check()

    async def fail(self, **response: Any) -> RunError:
        """Check a job whose response is like this; return the error."""
        with pytest.raises(RunError) as caught:
            await self.found(**response)
        assert KEY not in str(vars(caught.value))
        return caught.value

    async def fail_to_submit(self, **options: Any) -> RunError:
        """Submit a job in vain; return the error."""
        with pytest.raises(RunError) as caught:
            await self.submit(**options)
        assert KEY not in str(vars(caught.value))
        return caught.value
