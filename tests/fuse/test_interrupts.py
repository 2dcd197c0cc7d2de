"""Requests that are interrupted: given up for signals that are meant to end a program, and for no others."""

from __future__ import annotations

import pbsfs.fuse.shim

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def pending(number: signal.Signals) -> Iterator[None]:
    """This thread has the signal pending, and takes it away again."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        signal.pthread_kill(threading.get_ident(), number)
        yield
        assert signal.sigtimedwait([number], 1) is not None
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_that_is_meant_to_end_a_program_ends_its_wait(number: signal.Signals) -> None:
    assert not pbsfs.fuse.shim._is_ending(threading.get_native_id())
    with pending(number):
        assert pbsfs.fuse.shim._is_ending(threading.get_native_id())


@pytest.mark.parametrize("number", [signal.SIGCHLD, signal.SIGWINCH, signal.SIGALRM, signal.SIGUSR1])
def test_any_other_signal_does_not(number: signal.Signals) -> None:
    with pending(number):
        assert not pbsfs.fuse.shim._is_ending(threading.get_native_id())


def test_a_program_that_is_gone_waits_for_nothing() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert pbsfs.fuse.shim._is_ending(child)


def test_without_a_mount_there_is_no_request_to_interrupt() -> None:
    called: list[None] = []
    assert pbsfs.fuse.shim.last_request() == 0
    with pbsfs.fuse.shim.Request(0, lambda: called.append(None)):
        assert pbsfs.fuse.shim._waiting == {}
    assert not called
