"""A midjourney-proxy on loopback: orders in, tasks that grow, pictures at an address.

It refuses what the real ones refuse, in their way: 401 with an empty body for a wrong secret, and 200 with a code for
almost everything else. A task that it does not know is an empty body.

Where an order names a hook, the task is posted to it at each change: unsigned, once, whatever is answered.
"""

import asyncio
import base64
import binascii
import re
import time
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import httpx
from PIL import Image

from tests.fakes.server import Call, FakeAPI, Response

KEY = "mj-secret-of-the-tests"
COLOURS = ("teal", "orange", "purple", "olive")
"""Of the grid's quarters, by rows."""
_FIELDS = {"botType", "prompt", "base64Array", "state", "notifyHook"}
_FLAGS = {"ar", "seed", "no", "v", "niji", "chaos", "stylize", "style", "tile", "weird"}
_TASK = re.compile(r"/mj/task/([^/]+)/(fetch|cancel)")


class MidjourneyAPI(FakeAPI):
    """The server.

    `stages` is what the answers to fetches say, one after the other; the last one stays. A task with a hook stays as it
    is until `happen` changes it. With `mute`, orders are taken and never answered; with `cut_off`, the connection drops
    instead. Without `can_cancel` it has no such endpoint. With `deaf`, hooks are forgotten.
    """

    def reset(self) -> None:
        super().reset()
        self.tasks: dict[str, dict[str, Any]] = {}
        self.stages: Sequence[dict[str, Any]] = [self.done()]
        self.pictures = {"/grid.png": grid(), "/forming.png": grid((32, 32))}
        self.mute = False
        self.cut_off = False
        self.can_cancel = True
        self.deaf = False
        self.hooks: dict[str, str] = {}
        self._drawing: list[asyncio.Task[int | None]] = []

    def done(self) -> dict[str, Any]:
        """The stage with the picture."""
        return {"status": "SUCCESS", "progress": "100%", "imageUrl": f"{self.url}/grid.png?ex=65f"}

    @property
    def jobs(self) -> list[Call]:
        """The submissions among the requests."""
        return [call for call in self.requests if call.path == "/mj/submit/imagine"]

    def known(self, name: str, **fields: Any) -> None:
        """Adds an order from before."""
        self.tasks[name] = {"id": name, "action": "IMAGINE", "properties": {}, "fetched": 0, **fields}
        self.tasks[name]["ordered_at"] = time.monotonic()

    async def happen(self, name: str, **stage: Any) -> int | None:
        """Changes a task and posts it to its hook, if it has one; gives the status of the answer, which nobody reads."""
        task = self.tasks[name]
        task.update(stage)
        if name not in self.hooks:
            return None
        return await self.post(self.hooks[name], task)

    async def post(self, hook: str, task: dict[str, Any]) -> int:
        """Posts a task to a hook; answers the status."""
        async with httpx.AsyncClient() as client:
            return (await client.post(hook, json=task)).status_code

    def draws(self, call: Call) -> bool:
        return False

    def refusal(self, call: Call) -> Response | None:
        if call.path in self.pictures:
            return None
        if call.headers.get("mj-api-secret") != KEY:
            return Response(401)
        if call.path == "/mj/submit/imagine" and call.method == "POST":
            wrong = _wrong(call.fields)
            return code(4, wrong) if wrong else None
        task = _TASK.fullmatch(call.path)
        if task is not None and task[2] == "cancel" and not self.can_cancel:
            return Response(404)
        return None if task is not None or call.path == "/mj/task/list" else Response(404)

    def respond(self, call: Call) -> Response:
        if call.path in self.pictures:
            return Response(200, self.pictures[call.path], {"content-type": "image/png"})
        if call.path == "/mj/task/list":
            return Response.json(200, list(self.tasks.values()))
        if found := _TASK.fullmatch(call.path):
            return self._asked(found[1], found[2])
        return self._submit(call)

    def _asked(self, name: str, what: str) -> Response:
        task = self.tasks.get(name)
        if task is None:
            return Response(200)
        if what == "cancel":
            task.update(status="FAILURE", failReason="取消任务", ended=True)
            return Response(200)
        return Response.json(200, self._advance(task))

    def _submit(self, call: Call) -> Response:
        name = str(1_000 + len(self.tasks))
        self.known(name, status="NOT_START", state=call.fields["state"])
        hook = call.fields.get("notifyHook")
        self.tasks[name]["properties"] = {"notifyHook": hook, "finalPrompt": call.fields["prompt"]}
        if hook is not None and not self.deaf:
            self.hooks[name] = hook
            if self.takes:
                self._drawing.append(asyncio.create_task(self._finish(name)))
        taken = code(1, "提交成功", result=name)
        if self.mute:
            return Response(after=asyncio.Event())
        return Response(200, taken.body, cut=0) if self.cut_off else taken

    async def _finish(self, name: str) -> int | None:
        await asyncio.sleep(self.takes)
        return await self.happen(name, **self.done())

    def _advance(self, task: dict[str, Any]) -> dict[str, Any]:
        if self.takes and time.monotonic() < task["ordered_at"] + self.takes:
            task.update(status="IN_PROGRESS", progress="10%")
        elif not task.get("ended") and task["id"] not in self.hooks:
            task.update(self.stages[min(task["fetched"], len(self.stages) - 1)])
            task["fetched"] += 1
        return task


def code(number: int | str, description: str, **more: Any) -> Response:
    """Return the response to a submission."""
    return Response.json(200, {"code": number, "description": description, "properties": {}, **more})


def grid(size: tuple[int, int] = (128, 96)) -> bytes:
    """Four colours, two by two."""
    whole = Image.new("RGB", size)
    width, height = size[0] // 2, size[1] // 2
    for number, colour in enumerate(COLOURS):
        whole.paste(Image.new("RGB", (width, height), colour), (number % 2 * width, number // 2 * height))
    file = BytesIO()
    whole.save(file, "PNG")
    return file.getvalue()


def _wrong(fields: dict[str, Any]) -> str | None:
    if unknown := sorted(set(fields) - _FIELDS):
        return f"{unknown[0]} is not a field"
    if not fields.get("prompt"):
        return "prompt不能为空"
    flags = re.findall(r"\s--(\w+)", fields["prompt"])
    if len(flags) != len(set(flags)) or not set(flags) <= _FLAGS:
        return "Invalid parameter"
    if fields.get("botType") != ("NIJI_JOURNEY" if "niji" in flags else "MID_JOURNEY"):
        return "botType"
    return None if all(_is_image(url) for url in fields.get("base64Array", [])) else "base64格式错误"


def _is_image(url: str) -> bool:
    head, _, data = url.partition(";base64,")
    try:
        with Image.open(BytesIO(base64.b64decode(data, validate=True))) as image:
            return head == f"data:image/{str(image.format).lower()}"
    except (OSError, binascii.Error):
        return False
