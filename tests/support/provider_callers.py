"""All providers that call a server, at one that sends what it is told to."""

import base64
import gzip
from pathlib import Path
from typing import Any

from daemon.errors import RunError
from daemon.prompt import PromptSpec
from daemon.providers import Provider, Request, create
from daemon.settings import Settings
from tests.fakes.server import Call, FakeAPI, Response, picture
from tests.support.reporter import Recorder

PNG = picture() + b"\0"  # its base64 ends with padding
B64 = base64.b64encode(PNG).decode()
MODELS = {"openai": "gpt-image-2", "google": "gemini-3-pro-image", "stability": "core", "midjourney": "v7"}


class AnyAPI(FakeAPI):
    """Sends what it is told to, and pictures at every address."""

    def refusal(self, call: Call) -> Response | None:
        return Response(200, gzip.compress(PNG)) if call.method == "GET" and call.path == "/picture" else None

    def respond(self, call: Call) -> Response:
        return Response(500)


class Callers:
    """The four providers, at one server."""

    def __init__(self, api: AnyAPI, folder: Path) -> None:
        self.api = api
        self.folder = folder
        common = {"_env_file": None, "IMAGE_JOBS_POLL_TIMEOUT": "0.1"}
        urls = {f"{name.upper()}_BASE_URL": api.url for name in MODELS} | {"MIDJOURNEY_API_URL": api.url}
        keys = {f"{name.upper()}_API_KEY": "key" for name in MODELS}
        found = {name: create(name, Settings(**{**common, **urls, **keys})) for name in MODELS}
        self.providers: dict[str, Provider] = {name: made for name, made in found.items() if made is not None}

    async def call(self, name: str, *responses: Response, check: bool = False, **metadata: Any) -> Any:
        """Return what a provider makes of responses, or its error. It reports exactly one request, unless it checks a job."""
        for path in self.folder.iterdir():
            path.unlink()
        self.api.reset()
        self.api.next(*responses)
        prompt = PromptSpec.parse({"promptSpec": {"basePrompt": "a red fox"}})
        request = Request("run_1", MODELS[name], prompt, self.folder, metadata=metadata)
        recorder = Recorder()
        provider: Any = self.providers[name]
        try:
            made = await (provider.check("1", request, recorder) if check else provider.generate(request, recorder))
        except RunError as error:
            made = error
        assert len(recorder.requests) == (0 if check else 1)
        assert sum(call.method == "POST" for call in self.api.requests) <= 2
        return made
