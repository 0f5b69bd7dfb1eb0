"""One provider, the fake it talks to, and what it reports: what it takes to test a provider by itself."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest

from daemon.errors import RunError
from daemon.prompt import PromptSpec
from daemon.providers import Generated, Provider, Request, create
from daemon.settings import Settings
from tests.fakes.reporter import Recorder
from tests.fakes.server import FakeAPI

API = TypeVar("API", bound=FakeAPI)


@dataclass
class ProviderStudio(Generic[API]):
    """Draws red foxes.

    Args:
        name: The provider, as `processor` names it.
        model: Asked where none is named.
        key: Its key, which must not be in any error.
        api: The fake.
        folder: Where pictures lie.
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
        """Goes on with a provider that is set up in another way."""
        await self.provider.aclose()
        self.provider = self._create(url or self.api.url, **settings)

    async def make(
        self, model: str | None = None, *, previous: bytes | None = None, context: Path | None = None, **spec: Any
    ) -> Generated:
        """Draws; whatever else is named belongs to the promptSpec."""
        image = None
        if previous is not None:
            image = self.folder / "previous"
            image.write_bytes(previous)
        prompt = PromptSpec.parse({"promptSpec": {"basePrompt": "a red fox", **spec}})
        request = Request(
            "run_1", model or self.model, prompt, self.folder, previous_image=image, previous_context=context
        )
        made = await self.provider.generate(request, self.recorder)
        assert isinstance(made, Generated)
        return made

    async def fail(self, model: str | None = None, **spec: Any) -> RunError:
        """Gives the error."""
        with pytest.raises(RunError) as caught:
            await self.make(model, **spec)
        assert self.key not in str(vars(caught.value))
        return caught.value
