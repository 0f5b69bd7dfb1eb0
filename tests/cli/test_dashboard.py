"""dashboard: prints an address, serves it on this machine alone, and ends with Ctrl-C."""

import re
import signal
import socket

import httpx

from tests.support.postgres import free_port


async def test_dashboard_serves_the_address_it_prints(image_jobs, database):
    process = await image_jobs.start("dashboard", "--port", str(free_port()), DATABASE_URL=database)
    assert process.stdout is not None
    address = re.search(r"http://127\.0\.0\.1:\d+/dashboard#\S+", (await process.stdout.readline()).decode())
    assert address is not None
    url, _, token = address[0].partition("#")
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{url}/api/board")).status_code == 401
        board = await client.get(f"{url}/api/board", headers={"authorization": f"Bearer {token}"})
        assert board.json()["totals"]["waiting"] == 0
    process.send_signal(signal.SIGINT)
    done = await image_jobs.end(process)
    assert (done.code, done.err) == (0, "")


async def test_dashboard_listens_on_this_machine_only(image_jobs, database):
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        done = await image_jobs("dashboard", "--host", host, DATABASE_URL=database)
        assert (done.code, done.out) == (2, "")
        assert f"listens on this machine only, not on {host}" in done.err
        assert "ssh -L 54380:127.0.0.1:54380" in done.err


async def test_dashboard_says_that_its_port_is_taken(image_jobs, database):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = await image_jobs("dashboard", "--port", str(port), DATABASE_URL=database)
    assert done.code == 1
    assert f"Port {port} cannot be used: it is taken." in done.err
    assert "--port" in done.err
