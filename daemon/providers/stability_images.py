"""Stability AI's v2beta API: a form goes out, a picture comes back as it is and is streamed to disk."""

from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO

import httpx
from pydantic import SecretStr

from daemon.providers import Generated, Reporter, Request
from daemon.providers.stability_errors import STABILITY, filtered, translate
from daemon.providers.stability_models import MODELS
from daemon.providers.stability_request import GenerateCall, build
from daemon.providers.vendor import BROKEN

_BASE_URL = "https://api.stability.ai"
_MAX_REQUEST = 10 * 1024 * 1024
_ROOM_FOR_FIELDS = 64 * 1024
_MAX_ERROR = 64 * 1024
_Part = tuple[str | None, str] | tuple[str, IO[bytes], str]


class StabilityImages:
    """Makes and refines pictures with Stability AI.

    Args:
        api_key: Sent to `base_url` and nowhere else.
        base_url: Another server that speaks this API; None for Stability AI itself.
        timeout: Longest silence of the server.
        max_bytes: Largest image that is accepted.
    """

    models = MODELS

    def __init__(self, api_key: SecretStr, *, base_url: str | None, timeout: timedelta, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._client = httpx.AsyncClient(
            base_url=base_url or _BASE_URL,
            headers={
                "authorization": f"Bearer {api_key.get_secret_value().strip()}",
                "accept": "image/*",
                "accept-encoding": "identity",
            },
            timeout=httpx.Timeout(timeout.total_seconds(), connect=10, pool=10),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        )

    async def aclose(self) -> None:
        """Lets go of connections."""
        await self._client.aclose()

    async def generate(self, request: Request, report: Reporter) -> Generated:
        """Makes the picture, or refines the previous one."""
        call = build(request, report.warning)
        if call.image_bytes > _MAX_REQUEST - _ROOM_FOR_FIELDS:
            raise STABILITY.too_large({"bytes": call.image_bytes})
        report.submitted(call.described(), estimate=call.estimate)
        report.progress(5, "Stability AI is drawing")
        try:
            async with self._send(call) as response:
                return await self._receive(response, request.workdir / "image", call)
        except BROKEN as error:
            raise STABILITY.broken(error) from error

    @asynccontextmanager
    async def _send(self, call: GenerateCall) -> AsyncGenerator[httpx.Response]:
        # Parts without a file name, for by `data` alone it would not be the multipart form that the API asks for.
        parts: dict[str, _Part] = {name: (None, value) for name, value in call.fields.items()}
        with ExitStack() as files:
            if call.image is not None:
                extension = call.image_type.removeprefix("image/")
                file = files.enter_context(call.image.open("rb"))
                parts["image"] = (f"image.{extension}", file, call.image_type)
            async with self._client.stream("POST", call.path, files=parts) as response:
                yield response

    async def _receive(self, response: httpx.Response, path: Path, call: GenerateCall) -> Generated:
        if response.status_code != 200:
            raise translate(response.status_code, response.headers, await _beginning(response), call.model)
        names = ("x-request-id", "seed")
        facts = {name.removeprefix("x-").replace("-", "_"): response.headers.get(name) for name in names}
        facts = {name: value for name, value in facts.items() if value is not None}
        if refusal := filtered(response.headers, facts, call.estimate):
            raise refusal
        if not response.headers.get("content-type", "").startswith("image/"):
            raise STABILITY.unknown("Stability AI's answer is not a picture.", **facts)
        size = 0
        with path.open("wb") as file:
            async for chunk in response.aiter_bytes():
                size += len(chunk)
                if size > self._max_bytes:
                    raise STABILITY.unknown(
                        f"Stability AI's picture is larger than {self._max_bytes:,} bytes.", **facts
                    )
                file.write(chunk)
        if size == 0:
            raise STABILITY.empty(facts)
        return Generated(path, call.estimate, data=facts)


async def _beginning(response: httpx.Response) -> bytes:
    """As much of an error as is worth reading."""
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > _MAX_ERROR:
            break
    return bytes(body[:_MAX_ERROR])
