"""The guard stops watched processes when its owner is killed, and only then."""

import asyncio
import subprocess
import sys

import psutil

from daemon.dev.guard import Guard
from tests.support.postgres import ROOT, wait_until


def test_leaving_the_context_stops_no_process():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as watched:
        with Guard() as guard:
            guard.watch(watched.pid)
        assert watched.poll() is None
        watched.communicate(b"\n")
    assert watched.returncode == 0


async def test_watched_processes_stop_when_the_owner_is_killed():
    code = (
        "import subprocess, sys, time\nfrom daemon.dev.guard import Guard\n"
        "with Guard() as guard:\n"
        "    process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "    guard.watch(process.pid)\n"
        "    print(process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert owner.stdout is not None
    pid = int(await owner.stdout.readline())
    owner.kill()
    await owner.wait()
    await wait_until(lambda: not running(pid))


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
