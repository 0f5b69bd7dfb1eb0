"""A fake of an incoming webhook, as Slack has them: it takes JSON with `text`, and may be away."""

from typing import Any

from tests.fakes.server import Call, FakeAPI, Response

PATH = "/services/T000/B000/xoxsecretxox"


class SlackAPI(FakeAPI):
    """Keeps what was posted while it was there."""

    def reset(self) -> None:
        super().reset()
        self.posted: list[dict[str, Any]] = []
        self.away = False
        self.text_alone = False

    @property
    def address(self) -> str:
        """Where to post; the path is the secret."""
        return self.url + PATH

    def refusal(self, call: Call) -> Response | None:
        if self.away:
            return Response(503, b"upstream is away")
        if call.path != PATH or call.method != "POST":
            return Response(404, b"no_team")
        if not isinstance(call.fields.get("text"), str) or (self.text_alone and len(call.fields) > 1):
            return Response(400, b"no_text")
        return None

    def respond(self, call: Call) -> Response:
        self.posted.append({"key": call.headers["idempotency-key"], **call.fields})
        return Response(200, b"ok")
