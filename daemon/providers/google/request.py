"""Map a prompt to a call of `generateContent`. A value that is changed or lost is a warning."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.prompt import MAX_PROMPT, PromptSpec
from daemon.providers import Request
from daemon.providers.google.conversation import Conversation, ConversationPart
from daemon.providers.google.models import EDGES, USUAL_SIZE, estimate, offered, size_for
from daemon.providers.prompts import Warn, content_type, fitting_seed, nearest_ratio, prompt_text
from daemon.providers.words import readable

_HIGHEST_SEED = 2**31 - 1


@dataclass(frozen=True, slots=True)
class ContentCall:
    """One call of `generateContent`.

    Args:
        model: The model that generates.
        text: The prompt.
        ratio: For example `16:9`.
        size: `1K`, `2K` or `4K`.
        seed: None for a random one.
        image: The image to refine; None to generate from the prompt alone.
        image_type: Its content type.
    """

    model: str
    text: str
    ratio: str
    size: str
    seed: int | None
    image: Path | None = None
    image_type: str = ""

    @property
    def estimate(self) -> float | None:
        """USD; None if not known."""
        return estimate(self.model, self.size)

    @property
    def image_bytes(self) -> int:
        """The size of the image to refine; 0 without one."""
        return 0 if self.image is None else self.image.stat().st_size

    def config(self) -> dict[str, Any]:
        """Return the fields of `generationConfig`."""
        image: dict[str, Any] = {"aspectRatio": self.ratio}
        if self.size != USUAL_SIZE:  # some models do not know the field
            image["imageSize"] = self.size
        config: dict[str, Any] = {"responseModalities": ["IMAGE"], "imageConfig": image}
        return config if self.seed is None else {**config, "seed": self.seed}

    def described(self, previous: Conversation | None = None) -> dict[str, Any]:
        """Return the exact request for the audit trail; the image by its type and size, signatures by theirs."""
        image = {"inlineData": f"{self.image_type}, {self.image_bytes} bytes"}
        contents: list[dict[str, Any]] = []
        parts: list[dict[str, Any]] = [{"text": self.text}]
        if previous is not None:
            response = [_described(part, image) for part in previous.response]
            contents += [{"parts": [{"text": previous.prompt}], "role": "user"}, {"parts": response, "role": "model"}]
        elif self.image is not None:
            parts.append(image)
        contents.append({"parts": parts, "role": "user"})
        return {"model": self.model, "contents": contents, "generationConfig": self.config()}


def _described(part: ConversationPart, image: dict[str, Any]) -> dict[str, Any]:
    shown = image if part.text is None else {"text": readable(part.text)}
    return shown if part.signature is None else {**shown, "thoughtSignature": f"{len(part.signature)} bytes"}


def build(request: Request, warn: Warn) -> ContentCall:
    """Map a run to a call.

    Raises:
        Refused: If the previous image is of a type that cannot be refined.
    """
    prompt = request.prompt
    sizes, ratios = offered(request.model)
    text = prompt_text(prompt, warn, limit=MAX_PROMPT, fold=True)
    ratio = nearest_ratio(prompt, ratios, warn, model=request.model)
    size = _size(prompt, sizes, ratio, request.model, warn)
    seed = prompt.seed
    if seed is not None:
        seed = fitting_seed(seed, _HIGHEST_SEED, warn, model=request.model)
        warn("The seed is used, but the same seed may give another picture.", field="seed", feature="best effort")
    image = request.previous_image
    return ContentCall(request.model, text, ratio, size, seed, image, content_type(image) if image else "")


def _size(prompt: PromptSpec, sizes: tuple[str, ...], ratio: str, model: str, warn: Warn) -> str:
    size = size_for(max(prompt.size or (0,)), prompt.quality, sizes)
    _check_quality(prompt, size, model, warn)
    edge = EDGES[size]
    if prompt.size is not None and (ratio != "1:1" or prompt.size != (edge, edge)):
        warn(
            f"{model} draws ratios, not pixels: it is {ratio} at {size} instead of {prompt.size[0]}x{prompt.size[1]}.",
            field="size",
            feature="unsupported",
            used=f"{ratio} {size}",
        )
    return size


def _check_quality(prompt: PromptSpec, size: str, model: str, warn: Warn) -> None:
    """Warn of a quality that has no effect: a finer one is a larger image, and there is no other scale."""
    if prompt.quality in ("standard", "auto") or (prompt.quality == "hd" and size != USUAL_SIZE):
        return
    warn(
        f"{model} has no quality {prompt.quality}; it draws at {size}.",
        field="quality",
        feature="unsupported",
        used=size,
    )
