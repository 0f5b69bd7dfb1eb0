"""Map a prompt to a line of text with flags. A value that is changed or lost is a warning."""

from base64 import b64encode
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

from daemon.errors import Refused
from daemon.prompt import PromptSpec
from daemon.providers import Request
from daemon.providers.midjourney.flags import take_flags
from daemon.providers.midjourney.models import is_niji, version_flag
from daemon.providers.midjourney.response import MIDJOURNEY
from daemon.providers.midjourney.webhook import Webhook
from daemon.providers.prompts import Warn, content_type, cut, fitting_seed, requested_shape

IMAGINE = "mj/submit/imagine"
_MAX_PROMPT = 4_000
_MAX_NEGATIVE = 1_000
_HIGHEST_SEED = 4_294_967_295
_MAX_IMAGE = 10 * 1024 * 1024
"""Bytes that Discord takes as an attachment."""


@dataclass(frozen=True, slots=True)
class ImagineCall:
    """One call of `submit/imagine`.

    Args:
        prompt: The line, flags included.
        name: Comes back in the job's `state`, by which the job is found again.
        bot: Which of Midjourney's two bots draws; proxies that know only one ignore it.
        webhook: The address for its webhooks; None for none.
        image: The image to take as an example; None for none.
        image_type: Its content type.
    """

    prompt: str
    name: str
    bot: str
    webhook: Webhook | None = None
    image: Path | None = None
    image_type: str = ""

    def body(self) -> dict[str, Any]:
        """Return the JSON to send. Reads the image."""
        images: list[str] = []
        if self.image is not None:
            images.append(f"data:{self.image_type};base64,{b64encode(self.image.read_bytes()).decode()}")
        if self.webhook is None:
            return self._document(images, self.name)
        return {**self._document(images, self.webhook.state(self.name)), "notifyHook": self.webhook.url}

    def described(self) -> dict[str, Any]:
        """Return the exact request for the audit trail; the image by its type and size, and no secret."""
        images = [] if self.image is None else [f"{self.image_type}, {self.image.stat().st_size} bytes"]
        document = {"endpoint": IMAGINE, **self._document(images, self.name)}
        if self.webhook is None:
            return document
        return {**document, "state": self.webhook.shown_state(self.name), "notifyHook": self.webhook.shown}

    def _document(self, images: list[str], state: str) -> dict[str, Any]:
        return {"botType": self.bot, "prompt": self.prompt, "base64Array": images, "state": state}


def job_name(request: Request) -> str:
    """Return the name of a run's job. The ticket is part of it, as a requeue submits a new job."""
    return f"{request.run_id}:{request.ticket}"


def build(request: Request, webhook: Webhook | None, warn: Warn) -> ImagineCall:
    """Map a run to a call whose webhooks are sent to `webhook`.

    Raises:
        Refused: If the model is no version, nothing is left of the prompt, or the previous image is too large or no image.
    """
    version = version_flag(request.model)
    if version is None:
        raise MIDJOURNEY.no_model(request.model, {})
    prompt = _line(request.prompt, request.model, version, warn)
    bot = "NIJI_JOURNEY" if is_niji(request.model) else "MID_JOURNEY"
    image = request.previous_image
    if image is None:
        return ImagineCall(prompt, job_name(request), bot, webhook)
    if (size := image.stat().st_size) > _MAX_IMAGE:
        raise MIDJOURNEY.too_large({"bytes": size})
    kind = content_type(image)
    warn(
        "Midjourney does not edit a picture; it takes the previous one as an example.",
        field="previousImage",
        feature="unsupported",
    )
    return ImagineCall(prompt, job_name(request), bot, webhook, image, kind)


def seed_of(prompt: PromptSpec) -> int | None:
    """Return the seed that is sent; None where Midjourney takes a random one."""
    return None if prompt.seed is None else prompt.seed % (_HIGHEST_SEED + 1)


def _line(prompt: PromptSpec, model: str, version: str, warn: Warn) -> str:
    """Join the text and all flags, in this order: Midjourney reads the text after a flag as its value."""
    texts: list[str] = []
    flags: dict[str, str] = {}
    for field, part in (
        ("basePrompt", prompt.base_prompt),
        *(("styleModifiers", word) for word in prompt.style_modifiers),
    ):
        text, passed = take_flags(part, warn, field=field)
        texts.append(text)
        flags |= passed
    text = cut(", ".join(filter(None, texts)), warn, limit=_MAX_PROMPT, field="basePrompt")
    if not text:
        raise Refused(
            "Nothing is left of the prompt without its flags.",
            code="invalid_request",
            hint="Say in basePrompt what is to be seen: flags alone draw nothing. Then requeue.",
        )
    if (ratio := _ratio(prompt, warn)) != (1, 1):
        flags["ar"] = f"--ar {ratio[0]}:{ratio[1]}"
    if prompt.seed is not None:
        flags["seed"] = f"--seed {fitting_seed(prompt.seed, _HIGHEST_SEED, warn, model=model)}"
    if prompt.quality not in ("standard", "auto"):
        warn(f"{model} has no quality {prompt.quality}.", field="quality", feature="unsupported")
    if prompt.negative_prompt:
        avoid, _ = take_flags(prompt.negative_prompt, warn, field="negativePrompt", allow=False)
        if avoid:
            flags["no"] = f"--no {cut(avoid, warn, limit=_MAX_NEGATIVE, field='negativePrompt')}"
    return " ".join((text, *flags.values(), version))


def _ratio(prompt: PromptSpec, warn: Warn) -> tuple[int, int]:
    width, height = requested_shape(prompt, warn)
    divisor = gcd(width, height)
    ratio = width // divisor, height // divisor
    if prompt.size not in (None, (1024, 1024)):
        warn(
            f"Midjourney draws ratios, not pixels: it is {ratio[0]}:{ratio[1]} instead of "
            f"{prompt.size[0]}x{prompt.size[1]}.",
            field="size",
            feature="unsupported",
            used=f"{ratio[0]}:{ratio[1]}",
        )
    return ratio
