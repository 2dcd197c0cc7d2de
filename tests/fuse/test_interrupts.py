"""Requests that are interrupted: given up for signals that are meant to end a program, and for no others."""

from __future__ import annotations

import pbsfs.fuse.shim

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pyfuse3
import pytest
import trio
import trio.testing

from pbsfs.fuse.guards import waits
from pbsfs.runtime.report import Reporter
from tests.support.run import in_trio


@contextmanager
def pending(number: signal.Signals) -> Iterator[None]:
    """This thread has the signal pending, and takes it away again."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        signal.pthread_kill(threading.get_ident(), number)
        yield
    finally:
        assert signal.sigtimedwait([number], 1) is not None
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
    called: list[pbsfs.fuse.shim.Request] = []
    assert pbsfs.fuse.shim.last_request() == 0
    with pbsfs.fuse.shim.Request(0, called.append):
        assert pbsfs.fuse.shim._waiting == {}
    assert not called


class Waiting:
    """Handlers that wait until they are let go."""

    reporter: Reporter

    def __init__(self) -> None:
        self.waits = trio.Event()
        self.go = trio.Event()

    @waits
    async def handler(self) -> str:
        self.waits.set()
        await self.go.wait()
        return "answer"


@in_trio
async def test_a_signal_that_ends_a_program_ends_its_wait_also_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = 4711  # of a program that is this thread
    lib = SimpleNamespace(
        pbsfs_request=lambda: request,
        pbsfs_is_interrupted=lambda _request: 0,
        pbsfs_caller=lambda _request: threading.get_native_id(),
    )
    monkeypatch.setattr(pbsfs.fuse.shim, "lib", lib)
    answers: list[str] = []
    errors: list[int] = []
    ended, answered = Waiting(), Waiting()

    async def wait(handlers: Waiting) -> None:
        try:
            answers.append(await handlers.handler())
        except pyfuse3.FUSEError as error:
            errors.append(error.errno)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, answered)
        await answered.waits.wait()
        with pending(signal.SIGUSR1):
            pbsfs.fuse.shim._interrupted(request)
            await trio.sleep(10)
            answered.go.set()
            await trio.testing.wait_all_tasks_blocked()
        assert (answers, errors) == (["answer"], [])
        nursery.start_soon(wait, ended)
        await ended.waits.wait()
        with pending(signal.SIGUSR1):
            pbsfs.fuse.shim._interrupted(request)  # the kernel says so once
            with pending(signal.SIGTERM):
                await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert (answers, errors) == (["answer"], [errno.EINTR])
    assert pbsfs.fuse.shim._waiting == {}
