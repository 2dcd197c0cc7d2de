"""Runs the real program, as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PBSFS = str(Path(sys.executable).with_name("pbsfs"))
"""The program that is installed beside the interpreter of the tests."""

TIMEOUT = 60.0
"""Seconds that any one command may take."""


def environment(**changes: str) -> dict[str, str]:
    """The environment of the tests, without what would change how pbsfs behaves."""
    ours = ("PBS_", "PBSFS_", "_PBSFS", "AWS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"LC_ALL": "C.UTF-8", "COLUMNS": "120"} | changes


def pbsfs(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`pbsfs ARGUMENTS`, ended; its output as text."""
    return run([PBSFS, *arguments], **options)


def run(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """A command, ended, whatever its exit status; its output as text."""
    settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "timeout": TIMEOUT, "env": environment()}
    return subprocess.run(command, capture_output=True, text=True, check=False, **(settings | options))


def output_of(*command: str | Path, **options: Any) -> str:
    """What a command that succeeds prints."""
    done = run(command, **options)
    assert done.returncode == 0, f"{command} ended with status {done.returncode}: {done.stderr}"
    return done.stdout


def error_of(done: subprocess.CompletedProcess[str], status: int) -> str:
    """The one line of error of a command that failed with `status`, as it has to be: no traceback."""
    assert done.returncode == status, f"status {done.returncode}, not {status}: {done.stderr}"
    lines = done.stderr.splitlines()
    assert len(lines) == 1, f"not one line: {done.stderr}"
    assert lines[0].startswith("pbsfs: ")
    return lines[0].removeprefix("pbsfs: ")
