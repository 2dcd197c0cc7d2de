"""Signals that wait until a child is noted, and memory that the allocator keeps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from pbsfs.runtime.process import signals_held_back


def test_a_signal_waits_until_the_end_of_the_block() -> None:
    reached = []

    def interrupted() -> None:
        with signals_held_back():
            signal.raise_signal(signal.SIGINT)
            reached.append(1)
        reached.append(2)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert reached == [1]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_what_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_held_back():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_child_can_be_ended_by_signals() -> None:
    with signals_held_back():
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    child.send_signal(signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM
    assert child.stdin is not None
    child.stdin.close()
    assert os.getpid() != child.pid


CHURN = """
import resource
from pbsfs.runtime import process

process.use_one_arena()
if {keeps}:
    process.keep_freed_memory()
for count in range(6):
    if count == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [bytes(4 << 20).replace(b"\\0", b"x") for _ in range(4)]
    del pieces
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_that_is_kept_needs_no_page_faults_again() -> None:
    faults = {}
    for keeps in (False, True):
        words = [sys.executable, "-c", CHURN.format(keeps=keeps)]
        faults[keeps] = int(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
    assert faults[True] < 1000 < faults[False]
