"""Google's Gemini API on loopback, as far as `generateContent` with image models: the recorded shapes.

It refuses what the real one refuses: unknown fields, ratios and sizes that a model does not have, seeds beyond 32 bits,
pictures of the wrong type, models that are gone, a wrong key, and a model's turn with another signature than it had given
with that picture.
"""

import base64
import binascii
import re
from io import BytesIO
from math import sqrt
from typing import Any

from PIL import Image, UnidentifiedImageError

from tests.fakes.server import Call, FakeAPI, Response, picture

KEY = "AIza-key-of-the-tests"
THOUGHT = b"what the model thought\xfb\xff" * 100
SIGNATURE = base64.b64encode(THOUGHT).decode()
RATIOS = {"1:1", "2:3", "3:2", "3:4", "4:3", "4:5", "5:4", "9:16", "16:9", "21:9"}
MORE_RATIOS = {*RATIOS, "1:4", "4:1", "1:8", "8:1"}
LIVE = {
    "gemini-nano-banana-2.1": (MORE_RATIOS, {"1K", "2K", "4K"}),
    "gemini-3-pro-image": (RATIOS, {"1K", "2K", "4K"}),
    "gemini-3.1-flash-image": (MORE_RATIOS, {"512", "1K", "2K", "4K"}),
    "gemini-3.1-flash-lite-image": (MORE_RATIOS, {"1K"}),
    "gemini-2.5-flash-image": (RATIOS, set()),
}
TOKENS = 1120
_PATH = re.compile(r"/v1/models/([^/:]+):generateContent")
_EDGES = {"512": 512, "1K": 1024, "2K": 2048, "4K": 4096}
_TYPES = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}


class GoogleAPI(FakeAPI):
    """The server. Without `usage` it counts nothing; `drawn` is the picture it gives instead of one of its own; `thought`
    is what it signs each with, None for no signature; `says` comes before the picture."""

    def reset(self) -> None:
        super().reset()
        self.usage = True
        self.drawn: bytes | None = None
        self.thought: bytes | None = THOUGHT
        self.says: str | None = None
        self.forgetful = False
        """Knows none of its signatures any more."""
        self._signed: set[tuple[str, bytes, bytes | None]] = set()

    def roles(self) -> list[str]:
        """Whose turns were in the last request."""
        return [content["role"] for content in self.requests[-1].fields["contents"]]

    def refusal(self, call: Call) -> Response | None:
        if call.headers.get("x-goog-api-key") != KEY:
            return error(
                400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.", reason("API_KEY_INVALID")
            )
        if (call.method, call.path) == ("GET", "/v1/models"):
            return None
        path = _PATH.fullmatch(call.path)
        if call.method != "POST" or path is None:
            return Response(404, b"<html>Not Found</html>", {"content-type": "text/html"})
        if path[1] not in LIVE:
            return error(404, "NOT_FOUND", f"models/{path[1]} is not found for API version v1, or is not supported.")
        wrong = _wrong(call.fields, *LIVE[path[1]]) or self._misremembered(path[1], call.fields["contents"])
        return error(400, "INVALID_ARGUMENT", wrong) if wrong else None

    def _misremembered(self, model: str, contents: list[dict[str, Any]]) -> str | None:
        """Return the fault of the conversation; None if there is none."""
        if [content["role"] for content in contents] not in (["user"], ["user", "model", "user"]):
            return "Please ensure that multiturn requests alternate between user and model."
        for part in contents[1]["parts"] if len(contents) > 1 else ():
            if (data := part.get("inlineData")) is None:
                continue
            image, signature = decoded(data["data"]), part.get("thoughtSignature")
            if self.forgetful or (model, image, decoded(signature) if signature else None) not in self._signed:
                return "Thought signature is not valid."
        return None

    def respond(self, call: Call) -> Response:
        if call.method == "GET":
            return Response.json(200, {"models": [{"name": f"models/{name}"} for name in LIVE]})
        image = self.drawn if self.drawn is not None else picture(_pixels(call.fields["generationConfig"]))
        model = call.path.rpartition("/")[2].partition(":")[0]
        self._signed.add((model, image, self.thought))
        signed = {} if self.thought is None else {"thoughtSignature": encoded(self.thought)}
        return answered(
            {"text": "Let me see.", "thought": True},
            {"inlineData": {"mimeType": "image/png", "data": encoded(picture())}, "thought": True},
            *([{"text": self.says}] if self.says is not None else []),
            {"inlineData": {"mimeType": "image/png", "data": encoded(image)}, **signed},
            usage=TOKENS if self.usage else None,
        )


