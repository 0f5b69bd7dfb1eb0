"""Stability AI's `stable-image/generate` on loopback: forms in, pictures out.

It refuses what the real one refuses: anything but a multipart form, fields an endpoint does not have, ratios and seeds
out of range, a previous image without a strength, requests above 10 MiB, a wrong key.
"""

from io import BytesIO

from PIL import Image, UnidentifiedImageError

from tests.fakes.server import Call, FakeAPI, Response, picture

KEY = "sk-stability-key-of-the-tests"
RATIOS = {"16:9", "1:1", "21:9", "2:3", "3:2", "4:5", "5:4", "9:16", "9:21"}
_COMMON = {"prompt", "negative_prompt", "aspect_ratio", "seed", "output_format", "style_preset"}
FIELDS = {
    "ultra": {*_COMMON, "image", "strength"},
    "core": _COMMON,
    "sd3": {*_COMMON, "image", "strength", "mode", "model", "cfg_scale"},
}
MODELS = {"sd3.5-large", "sd3.5-large-turbo", "sd3.5-medium", "sd3.5-flash"}
_FORMATS = {"core": {"png", "jpeg", "webp"}, "ultra": {"png", "jpeg", "webp"}, "sd3": {"png", "jpeg"}}
_PATH = "/v2beta/stable-image/generate/"
_SIZES = {"1:1": (1024, 1024), "16:9": (1344, 768)}


class StabilityAPI(FakeAPI):
    """The server. `drawn` is the picture it gives instead of one of its own."""

    def reset(self) -> None:
        super().reset()
        self.drawn: bytes | None = None

    def refusal(self, call: Call) -> Response | None:
        if call.headers.get("authorization") != f"Bearer {KEY}":
            return error(401, "unauthorized", "authorization: invalid or missing header value")
        if (call.method, call.path) == ("GET", "/v1/user/balance"):
            return None
        endpoint = call.path.removeprefix(_PATH)
        if call.method != "POST" or endpoint not in FIELDS:
            return error(404, "not_found", "The resource could not be found")
        if int(call.headers.get("content-length", 0)) > 10 * 1024 * 1024:
            return error(413, "payload_too_large", "request: body exceeds 10MiB")
        wrong = _wrong(endpoint, call)
        return error(400, "bad_request", wrong) if wrong else None

    def respond(self, call: Call) -> Response:
        if call.method == "GET":
            return Response.json(200, {"credits": 12.5})
        image = self.drawn if self.drawn is not None else picture(_SIZES.get(call.fields.get("aspect_ratio"), (96, 64)))
        return drawn(image, seed=call.fields.get("seed", "343940597"))


def drawn(
    image: bytes, *, finish_reason: str = "SUCCESS", seed: str = "343940597", kind: str = "image/png"
) -> Response:
    """A picture, with what its headers tell."""
    headers = {"content-type": kind, "finish-reason": finish_reason, "seed": seed, "x-request-id": "request-1"}
    return Response(200, image, headers)


def error(status: int, name: str, *errors: str, **headers: str) -> Response:
    """An error as the API writes it."""
    return Response.json(status, {"id": "error-1", "name": name, "errors": list(errors)}, **headers)


def _wrong(endpoint: str, call: Call) -> str | None:
    fields = call.fields
    if not call.headers.get("content-type", "").startswith("multipart/form-data"):
        return "content-type: must be multipart/form-data"
    if call.headers.get("accept") not in ("image/*", "application/json"):
        return "accept: must be image/* or application/json"
    if unknown := sorted(set(fields) - FIELDS[endpoint]):
        return f"{unknown[0]}: is not allowed"
    refining = "image" in fields
    checks = {
        "prompt": 1 <= len(fields.get("prompt", "")) <= 10_000,
        "negative_prompt": len(fields.get("negative_prompt", "")) <= 10_000
        and not ("negative_prompt" in fields and str(fields.get("model")).endswith("-turbo")),
        "aspect_ratio": fields.get("aspect_ratio", "1:1") in RATIOS,
        "seed": 0 <= int(fields.get("seed", 0)) <= 4_294_967_294,
        "output_format": fields.get("output_format", "png") in _FORMATS[endpoint],
        "model": fields.get("model", "sd3.5-large") in MODELS,
        "strength": refining == ("strength" in fields) and 0 <= float(fields.get("strength", 0)) <= 1,
        "mode": endpoint != "sd3" or fields.get("mode", "text-to-image") == _mode(refining=refining),
        "image": not refining or _is_image(call),
    }
    if refining and "aspect_ratio" in fields:
        return "aspect_ratio: is only valid for text-to-image requests"
    return next((f"{name}: is not valid" for name, good in checks.items() if not good), None)


def _mode(*, refining: bool) -> str:
    return "image-to-image" if refining else "text-to-image"


def _is_image(call: Call) -> bool:
    try:
        with Image.open(BytesIO(call.image or b"")) as image:
            return call.image_type == f"image/{str(image.format).lower()}"
    except UnidentifiedImageError:
        return False
