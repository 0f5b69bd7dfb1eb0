"""completion: the scripts for three shells, and what they get when they ask."""

import asyncio
import os
import sys

import pytest

from tests.support.postgres import ROOT

BASH = """
source {script}
COMP_WORDS=({words}); COMP_CWORD={at}
_image_jobs_completion image-jobs
echo "${{COMPREPLY[@]}}"
"""
ASKED = {
    "zsh": {"_IMAGE_JOBS_COMPLETE": "complete_zsh"},
    "fish": {"_IMAGE_JOBS_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}


@pytest.mark.parametrize(("words", "found"), [("li", ["list"]), ("list --status c", ["completed", "cancelled"])])
async def test_bash_completes_commands_and_values(image_jobs, tmp_path, words, found):
    script = tmp_path / "a directory" / "completion.sh"
    script.parent.mkdir()
    script.write_text((await image_jobs("completion", "bash")).out)
    command = script.parent / "image-jobs"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m daemon "$@"\n')
    command.chmod(0o755)
    text = BASH.format(script=f"'{script}'", words=f"image-jobs {words}", at=len(words.split()))
    process = await asyncio.create_subprocess_exec(
        *("bash", "--norc", "-c", text),
        env={"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert out.decode().split() == found


@pytest.mark.parametrize("shell", ASKED)
async def test_zsh_and_fish_get_a_script_that_asks_us(image_jobs, shell):
    script = (await image_jobs("completion", shell)).out
    assert ASKED[shell]["_IMAGE_JOBS_COMPLETE"] in script
    assert script.startswith("#compdef image-jobs\n" if shell == "zsh" else "complete --command image-jobs ")
    done = await image_jobs(**ASKED[shell], _TYPER_COMPLETE_ARGS="image-jobs ca")
    assert "cancel" in done.out and "Stop a run." in done.out
    assert "requeue" not in done.out


async def test_an_unknown_shell_is_exit_code_2(image_jobs):
    done = await image_jobs("completion", "tcsh")
    assert done.code == 2
    assert "fish" in done.err
