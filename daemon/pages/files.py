"""Serves what `build.py` has bundled: compressed, and asked for anew each time."""

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

NO_CACHE = {"cache-control": "no-cache"}
"""The files of the next bundle have the same addresses."""

ENCODINGS = {"br": ".br", "gzip": ".gz"}
"""Endings of what the build leaves beside a file, the smallest first."""


class BundledFiles(StaticFiles):
    """The files of a bundle."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Serve a file, compressed where the build has left that beside the file and the browser takes it."""
        accepted = [
            each.partition(";")[0].strip() for each in Headers(scope=scope).get("accept-encoding", "").split(",")
        ]
        for encoding, ending in ENCODINGS.items():
            if encoding in accepted and self.lookup_path(path + ending)[1] is not None:
                response = await super().get_response(path + ending, scope)
                # Of the file, not of its compression, for which gzip has a type of its own.
                response.headers["content-type"] = _media_type(path)
                response.headers["content-encoding"] = encoding
                break
        else:
            response = await super().get_response(path, scope)
        response.headers.update(NO_CACHE)
        response.headers.add_vary_header("accept-encoding")
        return response


def _media_type(path: str) -> str:
    return "text/css; charset=utf-8" if path.endswith(".css") else "text/javascript; charset=utf-8"
