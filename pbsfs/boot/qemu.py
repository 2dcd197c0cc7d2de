"""QEMU as a program: its confinement, a screen that only this user can see, its monitor and its end.

A guest from a backup may be hostile: an attacker may have controlled it before the backup. Used by
`pbsfs boot`; synchronous.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""QEMU's strictest system call filter (qemu(1)): QEMU starts no programs and gains no rights."""

_SCREENS = ("-display", "-vnc", "-nographic", "-curses", "-sdl", "-spice", "-full-screen")
_WINDOWS = {"gtk", "sdl", "cocoa"}


def confinement(qemu: str, options: Sequence[str]) -> list[str]:
    """The arguments that confine QEMU; none if the user's `options` have their own, or QEMU has no filter."""
    if _given(options, ("-sandbox",)) or "-sandbox on" not in _answer(qemu, "--help"):
        return []
    return ["-sandbox", SANDBOX]


def screen(
    qemu: str, options: Sequence[str], environment: Mapping[str, str], directory: Path
) -> tuple[list[str], Path | None]:
    """The arguments for a screen, and its socket: by VNC on a Unix socket in `directory`, a private one.

    None if `options` choose a screen, or if QEMU opens a window. By default, a QEMU without a window listens
    on 127.0.0.1:5900, for every local user.
    """
    if _given(options, _SCREENS):
        return [], None
    has_display = environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY")
    if has_display and _WINDOWS & set(_answer(qemu, "-display", "help").split()):
        return [], None
    place = directory / "vnc.sock"
    return ["-display", f"vnc=unix:{escaped(str(place))}"], place


def monitor(descriptor: int) -> list[str]:
    """The arguments for a monitor at the socket `descriptor`, for `runs`."""
    return ["-chardev", f"socket,id=pbsfs,fd={descriptor}", "-mon", "pbsfs,mode=control"]


def runs(connection: socket.socket) -> bool:
    """Waits until QEMU has accepted its options, opened its disks and runs, or has ended; whether it runs.

    `connection`: to its monitor, which answers only then (QEMU's docs/interop/qmp-spec).
    """
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(b'{"execute": "qmp_capabilities"}\n')
        with connection.makefile("rb") as lines:
            return any(b'"return"' in line for line in iter(lambda: lines.readline(1 << 16), b""))
    return False


def ending_with_us() -> list[str]:
    """The start of a command line that ends when this process is killed: QEMU's disks are gone then."""
    setpriv = shutil.which("setpriv")  # of util-linux, which every Debian has
    return [setpriv, "--pdeathsig", "TERM"] if setpriv is not None else []


def escaped(text: str) -> str:
    """`text` as a value in QEMU's comma-separated options."""
    return text.replace(",", ",,")


def _given(options: Sequence[str], names: Sequence[str]) -> bool:
    return any(option.replace("--", "-", 1) in names for option in options)


def _answer(qemu: str, *arguments: str) -> str:
    done = subprocess.run(
        [qemu, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return done.stdout
