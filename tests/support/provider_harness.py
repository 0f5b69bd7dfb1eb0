"""Test one provider by itself: the provider, its fake API, and a recorder of its reports."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest

from daemon.errors import RunError
from daemon.prompt import PromptSpec
from daemon.providers import Generated, Provider, Request, create
from daemon.settings import Settings
from tests.fakes.server import FakeAPI
from tests.support.reporter import Recorder

API = TypeVar("API", bound=FakeAPI)


@dataclass
class ProviderHarness(Generic[API]):
    """Generates red foxes with one provider.

    Args:
        name: The provider, as `processor` names it.
        model: The default model.
        key: Its key, which must not be in any error.
        api: The fake.
        folder: The directory of images.
    """

    name: str
    model: str
    key: str
    api: API
    folder: Path
    recorder: Recorder = field(default_factory=Recorder)

    def __post_init__(self) -> None:
        self.provider = self._create(self.api.url)

    def _create(self, url: str, **settings: Any) -> Provider:
        variable = self.name.upper()
        environment = {f"{variable}_API_KEY": self.key, f"{variable}_BASE_URL": url, **settings}
        made = create(self.name, Settings(_env_file=None, **environment))
        assert made is not None
        return made

    async def set_up(self, url: str | None = None, **settings: Any) -> None:
        """Replace the provider by one with other settings."""
        await self.provider.aclose()
        self.provider = self._create(url or self.api.url, **settings)

    async def make(
        self, model: str | None = None, *, previous: bytes | None = None, conversation: Path | None = None, **spec: Any
    ) -> Generated:
        """Generate an image. Further arguments belong to the promptSpec."""
        image = None
        if previous is not None:
            image = self.folder / "previous"
            image.write_bytes(previous)
        prompt = PromptSpec.parse({"promptSpec": {"basePrompt": "a red fox", **spec}})
        request = Request(
            "run_1", model or self.model, prompt, self.folder, previous_image=image, previous_conversation=conversation
        )
        made = await self.provider.generate(request, self.recorder)
        assert isinstance(made, Generated)
        return made

    async def fail(self, model: str | None = None, **spec: Any) -> RunError:
        """Generate an image in vain; return the error."""
        with pytest.raises(RunError) as caught:
            await self.make(model, **spec)
        assert self.key not in str(vars(caught.value))
        return caught.value
