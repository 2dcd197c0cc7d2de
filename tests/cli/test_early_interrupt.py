"""Ctrl-C at the moment at which the loop of a command starts."""

from __future__ import annotations

import subprocess
import sys

from tests.support.program import environment
from tests.support.stocked import Stocked

PROGRAM = """
import functools, signal, trio
from pbsfs.cli import main

class Early(trio.abc.Instrument):
    def before_run(self):
        signal.raise_signal(signal.SIGINT)

trio.run = functools.partial(trio.run, instruments=[Early()])
main()
"""


def test_it_ends_the_command_without_a_traceback(stocked: Stocked) -> None:
    line = [sys.executable, "-c", PROGRAM, "cat", "--datastore-dir", str(stocked.path), "vm/100"]
    done = subprocess.run(line, env=environment(), capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"\n")  # the cursor is behind "^C"
