"""Runs the real program at a terminal, and types what it asks for."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.needs import need

LIMIT = 30.0
"""Seconds that a command may take, unless something is broken."""


def at_a_terminal(
    command: Sequence[str | Path],
    answers: Sequence[tuple[str, str]],
    environment: Mapping[str, str],
) -> tuple[int, str]:
    """The status of `command`, and all that its terminal shows.

    `answers`: what is typed, each as soon as its question is shown; a question that is never asked is a
    failure. A command that asks for more waits in vain, which is one too.
    """
    need("setsid")
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=dict(environment),
    )
    os.close(theirs)
    try:
        shown = _talk(ours, answers)
        return process.wait(timeout=LIMIT), shown
    finally:
        os.close(ours)  # hangs up: nothing goes on at a terminal that is gone
        if process.poll() is None:
            process.kill()
            process.wait()


def _talk(terminal: int, answers: Sequence[tuple[str, str]]) -> str:
    end = time.monotonic() + LIMIT
    left = list(answers)
    shown, seen = "", 0
    while True:
        ready, _nothing, _nothing = select.select([terminal], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"waits for more than {left}; it shows: {shown!r}"
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # the last who had it open has closed it
            data = b""
        if not data:
            assert not left, f"did not ask {left[0][0]!r}; it shows: {shown!r}"
            return shown.replace("\r\n", "\n")
        shown += data.decode()
        while left and (at := shown.find(left[0][0], seen)) >= 0:
            seen = at + len(left[0][0])
            os.write(terminal, f"{left.pop(0)[1]}\n".encode())
