"""Generate and refine images with Stability AI. Read this file to write a provider of your own.

A provider is one module in this folder. The daemon finds it by its line `SETTING = …`; no other file has to name it, and
the file's name is the provider's: `stability` in `processor: "stability:ultra"`. In the order in which they stand below:

1. `SETTING`, the environment variable that turns it on. Where `daemon/settings.py` does not declare it, read it in
   `create` (`tests/support/one_file_provider.py` does).
2. `MODELS`, the catalogue. The first one is used where `processor` names no model. Frontends read them in the view
   `image_models`; retired ones name their successor, to which runs are routed.
3. `create(settings)` returns the provider, or None where `SETTING` is not set.
4. The class: `generate` calls the API and writes the image into `request.workdir`. That is all: claims, attempts,
   deadlines, rate limits, cancellation, storage and events are the worker's. An API that takes a job and delivers later
   returns `Submitted(job_id)`, and has `check` and `cancel` too (`Deferred`, see `daemon/providers/__init__.py`). By
   `check_key`, a request that is free, `doctor` proves the key.
5. The request: map `PromptSpec` to the API's fields. Whatever the API cannot do is a warning in the run's events
   (`report.warning`), never silence. `prompts.py` has the mappings that most APIs need.
6. The errors: map the API's errors to `RunError`. `Refused` ends the run, `Retryable` makes another attempt,
   `OutcomeUnknown` may have been paid for. `ErrorMessages` words them as all providers do; what is left is to recognise
   those that have a meaning of their own here.

A provider with an SDK is a package: `google/` has these parts in `__init__.py`, `models.py`, `provider.py`, `request.py`
and `errors.py`, and imports the SDK in `create`.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import IO, Any

import httpx
from pydantic import AliasChoices, Field, SecretStr

from daemon.errors import Refused, RunError
from daemon.http_clients import client
from daemon.prompt import PromptSpec
from daemon.providers import Generated, Model, Provider, Reporter, Request
from daemon.providers.base64_stream import ImageTooLarge
from daemon.providers.body import NotUnderstood, Picture, Unreadable, read_body
from daemon.providers.error_body import ErrorBody, find_reason, read_error
from daemon.providers.errors import TIMED_OUT, TRANSPORT_ERRORS, ErrorMessages, Facts
from daemon.providers.event_stream import Document
from daemon.providers.lenient import Encoded, Lenient, Name, Objects, Text, as_text, as_texts
from daemon.providers.pictures import NotAPicture, save_picture
from daemon.providers.prompts import Warn, content_type, cut, fitting_seed, nearest_ratio, prompt_text
from daemon.providers.salvage import is_failed, salvage
from daemon.providers.sending import Sending
from daemon.providers.spool import Spool, TooMuch
from daemon.providers.waits import retry_after
from daemon.providers.words import readable
from daemon.settings import Settings

# 1. The setting

SETTING = "STABILITY_API_KEY"

# 2. The models, from the vendor's OpenAPI text and its price list. A model that is not listed is sent by its name to the
# endpoint of Stable Diffusion 3.5.

ULTRA = "ultra"
CORE = "core"
RATIOS = ("1:1", "16:9", "21:9", "2:3", "3:2", "4:5", "5:4", "9:16", "9:21")
_SPEC = "api.stability.ai OpenAPI v2beta"
_PRICES = "platform.stability.ai/pricing"
_USD_PER_CREDIT = 0.01
_SD_3 = date(2025, 4, 17)
_SDXL = date(2026, 11, 23)
"""No day was announced; on this one it was found to be no longer on the price list."""


def _current(name: str, credits_: float, *, negative_prompt: bool = True) -> Model:
    return Model(
        name,
        price=round(credits_ * _USD_PER_CREDIT, 4),
        sizes=("1024x1024",),
        ratios=RATIOS,
        seed=True,
        negative_prompt=negative_prompt,
        previous_image=name != CORE,
        source=_PRICES,
    )


def _retired(name: str, since: date, successor: str) -> Model:
    return Model(name, retired=since, successor=successor, source=_SPEC)


MODELS = (
    _current(CORE, 3),  # the first is the default of plain `stability`
    _current(ULTRA, 8),
    _current("sd3.5-large", 6.5),
    _current("sd3.5-large-turbo", 4, negative_prompt=False),
    _current("sd3.5-medium", 3.5),
    _current("sd3.5-flash", 2.5, negative_prompt=False),
    _retired("stable-diffusion-3", _SD_3, "sd3.5-large"),
    _retired("sd3", _SD_3, "sd3.5-large"),
    _retired("sd3-large", _SD_3, "sd3.5-large"),
    _retired("sd3-large-turbo", _SD_3, "sd3.5-large-turbo"),
    _retired("sd3-medium", _SD_3, "sd3.5-medium"),
    _retired("stable-diffusion-xl", _SDXL, CORE),
    _retired("stable-diffusion-xl-1024-v1-0", _SDXL, CORE),
)


def price(model: str) -> float | None:
    """Return the price of one image in USD; None if not known."""
    return next((known.price for known in MODELS if known.name == model), None)


def has_negative_prompt(model: str) -> bool:
    """Return whether a model has the field `negative_prompt`. The distilled models have none."""
    return not model.endswith(("-turbo", "-flash"))


# 3. Its creation


def create(settings: Settings) -> Provider | None:
    """Create the provider; None without `STABILITY_API_KEY`."""
    if settings.stability_api_key is None:
        return None
    return StabilityImages(
        settings.stability_api_key,
        base_url=settings.stability_base_url,
        timeout=settings.run_timeout,
        max_bytes=settings.max_image_bytes,
    )


# 4. The class: a form is sent, and the image that comes back is streamed to disk.

_BASE_URL = "https://api.stability.ai"
_MAX_REQUEST = 10 * 1024 * 1024
_ROOM_FOR_FIELDS = 64 * 1024
_Part = tuple[str | None, str] | tuple[str, IO[bytes], str]


class StabilityImages:
    """Call Stability AI's v2beta API.

    Args:
        api_key: Sent to `base_url` and nowhere else.
        base_url: Another server with the same API; None for Stability AI itself.
        timeout: Longest silence of the server.
        max_bytes: Largest image that is accepted.
    """

    models = MODELS

    def __init__(self, api_key: SecretStr, *, base_url: str | None, timeout: timedelta, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._foreign = base_url is not None and _BASE_URL not in base_url
        self._client = client(
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
        """Close all connections."""
        await self._client.aclose()

    async def check_key(self) -> None:
        """Ask for the account's balance, which is free."""
        try:
            response = await self._client.get("v1/user/balance", headers={"accept": "application/json"})
        except TRANSPORT_ERRORS as error:
            raise STABILITY.transport_error(error) from error
        if response.status_code != 200:
            raise translate(response.status_code, response.headers, response.content, "", foreign=self._foreign)

    async def generate(self, request: Request, report: Reporter) -> Generated:
        """Generate an image, or refine the previous one. Raises `RunError`."""
        call = build(request, report.warning)
        if call.image_bytes > _MAX_REQUEST - _ROOM_FOR_FIELDS:
            raise STABILITY.too_large({"bytes": call.image_bytes})

        def leaving() -> None:
            report.submitted(call.described(), estimate=call.estimate)
            report.progress(5, "Stability AI is drawing")

        sending = Sending(leaving, has_image=call.image is not None)
        with STABILITY.guard(sending):
            try:
                async with self._send(call, sending) as response:
                    sending.came(response.status_code)
                    return await self._receive(response, Spool(request.workdir, max_bytes=self._max_bytes), call)
            except TRANSPORT_ERRORS as error:
                raise STABILITY.transport_error(error, sent=sending.sent) from error

    @asynccontextmanager
    async def _send(self, call: "GenerateCall", sending: Sending) -> AsyncGenerator[httpx.Response]:
        # Parts without a file name, for by `data` alone it would not be the multipart form that the API asks for.
        parts: dict[str, _Part] = {name: (None, value) for name, value in call.fields.items()}
        with ExitStack() as files:
            if call.image is not None:
                extension = call.image_type.removeprefix("image/")
                file = files.enter_context(call.image.open("rb"))
                parts["image"] = (f"image.{extension}", file, call.image_type)
            extensions = {"trace": sending.trace}  # it tells when the request leaves
            async with self._client.stream("POST", call.path, files=parts, extensions=extensions) as response:
                yield response

    async def _receive(self, response: httpx.Response, spool: Spool, call: "GenerateCall") -> Generated:
        if not response.is_success:
            body = await read_error(response.aiter_raw())
            raise translate(response.status_code, response.headers, body, call.model, foreign=self._foreign)
        names = ("x-request-id", "seed")
        facts = {name.removeprefix("x-").replace("-", "_"): response.headers.get(name) for name in names}
        facts = {name: value[:200] for name, value in facts.items() if value is not None}
        if refusal := filtered(response.headers.get("finish-reason"), facts, call.estimate):
            raise refusal
        try:
            async with aclosing(read_body(response.aiter_raw(), spool)) as parts:
                part = await anext(parts, None)
            if isinstance(part, Document):
                return await self._read(part, spool, call, facts)
        except NotUnderstood as error:
            raise STABILITY.unknown("Stability AI's answer is not a picture.", **facts) from error
        except (ImageTooLarge, TooMuch) as error:
            raise STABILITY.too_large_picture(self._max_bytes, facts, cost=call.estimate) from error
        match part:
            case Picture(path):
                return Generated(path, call.estimate, data=facts, seed=call.seed(facts))
            case Unreadable(path):
                raise STABILITY.undecodable(path, facts, cost=call.estimate)
            case None:
                raise STABILITY.empty(facts)

    async def _read(self, part: Document, spool: Spool, call: "GenerateCall", facts: dict[str, str]) -> Generated:
        """Read the image from JSON, in which the API sends it to those that ask for that."""
        value = part.unwrapped()[0].value
        document = ImageDocument.read(value)
        if refusal := filtered(document.finish_reason, facts, call.estimate):
            raise refusal
        own = () if is_failed(value) else (document,)  # one that failed may quote the image that was sent
        image = next((image for image in (*own, *document.artifacts) if image.encoded), None)
        if image is None:
            return await self._salvage(part, document, spool, call, facts)
        if image.seed is not None:
            facts["seed"] = image.seed
        if refusal := filtered(image.finish_reason, facts, call.estimate):
            raise refusal
        try:
            picture = await save_picture(image.encoded or "", spool)
            return Generated(picture, call.estimate, data=facts, seed=call.seed(facts))
        except NotAPicture as error:
            raise STABILITY.undecodable(error.path, facts, cost=call.estimate) from error

    async def _salvage(
        self, part: Document, document: "ImageDocument", spool: Spool, call: "GenerateCall", facts: dict[str, str]
    ) -> Generated:
        """Read the image from a field of another name, as servers with the same API may have it."""
        found = await salvage(part.value, spool)
        if found is not None and found.image is not None:
            return Generated(found.image, call.estimate, data=facts, seed=call.seed(facts))
        if found is not None and found.undecodable is not None:
            raise STABILITY.undecodable(found.undecodable, facts, cost=call.estimate)
        raise failed(document, facts)


