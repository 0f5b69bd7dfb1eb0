"""The embedded server: start, stop, restart, kill, and one sentence for each reason not to start."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import asyncpg
import psutil
import pytest

from daemon.dev import postgres
from daemon.dev.postgres import SHARED, Server, embedded_bin_dir, version
from daemon.errors import ImageJobsError
from tests.support.postgres import ROOT, bin_dir, free_port, wait_until

as_root = os.geteuid() == 0


@pytest.fixture
def home() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="image-jobs-server-"))
    path.chmod(0o755)
    yield path
    rmtree(path)


@pytest.fixture
def server(home: Path) -> Iterator[Server]:
    made = Server(embedded_bin_dir(), home / "data", free_port(), {"fsync": "off"})
    yield made
    made.stop()


async def ask(server: Server, sql: str) -> object:
    connection = await asyncpg.connect(server.dsn())
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


async def test_a_second_start_finds_the_data_of_the_first(server: Server):
    server.start()
    await ask(server, "create table kept as select 42 as value")
    server.stop()
    server.start()
    assert await ask(server, "select value from kept") == 42


async def test_it_listens_on_loopback_with_logical_replication(server: Server):
    server.start()
    assert await ask(server, "show listen_addresses") == "127.0.0.1"
    assert await ask(server, "show unix_socket_directories") == ""
    assert await ask(server, "show wal_level") == "logical"
    assert await ask(server, "select current_user::text") == "supabase_admin"
    assert (await ask(server, "show server_version")) == server.version


async def test_stop_leaves_no_process_and_may_be_called_twice(server: Server):
    server.start()
    family = psutil.Process(server.pid).children(recursive=True)
    assert family
    server.stop()
    server.stop()
    assert server.pid is None
    await wait_until(lambda: not any(process.is_running() for process in family))


async def test_open_connections_do_not_delay_a_stop(server: Server):
    server.start()
    connection = await asyncpg.connect(server.dsn())
    server.stop()
    await wait_until(connection.is_closed)


async def test_a_kill_in_the_middle_of_writing_loses_nothing_committed(server: Server):
    server.start()
    await ask(server, "create table kept as select generate_series(1, 1000) as n")
    os.kill(server.pid, signal.SIGKILL)
    await wait_until(lambda: server.pid is None)
    assert (server.data_dir / "postmaster.pid").exists()
    server.start()
    assert await ask(server, "select count(*) from kept") == 1000


async def test_an_interrupted_first_start_is_repeated(server: Server):
    unfinished = server.data_dir.with_name("data.new")
    unfinished.mkdir()
    (unfinished / "PG_VERSION").write_text("18\n")
    server.start()
    assert await ask(server, "select 1") == 1
    assert not unfinished.exists()


def test_a_taken_port_is_named(server: Server):
    with socket.create_server(("127.0.0.1", server.port)), pytest.raises(ImageJobsError) as caught:
        server.start()
    assert caught.value.message == f"Port {server.port} is taken by another program."
    assert caught.value.hint == "Stop that program, or choose another port."
    assert server.pid is None


def test_a_running_twin_is_named_and_left_alone(server: Server):
    server.start()
    twin = Server(server.bin_dir, server.data_dir, free_port())
    with pytest.raises(ImageJobsError) as caught:
        twin.start()
    assert caught.value.message == f"Another Postgres server, process {server.pid}, is running in {server.data_dir}."
    assert f"kill -INT {server.pid}" in caught.value.hint
    twin.stop()
    assert server.pid is not None


def test_data_of_another_version_is_refused_with_a_hint(home: Path):
    old = Server(bin_dir("pg15"), home / "data", free_port())
    old.start()
    old.stop()
    with pytest.raises(ImageJobsError, match=r"was made by PostgreSQL 15, and this is 18\.") as caught:
        Server(embedded_bin_dir(), home / "data", free_port()).start()
    assert "--fresh" in caught.value.hint


def test_a_broken_setting_is_reported_by_postgres_message(home: Path):
    broken = Server(embedded_bin_dir(), home / "data", free_port(), {"shared_buffers": "lots"})
    with pytest.raises(ImageJobsError, match=r'Postgres did not start: .*"shared_buffers": "lots"') as caught:
        broken.start()
    assert str(broken.log) in caught.value.hint


def test_missing_binaries_are_reported_first(home: Path):
    with pytest.raises(ImageJobsError, match="There is no Postgres that runs in"):
        Server(home / "nothing", home / "below" / "data", free_port()).start()
    assert list(home.iterdir()) == []


def test_pg_bin_overrides_the_wheel(monkeypatch: pytest.MonkeyPatch):
    assert version(embedded_bin_dir()).startswith("18.")
    monkeypatch.setenv("PG_BIN", str(bin_dir("pg15")))
    assert version(embedded_bin_dir()).startswith("15.")


async def test_the_terminals_ctrl_c_does_not_reach_the_server(server: Server):
    server.start()
    assert os.getsid(server.pid) == server.pid != os.getsid(0)
    assert os.getpgid(server.pid) == server.pid


async def test_only_as_root_it_runs_as_another_user(server: Server):
    server.start()
    expected = "nobody" if as_root else psutil.Process().username()
    assert psutil.Process(server.pid).username() == expected


async def test_unreachable_data_and_binaries_are_moved(home: Path, monkeypatch: pytest.MonkeyPatch):
    """Below /root, or in a directory of mktemp. Without root the user is the same, and nothing is moved."""
    monkeypatch.setattr(postgres, "SHARED", home / "shared")
    closed = home / "closed"
    closed.mkdir(mode=0o700)
    (closed / "wheel").symlink_to(embedded_bin_dir().parent)
    server = Server(closed / "wheel/bin", closed / "data", free_port(), {"fsync": "off"})
    server.start()
    await ask(server, "create table kept as select 42 as value")
    server.stop()
    again = Server(closed / "wheel/bin", closed / "data", free_port(), {"fsync": "off"})
    again.start()
    assert await ask(again, "select value from kept") == 42
    again.stop()
    assert server.data_dir.is_symlink() == as_root
    assert len(list((home / "shared").glob("*"))) == (2 if as_root else 0)

    server.data_dir.unlink() if as_root else rmtree(server.data_dir)
    server.start()  # deleting the link deletes the data, too
    assert await ask(server, "select to_regclass('kept')") is None
    server.stop()


def test_the_shared_directory_is_not_writable_by_users():
    assert SHARED.parts[:3] == ("/", "var", "lib")


def test_an_error_in_the_daemon_stops_the_server(home: Path):
    program = f"""
import sys
from pathlib import Path
from daemon.dev.postgres import Server, embedded_bin_dir
server = Server(embedded_bin_dir(), Path({str(home / "data")!r}), {free_port()})
server.start()
try:
    print(server.pid, flush=True)
    raise SystemExit(3)
finally:
    server.stop()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert not psutil.pid_exists(int(done.stdout))
