"""Signals that wait until a child is noted."""

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