def answered(
    *parts: dict[str, Any], finish: str | None = "STOP", usage: int | None = None, **candidate: Any
) -> Response:
    """An answer with one candidate; without parts it has no content either. `usage` counts its image tokens."""
    content = {"content": {"parts": list(parts), "role": "model"}} if parts else {}
    document: dict[str, Any] = {
        "candidates": [{**content, "finishReason": finish, "index": 0, **candidate}],
        "modelVersion": "as asked",
        "responseId": "response-1",
    }
    if usage is not None:
        details = [{"modality": "IMAGE", "tokenCount": usage}]
        document["usageMetadata"] = {
            "promptTokenCount": 9,
            "candidatesTokenCount": usage + 12,
            "totalTokenCount": usage + 21,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 9}],
            "candidatesTokensDetails": details,
        }
    return Response.json(200, document)


def blocked(why: str, *categories: str) -> Response:
    """Return the response to a refused prompt: status 200 and no candidates."""
    ratings = [{"category": name, "probability": "HIGH", "blocked": True} for name in categories]
    feedback = {"blockReason": why, **({"safetyRatings": ratings} if ratings else {})}
    return Response.json(200, {"promptFeedback": feedback, "usageMetadata": {"promptTokenCount": 9}})


def error(status: int, name: str, message: str, *details: dict[str, Any], **headers: str) -> Response:
    """An error as the API writes it."""
    body = {"code": status, "message": message, "status": name, **({"details": list(details)} if details else {})}
    return Response.json(status, {"error": body}, **headers)


def reason(word: str) -> dict[str, Any]:
    """The detail that names the reason."""
    return {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": word, "domain": "googleapis.com"}


def retry_in(delay: str) -> dict[str, Any]:
    """The detail that says when to come back."""
    return {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}


def quota(name: str) -> dict[str, Any]:
    """The detail that says which quota is used up."""
    violation = {"quotaMetric": "generativelanguage.googleapis.com/generate_requests", "quotaId": name}
    return {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [violation]}


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def decoded(text: str) -> bytes:
    """Bytes as the SDK writes them, or as the API does."""
    return base64.urlsafe_b64decode(text.replace("+", "-").replace("/", "_"))


def _wrong(fields: dict[str, Any], ratios: set[str], sizes: set[str]) -> str | None:
    config = fields.get("generationConfig", {})
    image = config.get("imageConfig", {})
    known = (
        (fields, {"contents", "generationConfig"}),
        (config, {"candidateCount", "seed", "responseModalities", "imageConfig"}),
        (image, {"aspectRatio", "imageSize"}),
    )
    for given, names in known:
        if unknown := sorted(set(given) - names):
            return f'Invalid JSON payload received. Unknown name "{unknown[0]}": Cannot find field.'
    if "IMAGE" not in config.get("responseModalities", ["TEXT"]):
        return "The requested combination of response modalities is not supported."
    if image.get("aspectRatio", "1:1") not in ratios:
        return f"aspect_ratio must be one of {sorted(ratios)}."
    if "imageSize" in image and image["imageSize"] not in sizes:
        return "image_size is not supported by this model."
    if not -(2**31) <= config.get("seed", 0) < 2**31:
        return "Invalid value at 'generation_config.seed' (TYPE_INT32)."
    parts = [part for content in fields.get("contents", []) for part in content["parts"]]
    return next(
        (wrong for part in parts if (wrong := _wrong_part(part))), None if parts else "contents is not specified."
    )


def _wrong_part(part: dict[str, Any]) -> str | None:
    if unknown := sorted(set(part) - {"text", "inlineData", "thoughtSignature"}):
        return f'Invalid JSON payload received. Unknown name "{unknown[0]}": Cannot find field.'
    if "inlineData" not in part:
        return None
    kind = part["inlineData"].get("mime_type") or part["inlineData"].get("mimeType")
    if kind not in _TYPES:
        return f"Unsupported MIME type: {kind}"
    try:
        with Image.open(BytesIO(decoded(part["inlineData"]["data"]))) as image:
            return None if image.format == _TYPES[kind] else "Unable to process input image."
    except (binascii.Error, UnidentifiedImageError):
        return "Unable to process input image."


def _pixels(config: dict[str, Any]) -> tuple[int, int]:
    image = config["imageConfig"]
    width, height = (int(number) for number in image["aspectRatio"].split(":"))
    edge = _EDGES[image.get("imageSize", "1K")]
    return round(edge * sqrt(width / height)), round(edge * sqrt(height / width))
