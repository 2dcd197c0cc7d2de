"""The password of a plugin's parameter: the word itself, or a form of nbdkit that names its place.

Source of the forms: nbdkit-plugin(3), `nbdkit_read_password`. Used by `parameters`. Synchronous.
"""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Callable

from pbsfs.access.credentials import first_line, read_descriptor, read_file
from pbsfs.base.errors import UsageError
from pbsfs.base.secret import Secret


def password_of(value: str) -> Secret:
    """The password: `-` asks for it, `+FILE` and `-FD` have it in their first line. Raises UsageError."""
    if value == "-":
        return Secret(_ask())
    if value.startswith("+"):
        return Secret(_first_line("password=+FILE", value[1:], lambda: read_file(value[1:])))
    if value.startswith("-"):
        if not (value[1:].isascii() and value[1:].isdigit() and 2 < int(value[1:]) < 1 << 20):
            raise UsageError("password=-FD: not the number of a descriptor; give one from 3 on")
        fd = int(value[1:])
        return Secret(_first_line("password=-FD", f"descriptor {fd}", lambda: read_descriptor(fd)))
    return Secret(value)


def _first_line(form: str, place: str, read: Callable[[], bytes]) -> str:
    try:
        return first_line(read())
    except OSError as error:
        raise UsageError(
            f"{form}: cannot read {place}: {error.strerror}; name one that you may read"
        ) from None
    except ValueError as error:
        raise UsageError(f"{form}: {place} {error}; write it as UTF-8") from None


def _ask() -> str:
    """A line from standard input; a terminal does not show it."""
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError("password=-: standard input is closed; use password=+FILE")
    fd = 0
    if not os.isatty(fd):
        return _first_line("password=-", "standard input", lambda: read_descriptor(os.dup(fd)))
    before = termios.tcgetattr(fd)
    silent = termios.tcgetattr(fd)
    silent[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(fd, termios.TCSAFLUSH, silent)
        os.write(2, b"password: ")
        line = sys.stdin.readline()
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)
        os.write(2, b"\n")
    return line.rstrip("\n")
