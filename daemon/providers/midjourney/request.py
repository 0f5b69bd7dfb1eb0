"""From a prompt to what the proxy takes: one line of text with flags. Whatever is lost on the way is a warning."""

from base64 import b64encode
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

from daemon.errors import Refused
from daemon.prompt import PromptSpec
from daemon.providers import Request
from daemon.providers.mapping import Warn, content_type, cut, fitting_seed, wanted_shape
from daemon.providers.midjourney_answer import MIDJOURNEY
from daemon.providers.midjourney_flags import take_flags
from daemon.providers.midjourney_hook import Hook
from daemon.providers.midjourney_models import is_niji, version_flag

IMAGINE = "mj/submit/imagine"
_MAX_PROMPT = 4_000
_MAX_NEGATIVE = 1_000
_HIGHEST_SEED = 4_294_967_295
_MAX_IMAGE = 10 * 1024 * 1024
"""What Discord takes as an attachment."""


@dataclass(frozen=True, slots=True)
class ImagineCall:
    """One order.

    Args:
        prompt: The line, flags included.
        name: Comes back with the order, and finds it again.
        bot: Which of Midjourney's two bots draws; proxies that know only one ignore it.
        hook: Where its webhooks are to be sent; None for nowhere.
        image: The picture to go by; None for none.
        image_type: Its content type.
    """

    prompt: str
    name: str
    bot: str
    hook: Hook | None = None
    image: Path | None = None
    image_type: str = ""

    def body(self) -> dict[str, Any]:
        """As it is sent. Reads the image."""
        images: list[str] = []
        if self.image is not None:
            images.append(f"data:{self.image_type};base64,{b64encode(self.image.read_bytes()).decode()}")
        if self.hook is None:
            return self._document(images, self.name)
        return {**self._document(images, self.hook.state(self.name)), "notifyHook": self.hook.url}

    def described(self) -> dict[str, Any]:
        """The exact request, for the audit trail; the image by its type and size, and no secret."""
        images = [] if self.image is None else [f"{self.image_type}, {self.image.stat().st_size} bytes"]
        document = {"endpoint": IMAGINE, **self._document(images, self.name)}
        if self.hook is None:
            return document
        return {**document, "state": self.hook.shown_state(self.name), "notifyHook": self.hook.shown}

    def _document(self, images: list[str], state: str) -> dict[str, Any]:
        return {"botType": self.bot, "prompt": self.prompt, "base64Array": images, "state": state}


def name_of(request: Request) -> str:
    """What names a run's order to the proxy. A requeue asks for a new picture, so it is part of the name."""
    return f"{request.run_id}:{request.ticket}"


def build(request: Request, hook: Hook | None, warn: Warn) -> ImagineCall:
    """Maps a run to an order whose webhooks are sent to the hook.

    Raises:
        Refused: If the model cannot be one, nothing is left of the prompt, or the previous image cannot be taken.
    """
    version = version_flag(request.model)
    if version is None:
        raise MIDJOURNEY.no_model(request.model, {})
    prompt = _line(request.prompt, request.model, version, warn)
    bot = "NIJI_JOURNEY" if is_niji(request.model) else "MID_JOURNEY"
    image = request.previous_image
    if image is None:
        return ImagineCall(prompt, name_of(request), bot, hook)
    if (size := image.stat().st_size) > _MAX_IMAGE:
        raise MIDJOURNEY.too_large({"bytes": size})
    kind = content_type(image)
    warn(
        "Midjourney does not edit a picture; it takes the previous one as an example.",
        field="previousImage",
        feature="unsupported",
    )
    return ImagineCall(prompt, name_of(request), bot, hook, image, kind)


def _line(prompt: PromptSpec, model: str, version: str, warn: Warn) -> str:
    """The text, then all flags: Midjourney reads whatever follows a flag as its value."""
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
    width, height = wanted_shape(prompt, warn)
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
