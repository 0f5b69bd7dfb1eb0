"""Test OpenAI's Images API by itself: the provider, its fake API, and a recorder of its reports."""

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from daemon.errors import RunError
from daemon.prompt import PromptSpec
from daemon.providers import Generated, Provider, Request, create
from daemon.settings import Settings
from tests.fakes.openai_api import (
    KEY,
    OpenAIAPI,
)
from tests.support.reporter import Recorder

FLARE = "gpt-image-2.5-flare"


def provider(url: str, *, key: str = KEY, **settings: Any) -> Provider:
    made = create("openai", Settings(_env_file=None, OPENAI_API_KEY=key, OPENAI_BASE_URL=url, **settings))
    assert made is not None
    return made


@dataclass
class Harness:
    """One provider and its fake API."""

    api: OpenAIAPI
    provider: Provider
    folder: Path
    recorder: Recorder = field(default_factory=Recorder)

    async def make(self, model: str = FLARE, *, previous: bytes | None = None, **spec: Any) -> Generated:
        """Generate a red fox. Further arguments belong to the promptSpec."""
        image = None
        if previous is not None:
            image = self.folder / "previous"
            image.write_bytes(previous)
        prompt = PromptSpec.parse({"promptSpec": {"basePrompt": "a red fox", **spec}})
        request = Request("run_1", model, prompt, self.folder, previous_image=image)
        made = await self.provider.generate(request, self.recorder)
        assert isinstance(made, Generated)
        return made

    async def set_up(self, url: str | None = None, **settings: Any) -> None:
        """Replace the provider by one with other settings."""
        await self.provider.aclose()
        self.provider = provider(url or self.api.url, **settings)

    async def fail(self, model: str = FLARE, **spec: Any) -> RunError:
        """Generate an image in vain; return the error."""
        with pytest.raises(RunError) as caught:
            await self.make(model, **spec)
        assert KEY not in str(vars(caught.value))
        return caught.value


def picture(kind: str, size: tuple[int, int] = (64, 64)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, "coral").save(file, kind)
    return file.getvalue()


def size_of(image: bytes) -> tuple[int, int]:
    with Image.open(BytesIO(image)) as opened:
        return opened.size