class ImageFields(Lenient):
    """An image in JSON, by the names of this version of the API or of the one before."""

    encoded: Encoded = Field(validation_alias=AliasChoices("image", "base64"), default=None)
    finish_reason: Text = Field(validation_alias=AliasChoices("finish_reason", "finishReason"), default=None)
    seed: Name = None


class ImageDocument(ImageFields):
    """A response of JSON: an image, several, or an error."""

    artifacts: Objects[ImageFields] = Field(default_factory=list)
    name: Text = None
    errors: object = None


# 5. The request

_MAX_PROMPT = 10_000
_HIGHEST_SEED = 4_294_967_294
_STRENGTH = "0.6"
"""How far a refined image may go from the previous one: 0 changes nothing, 1 ignores it."""
_EDGE = 1024


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One call of `stable-image/generate`.

    Args:
        model: The model that generates.
        fields: The form, without the image.
        image: The image to refine; None to generate from the prompt alone.
        image_type: Its content type.
    """

    model: str
    fields: Mapping[str, str]
    image: Path | None = None
    image_type: str = ""

    @property
    def path(self) -> str:
        """The path of the endpoint, below the base URL."""
        endpoint = self.model if self.model in (ULTRA, CORE) else "sd3"
        return f"v2beta/stable-image/generate/{endpoint}"

    @property
    def estimate(self) -> float | None:
        """USD, which is what it costs, too; None if not known."""
        return price(self.model)

    @property
    def image_bytes(self) -> int:
        """The size of the image to refine; 0 without one."""
        return 0 if self.image is None else self.image.stat().st_size

    def seed(self, facts: Mapping[str, str]) -> int | None:
        """Return the seed of a response with these `facts`, else the one that was sent; 0 is a random one."""
        used = facts.get("seed") or self.fields.get("seed", "")
        return int(used) or None if used.isdecimal() else None

    def described(self) -> dict[str, Any]:
        """Return the exact request for the audit trail; the image by its type and size."""
        request = {"endpoint": self.path, **self.fields}
        return request if self.image is None else {**request, "image": f"{self.image_type}, {self.image_bytes} bytes"}


def build(request: Request, warn: Warn) -> GenerateCall:
    """Map a run to a call.

    Raises:
        Refused: If there is a previous image that the model cannot take.
    """
    model, prompt, image = request.model, request.prompt, request.previous_image
    negative = has_negative_prompt(model)
    fields = {"prompt": prompt_text(prompt, warn, limit=_MAX_PROMPT, fold=not negative), "output_format": "png"}
    if negative and prompt.negative_prompt:
        fields["negative_prompt"] = cut(prompt.negative_prompt, warn, limit=_MAX_PROMPT, field="negativePrompt")
    if model not in (ULTRA, CORE):
        fields["model"] = model
    fields |= _seed(prompt, model, warn)
    if prompt.quality not in ("standard", "auto"):
        warn(
            f"{model} has no quality {prompt.quality}; stability:{ULTRA} draws finest.",
            field="quality",
            feature="unsupported",
        )
    if image is None:
        return GenerateCall(model, fields | _shape(prompt, model, warn))
    if model == CORE:
        raise Refused(
            f"{CORE} cannot refine a picture.",
            code="invalid_request",
            hint=f"Use stability:{ULTRA} or stability:sd3.5-large, or leave previousImage out.",
        )
    return GenerateCall(model, fields | _refinement(prompt, model, warn), image, content_type(image))


def _seed(prompt: PromptSpec, model: str, warn: Warn) -> dict[str, str]:
    if prompt.seed is None:
        return {}
    if prompt.seed == 0:
        warn(f"Seed 0 means a random one to {model}.", field="seed", feature="unsupported")
    return {"seed": str(fitting_seed(prompt.seed, _HIGHEST_SEED, warn, model=model))}


def _shape(prompt: PromptSpec, model: str, warn: Warn) -> dict[str, str]:
    ratio = nearest_ratio(prompt, RATIOS, warn, model=model)
    if prompt.size not in (None, (_EDGE, _EDGE)):
        width, height = prompt.size or (0, 0)
        warn(
            f"{model} draws ratios, not pixels: it is {ratio} with about a megapixel instead of {width}x{height}.",
            field="size",
            feature="unsupported",
            used=ratio,
        )
    return {"aspect_ratio": ratio}


def _refinement(prompt: PromptSpec, model: str, warn: Warn) -> dict[str, str]:
    """Map the fields of a refined image, which has the shape of the previous one."""
    for field, asked in (("aspectRatio", prompt.aspect_ratio), ("size", prompt.size)):
        if asked not in (None, (_EDGE, _EDGE)):
            warn(f"A refined picture keeps its shape; {field} was ignored.", field=field, feature="ignored")
    return {"strength": _STRENGTH} if model == ULTRA else {"strength": _STRENGTH, "mode": "image-to-image"}


# 6. The errors

STABILITY = ErrorMessages(
    "Stability AI",
    provider="stability",
    key="STABILITY_API_KEY",
    address="STABILITY_BASE_URL",
    account="platform.stability.ai/account",
)
_SHUT_OUT = timedelta(seconds=60)
"""After more than 150 requests in ten seconds, by the documentation; no header says so."""
_MODERATION = "content_moderation"
_FILTERED = "CONTENT_FILTERED"


def translate(status: int, headers: Mapping[str, str], body: bytes, model: str, *, foreign: bool = False) -> RunError:
    """Map an error response to a `RunError`.

    Args:
        status: Its status, any but a success.
        headers, body: The rest of it; `{"id", "name", "errors": […]}` from the API itself.
        model: The model that was called.
        foreign: Whether the server is not Stability AI's, and may have an error object of its own.
    """
    document = ErrorBody.of(body, status)
    error = _by_response(status, headers, document, model, foreign=foreign)
    error.status = status
    return error


def _by_response(
    status: int, headers: Mapping[str, str], document: ErrorBody, model: str, *, foreign: bool
) -> RunError:
    name, errors = as_text(document.fields.get("name")), as_texts(document.fields.get("errors"))
    reason = " ".join(errors) or document.reason
    own = name is not None or bool(document.fields.get("errors") and reason) or (foreign and document.is_foreign)
    request_id = as_text(document.fields.get("id")) or headers.get("x-request-id")
    named = {"status": status, "code": readable(name or "", 100).rstrip("."), "request_id": (request_id or "")[:200]}
    facts = {key: value for key, value in named.items() if value}
    if status in TIMED_OUT:
        return STABILITY.by_status(status, reason, facts, own=own)
    if status == 403 and name == _MODERATION:
        return STABILITY.refused("the prompt", facts, stage="input", categories=[])
    if status == 400 and any(error.startswith("model:") for error in errors):
        return STABILITY.no_model(model, facts)
    if status in (400, 422) and any(error.startswith("image:") for error in errors):
        return STABILITY.bad_image(reason, facts)
    wait = retry_after(headers.get("retry-after")) or (_SHUT_OUT if status == 429 else None)
    return STABILITY.by_status(status, reason, facts, own=own, wait=wait, blocks="provider")


def filtered(finish_reason: str | None, facts: Facts, cost: float | None) -> Refused | None:
    """Return the error for an image that was generated, paid for, and blurred; None if it was not."""
    if finish_reason != _FILTERED:
        return None
    return STABILITY.refused("the picture it had made", facts, stage="output", categories=[], cost=cost)


def failed(document: ImageDocument, facts: Facts) -> RunError:
    """Map a success that is JSON without an image."""
    if document.name == _MODERATION:
        return STABILITY.refused("the prompt", facts, stage="input", categories=[])
    if document.name or document.errors:
        return STABILITY.unavailable(None, find_reason(document.errors) or document.name or "", None, facts)
    return STABILITY.unknown("Stability AI's answer is not a picture.", **facts)
