"""OpenAI's Responses API on loopback, as far as it draws in the background: responses that grow, and a ledger.

It refuses what the real one refuses: unknown fields, image models as `model`, tools with what a model does not have,
pictures that are not what their data URL says, metadata of another form, a missing key.

    async with ResponsesAPI() as api:
        api.stages = [IN_PROGRESS, api.completed()]
        ...
        assert len(api.jobs) == 1
"""

import asyncio
import base64
import binascii
import re
import time
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from PIL import Image

from tests.fakes.openai_api import ENDING, KEY, LIVE, OUTPUT_TOKENS, error, has_size, qualities
from tests.fakes.server import Call, FakeAPI, Response, picture

QUEUED = {"status": "queued"}
IN_PROGRESS = {"status": "in_progress"}
CANCELLED = {"status": "cancelled"}
ENDED = {"completed", "failed", "incomplete", "cancelled"}
USAGE = {
    "input_tokens": 400,
    "input_tokens_details": {"cached_tokens": 100, "cache_write_tokens": 50},
    "output_tokens": 80,
    "output_tokens_details": {"reasoning_tokens": 16},
    "total_tokens": 480,
}
IMAGE_USAGE = {
    "input_tokens": 20,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 20},
    "output_tokens": OUTPUT_TOKENS,
    "total_tokens": 20 + OUTPUT_TOKENS,
}
COST = (20 * 5 + OUTPUT_TOKENS * 30) / 1e6 + (250 * 0.1 + 100 * 0.01 + 50 * 0.125 + 80 * 0.5) / 1e6
"""USD of both usages: the picture, and the words around it."""
_MAINLINE = re.compile(r"gpt-(5|6)[\w.-]*")
_FIELDS = {
    *("model", "instructions", "input", "tools", "tool_choice", "max_tool_calls", "parallel_tool_calls", "reasoning"),
    *("background", "background_options", "store", "metadata", "safety_identifier", "previous_response_id"),
}
_TOOL_FIELDS = {
    *("type", "model", "action", "size", "quality", "output_format", "output_compression", "background"),
    *("moderation", "complexity", "input_fidelity", "partial_images"),
}
_PATH = re.compile(r"/v1/responses(?:/([^/]+)(/cancel)?)?")


