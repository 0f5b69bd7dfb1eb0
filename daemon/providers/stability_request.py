"""From a prompt to the form that Stability AI takes. Whatever is lost on the way is a warning."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.errors import Refused
from daemon.prompt import PromptSpec
from daemon.providers import Request
from daemon.providers.mapping import Warn, content_type, cut, fitting_seed, nearest_ratio, whole_text
from daemon.providers.stability_models import CORE, RATIOS, ULTRA, has_negative_prompt, price

_MAX_PROMPT = 10_000
_HIGHEST_SEED = 4_294_967_294
_STRENGTH = "0.6"
"""How far a refined picture may go from the one before it: 0 changes nothing, 1 forgets it."""
_EDGE = 1024


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One call of `stable-image/generate`.

    Args:
        model: The model that is asked.
        fields: What is sent, without the image.
        image: The picture to refine; None to make one from nothing.
        image_type: Its content type.
    """

    model: str
    fields: Mapping[str, str]
    image: Path | None = None
    image_type: str = ""

    @property
    def path(self) -> str:
        """Where it goes, below the base URL."""
        endpoint = self.model if self.model in (ULTRA, CORE) else "sd3"
        return f"v2beta/stable-image/generate/{endpoint}"

    @property
    def estimate(self) -> float | None:
        """USD, which is what it costs, too; None if not known."""
        return price(self.model)

    @property
    def image_bytes(self) -> int:
        """How large the picture to refine is."""
        return 0 if self.image is None else self.image.stat().st_size

    def described(self) -> dict[str, Any]:
        """The exact request, for the audit trail; the image by its type and size."""
        request = {"endpoint": self.path, **self.fields}
        return request if self.image is None else {**request, "image": f"{self.image_type}, {self.image_bytes} bytes"}


def build(request: Request, warn: Warn) -> GenerateCall:
    """Maps a run to a call.

    Raises:
        Refused: If there is a previous image that the model cannot take.
    """
    model, prompt, image = request.model, request.prompt, request.previous_image
    negative = has_negative_prompt(model)
    fields = {"prompt": whole_text(prompt, warn, limit=_MAX_PROMPT, fold=not negative), "output_format": "png"}
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
    return GenerateCall(model, fields | _refining(prompt, model, warn), image, content_type(image))


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


def _refining(prompt: PromptSpec, model: str, warn: Warn) -> dict[str, str]:
    """The new picture has the shape of the one before it."""
    for field, asked in (("aspectRatio", prompt.aspect_ratio), ("size", prompt.size)):
        if asked not in (None, (_EDGE, _EDGE)):
            warn(f"A refined picture keeps its shape; {field} was ignored.", field=field, feature="ignored")
    return {"strength": _STRENGTH} if model == ULTRA else {"strength": _STRENGTH, "mode": "image-to-image"}
