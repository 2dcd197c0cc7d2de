"""What QEMU gets besides the machine: its own confinement, and a screen that only this user can see.

A guest out of a backup may be hostile: it was taken over before it was backed up, say. Used by `pbsfs boot`;
synchronous.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""QEMU's strictest filter of system calls (qemu(1)): QEMU starts no programs and gains no rights."""

_SCREENS = ("-display", "-vnc", "-nographic", "-curses", "-sdl", "-spice", "-full-screen")
_WINDOWS = {"gtk", "sdl", "cocoa"}


def confinement(qemu: str, options: Sequence[str]) -> list[str]:
    """The arguments that confine QEMU, unless `options`, which the user gave, have some of their own.

    None for a QEMU that was built without the filter.
    """
    if _given(options, ("-sandbox",)) or "-sandbox on" not in _answer(qemu, "--help"):
        return []
    return ["-sandbox", SANDBOX]


def screen(
    qemu: str, options: Sequence[str], environment: Mapping[str, str], directory: Path
) -> tuple[list[str], Path | None]:
    """The arguments for a screen, and its socket: by VNC on a Unix socket in `directory`, a private one.

    Nothing where `options` choose a screen, or where QEMU opens a window. Left alone, a QEMU without a window
    listens on 127.0.0.1:5900, for every local user.
    """
    if _given(options, _SCREENS):
        return [], None
    has_display = environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY")
    if has_display and _WINDOWS & set(_answer(qemu, "-display", "help").split()):
        return [], None
    socket = directory / "vnc.sock"
    return ["-display", f"vnc=unix:{escaped(str(socket))}"], socket


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
