"""Objects in storage: as they are described, and the file that becomes one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from daemon.errors import Retryable
from daemon.storage.breaker import LEASE_CODE


class ClaimLost(Exception):
    """The claim was lost before the upload: nothing was written (fencing)."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object in storage. `size` is in bytes; `metadata` was given to `upload`."""

    key: str
    content_type: str
    size: int
    metadata: Mapping[str, str]


class FencedFile(FileIO):
    """A file that is read for as long as the lease lasts."""

    def __init__(self, file: Path, may_go_on: Callable[[], bool]) -> None:
        super().__init__(file, "rb")
        self._may_go_on = may_go_on

    def read(self, size: int | None = -1, /) -> bytes:
        """Read a piece.

        Raises:
            Retryable: If the lease has lapsed.
        """
        if not self._may_go_on():
            raise Retryable("The daemon was held up while it stored the image.", code=LEASE_CODE, hint="")
        return super().read(size) or b""


class Info(BaseModel):
    """An object as Storage describes it. pydantic's errors are ValueErrors."""

    content_type: str | None = None
    size: int | None = None
    metadata: dict[str, Any] | None = None
