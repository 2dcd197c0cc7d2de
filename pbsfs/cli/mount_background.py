"""A mount in the background: the process that is started for it, and what it reports.

It is a new process (not a fork, as it has threads). It reports one line over a pipe: `0` when the mount
answers, or the exit status and the reason of a failure. So `pbsfs mount` reports every failure.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from pbsfs.access.description import Description
from pbsfs.base.errors import MountError, PbsfsError, exit_status_of, with_action
from pbsfs.fuse.mountpoint import is_automount
from pbsfs.runtime.process import signals_held_back
from pbsfs.runtime.service import ServiceManager


class Report:
    """Reports to the service manager or the waiting process, if there is one."""

    def __init__(self, fd: int | None, service: ServiceManager, place: Path) -> None:
        self._fd = fd
        self._service = service
        self._place = place

    def ready(self, source: str) -> None:
        """The mount of `source` answers.

        A process in the background detaches from the terminal, the caller's pipes and its directory. That of
        an automount leaves the caller's process group only now: outside of it, the kernel lets it wait.
        """
        self._service.ready(f"{source} is mounted at {self._place}")
        if self._fd is None:
            return
        if os.getsid(0) != os.getpid():
            os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        self._send("0")

    def stopping(self) -> None:
        """The mount ends."""
        self._service.stopping()

    def failed(self, error: PbsfsError) -> None:
        self._send(f"{exit_status_of(error)} {with_action(error)}")

    def _send(self, line: str) -> None:
        if self._fd is not None:
            os.write(self._fd, line.encode(errors="replace"))
            os.close(self._fd)
            self._fd = None


class _BackgroundError(PbsfsError):
    """What the process in the background reported, with the exit status that it gave."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.exit_status = status  # type: ignore[misc]  # the status of the other process's error


def _end(child: subprocess.Popen[bytes]) -> None:
    """Stopped while it waits for the mount: nothing stays mounted or running."""
    child.send_signal(signal.SIGTERM)
    child.wait()


def start_in_background(arguments: Sequence[str], description: Description, place: Path) -> None:
    """Starts a mount at `place` with these options of `pbsfs mount`; returns when it answers.

    Raises MountError, and what made the process fail.
    """
    reading, writing = os.pipe()
    # -P: does not import modules from the current directory, which anybody may have written.
    command_line = [sys.executable, "-P", "-m", "pbsfs", "mount", "--foreground", f"--ready-fd={writing}"]
    with open(reading, "rb") as pipe, ExitStack() as stack:
        with description.handed_over() as described, signals_held_back():
            command_line += [f"--source-fd={described}", *arguments]
            child = subprocess.Popen(
                [*command_line, "--", str(place)],
                stdin=subprocess.DEVNULL,
                pass_fds=[writing, described],
                start_new_session=not is_automount(place),
            )
            stack.push(lambda kind, *_error: None if kind is None else _end(child))
        os.close(writing)
        status, _space, text = pipe.read().decode(errors="replace").partition(" ")
        if status == "0":
            # The mount is complete: a signal no longer stops it.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            child.returncode = 0  # the process keeps running, so there is nothing to wait for
            return
    code = child.wait()
    if not status:
        raise MountError(
            f"{place}: the process of the mount ended with status {code}; "
            "run it with --foreground --log-level debug"
        )
    raise _BackgroundError(text, int(status))