class ResponsesAPI(FakeAPI):
    """The server.

    `stages` is what a response is like each time somebody asks, one after the other; the last one stays. With `mute`,
    orders are taken and never answered. `compatible` is another vendor's: any model, and no Responses API; with
    `immediate` it has one, without a background.
    """

    def reset(self) -> None:
        super().reset()
        self.responses: dict[str, dict[str, Any]] = {}
        self.stages: Sequence[Mapping[str, Any]] = [self.completed()]
        self.mute = False
        self.compatible = False
        self.immediate = False
        self._asked: dict[str, int] = {}

    @property
    def base_url(self) -> str:
        """The value of OPENAI_BASE_URL."""
        return f"{self.url}/v1"

    @property
    def jobs(self) -> list[Call]:
        """The submissions among the requests."""
        return [call for call in self.requests if (call.method, call.path) == ("POST", "/v1/responses")]

    @property
    def questions(self) -> list[Call]:
        """The retrievals among the requests."""
        return [call for call in self.requests if call.method == "GET"]

    @property
    def cancelled(self) -> list[str]:
        """The responses that somebody wanted to be cancelled."""
        return [call.path.split("/")[3] for call in self.requests if call.path.endswith("/cancel")]

    def completed(self, *calls: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """The stage with the picture, or with other calls of the image model."""
        output = [{"type": "reasoning", "id": "rs_1", "summary": []}, *(calls or (drawn(),))]
        return {
            "status": "completed",
            "output": output,
            "usage": USAGE,
            "tool_usage": {"image_gen": IMAGE_USAGE, "web_search": {"num_requests": 0}},
            **fields,
        }

    def known(self, name: str, **fields: Any) -> None:
        """Adds a response from before."""
        self.responses[name] = {"id": name, "object": "response", "status": "queued", "output": [], **fields}

    def draws(self, call: Call) -> bool:
        return False

    def refusal(self, call: Call) -> Response | None:
        if call.headers.get("authorization") != f"Bearer {KEY}":
            return _refuse(401, error("Incorrect API key provided: sk-…key.", "invalid_api_key"))
        found = _PATH.fullmatch(call.path)
        if found is None or self.compatible:
            return Response(404, b"not found")
        if found[1] is not None:
            method = "POST" if found[2] else "GET"
            missing = found[1] not in self.responses or call.method != method
            return _refuse(404, error(f"Response with id '{found[1]}' not found.", None)) if missing else None
        model = call.fields.get("model")
        if not _MAINLINE.fullmatch(str(model)):
            return _refuse(404, error(f"The model '{model}' does not exist.", "model_not_found", "model"))
        wrong = _wrong_field(call)
        return _refuse(400, error(f"Invalid value: '{wrong}'.", "invalid_value", wrong)) if wrong else None

    def respond(self, call: Call) -> Response:
        found = _PATH.fullmatch(call.path)
        assert found is not None
        if found[1] is None:
            return self._submit(call)
        response = self.responses[found[1]]
        if found[2]:
            return self._cancel(response)
        self._advance(response)
        return _response(response)

    def _submit(self, call: Call) -> Response:
        name = f"resp_{len(self.responses):048x}"
        fields = call.fields
        kept = {key: fields.get(key) for key in ("model", "instructions", "tools", "tool_choice", "metadata")}
        self.known(name, created_at=time.time(), background=True, error=None, service_tier="default", **kept)
        if self.immediate:
            self._advance(self.responses[name])
        return Response(after=asyncio.Event()) if self.mute else _response(self.responses[name])

    def _cancel(self, response: dict[str, Any]) -> Response:
        if response["status"] in ENDED - {"cancelled"}:
            return _refuse(400, error("Cannot cancel a completed response.", None))
        response["status"] = "cancelled"
        return _response(response)

    def _advance(self, response: dict[str, Any]) -> None:
        if time.time() < response.get("created_at", 0) + self.takes:
            response["status"] = "in_progress"
            return
        name, asked = response["id"], self._asked.get(response["id"], 0)
        self._asked[name] = asked + 1
        if response["status"] not in ENDED:
            response.update(self.stages[min(asked, len(self.stages) - 1)])


def drawn(image: bytes | None = None, **fields: Any) -> dict[str, Any]:
    """A call of the image model that led to a picture."""
    return {
        "type": "image_generation_call",
        "id": "ig_1",
        "status": "completed",
        "revised_prompt": "A red fox, as it was drawn",
        "result": base64.b64encode(image or picture((64, 48))).decode(),
        **fields,
    }


def not_drawn(told: dict[str, Any] | None = None) -> dict[str, Any]:
    """A call of the image model that failed."""
    return {"type": "image_generation_call", "id": "ig_1", "status": "failed", "result": None, "error": told}


def failed(code: str, message: str = "It went wrong.", **fields: Any) -> dict[str, Any]:
    """The stage of a response that failed."""
    return {"status": "failed", "error": {"code": code, "message": message}, **fields}


def incomplete(reason: str, **fields: Any) -> dict[str, Any]:
    """The stage of a response that stopped too early."""
    return {"status": "incomplete", "incomplete_details": {"reason": reason}, **fields}


def said(text: str) -> dict[str, Any]:
    """Return the output of a model that writes instead of drawing."""
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def _response(response: dict[str, Any]) -> Response:
    # The picture comes in the middle, and what was asked for behind it.
    ordered = {name: response[name] for name in sorted(response, key=lambda name: name in ("output", "metadata"))}
    return Response.json(200, ordered, x_request_id="req_1")


def _refuse(status: int, told: dict[str, Any]) -> Response:
    return Response.json(status, {"error": told}, x_request_id="req_1")


def _wrong_field(call: Call) -> str | None:
    fields = call.fields
    metadata = fields.get("metadata", {})
    tools = fields.get("tools", [])
    checks = {
        "content-type": call.headers.get("content-type") == "application/json",
        "content-length": "content-length" in call.headers,
        "tools": [tool.get("type") for tool in tools] == ["image_generation"],
        "tool_choice": fields.get("tool_choice") in ("auto", "required", {"type": "image_generation"}),
        "background": not fields.get("background") or fields.get("store", True) is True,
        "metadata": len(metadata) <= 16
        and all(len(key) <= 64 and isinstance(value, str) and len(value) <= 512 for key, value in metadata.items()),
        "input": all(_is_content(part) for message in fields.get("input", []) for part in message["content"]),
    }
    unknown = sorted(set(fields) - _FIELDS)
    wrong = next((name for name, good in checks.items() if not good), unknown[0] if unknown else None)
    return wrong or _wrong_tool(tools[0], images=_images(fields))


def _wrong_tool(tool: dict[str, Any], *, images: int) -> str | None:
    model = str(tool.get("model"))
    checks = {
        "tools[0].model": model in (*LIVE, *ENDING),
        "tools[0].action": tool.get("action", "auto") != "edit" or images > 0,
        "tools[0].size": has_size(model, str(tool.get("size", "auto"))),
        "tools[0].quality": tool.get("quality", "auto") in qualities(model),
    }
    unknown = sorted(set(tool) - _TOOL_FIELDS)
    return next((name for name, good in checks.items() if not good), f"tools[0].{unknown[0]}" if unknown else None)


def _images(fields: dict[str, Any]) -> int:
    return sum(part["type"] == "input_image" for message in fields["input"] for part in message["content"])


def _is_content(part: dict[str, Any]) -> bool:
    if part.get("type") == "input_text":
        return isinstance(part.get("text"), str)
    return part.get("type") == "input_image" and picture_of(part["image_url"]) is not None


def picture_of(url: str) -> bytes | None:
    """The picture in a data URL; None if there is none, or of another type than it says."""
    head, _, data = url.partition(";base64,")
    try:
        image = base64.b64decode(data, validate=True)
        with Image.open(BytesIO(image)) as opened:
            return image if head == f"data:image/{str(opened.format).lower()}" else None
    except (OSError, binascii.Error):
        return None
