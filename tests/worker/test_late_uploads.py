"""Looks after uploads whose claim was lost, which no run waits for."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from daemon.run import ClaimedRun
from daemon.storage.client import Storage
from daemon.storage.keys import copy_key
from daemon.storage.objects import ClaimLost
from daemon.worker import late_uploads
from daemon.worker.late_uploads import LateUploads
from daemon.worker.workdirs import Workdirs
from tests.fakes.server import picture
from tests.support.daemons import supabase
from tests.support.hostile_servers import Visit, serving
from tests.support.postgres import wait_until
from tests.support.storage_gate import StorageGate
from tests.worker.test_retries import claimed

KEY = "w/a.png"
LATE, FINISHED = picture((32, 32)), picture((48, 48))


@dataclass
class Bay:
    """Late uploads that are looked after, in two buckets of a real Storage, with a folder for what is on its way."""

    late: LateUploads
    images: Storage
    kept: Storage
    gate: StorageGate
    folder: Path

    async def store(self, content: bytes, sha256: str) -> None:
        (file := self.folder / "stored").write_bytes(content)
        await self.images.upload(KEY, file, content_type="image/png", metadata={"sha256": sha256})

    async def copy(self, run: ClaimedRun, sha256: str = "finished") -> None:
        (file := self.folder / "copied").write_bytes(FINISHED)
        await self.late.copy(run, KEY, file, content_type="image/png", metadata={"sha256": sha256})

    async def lose(self, sha256: str) -> None:
        """Lose the claim in mid-upload."""
        with pytest.raises(ClaimLost):
            async with self.late.watched(claimed(), [KEY], sha256):
                raise ClaimLost

    async def stored(self) -> bytes:
        await self.images.download(KEY, self.folder / "seen", max_bytes=10_000)
        return (self.folder / "seen").read_bytes()


@asynccontextmanager
async def _bay(database: str, folder: Path) -> AsyncIterator[Bay]:
    gate = StorageGate()
    (workdirs := folder / "workdirs").mkdir()
    async with (
        supabase(database, gate.before) as project,
        Storage(project.url, project.keys.service_role_key, bucket="images") as images,
        Storage(project.url, project.keys.service_role_key, bucket="images-kept") as kept,
    ):
        late = LateUploads(images, kept, found := Workdirs(workdirs), max_bytes=10_000)
        running = asyncio.create_task(late.run())
        yield Bay(late, images, kept, gate, folder)
        assert not running.done()
        running.cancel()
        await asyncio.wait([running])
        found.close()


@pytest.fixture
async def bay(database: str, tmp_path: Path) -> AsyncIterator[Bay]:
    async with _bay(database, tmp_path) as bay:
        yield bay


async def test_a_copy_lies_where_all_pictures_do(bay: Bay) -> None:
    """A folder of its own would be left behind by a daemon that is killed meanwhile."""
    await bay.copy(replace(claimed(attempt=2), generated={}))
    await bay.store(LATE, "late")
    bay.gate.held["POST"] = asyncio.Event()
    await bay.lose("late")
    (lies,) = await wait_until(lambda: list(bay.folder.rglob("copy")))
    assert lies.parent.parent.parent == bay.folder / "workdirs"
    bay.gate.held.pop("POST").set()

    async def put_right() -> bool:
        return await bay.stored() == FINISHED

    await wait_until(put_right)


async def test_a_bug_in_a_look_ends_nothing_else(bay: Bay) -> None:
    (file := bay.folder / "copied").write_bytes(FINISHED)
    endless = {"sha256": "finished", "ticket": "9" * 5000}
    await bay.kept.upload(copy_key(KEY), file, content_type="image/png", metadata=endless)
    await bay.store(LATE, "late")

    def looks() -> int:
        return sum("/info/" in path for _, path in bay.gate.requests)

    for number in (1, 2):
        await bay.lose("late")
        await wait_until(lambda wanted=number: looks() == wanted, timeout=5)
    assert await bay.stored() == LATE


@pytest.mark.parametrize("later", [False, True])
async def test_a_copy_goes_once_it_is_old(bay: Bay, monkeypatch: pytest.MonkeyPatch, *, later: bool) -> None:
    monkeypatch.setattr(late_uploads, "COPY_KEPT", 0.2)
    run = replace(claimed(), contested=True)
    await bay.copy(run)
    if later:
        await bay.copy(replace(run, ticket=run.ticket + 1))
        monkeypatch.setattr(late_uploads, "COPY_KEPT", 3600)
    removed = ("DELETE", "/storage/v1/object/images-kept")
    looked = f"/storage/v1/object/info/images-kept/{copy_key(KEY)}"
    await wait_until(lambda: ("GET", looked) in bay.gate.requests if later else removed in bay.gate.requests)
    assert (await bay.kept.find(copy_key(KEY)) is not None) == later


async def test_a_run_that_nobody_else_had_needs_no_copy(bay: Bay) -> None:
    await bay.copy(claimed())
    assert await bay.kept.find(copy_key(KEY)) is None


async def test_a_copy_keeps_no_picture_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_uploads, "COPY_TIMEOUT", 0.1)
    (file := tmp_path / "a.png").write_bytes(b"a picture")
    async with serving(Visit.stay) as server, Storage(server.url, "key", bucket="kept") as kept:
        late = LateUploads(kept, kept, Workdirs(tmp_path), max_bytes=1000)
        run = replace(claimed(attempt=2), generated={})
        async with asyncio.timeout(20):
            await late.copy(run, "w/a.png", file, content_type="image/png", metadata={})
        assert server.asked
