"""The NBD servers that run: nbdkit processes with the plugin of pbsfs, as `pbsfs status` lists them.

Found in /proc (proc(5)), by their arguments, so no server keeps a list that could be wrong. Synchronous.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pbsfs.nbd.launch import LOOPBACK, Address

PROC = Path("/proc")
_BRIDGE = "nbd_bridge.py"
_USER = re.compile(r"^Uid:\s+\d+\s+(\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Server:
    """`address`: its URI; None where a service manager made the sockets. `path`: what it serves; empty for
    all images, None where nbdkit's parameters name it otherwise. `user`: the effective one."""

    pid: int
    user: int
    address: str | None
    path: str | None


def servers() -> Iterator[Server]:
    """Those of all users, by the number of their process."""
    for pid in sorted(int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()):
        with suppress(OSError):  # it has ended
            words = [os.fsdecode(word) for word in (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")]
            if os.path.basename(words[0]) != "nbdkit":
                continue
            if not any(os.path.basename(word) == _BRIDGE for word in words):
                continue
            found = _USER.search((PROC / str(pid) / "status").read_text())
            if found is not None:
                path = next((word[5:] for word in words if word.startswith("path=")), None)
                yield Server(pid, int(found[1]), _address(words), path)


def _address(words: list[str]) -> str | None:
    """The URI of the address in nbdkit's options; the options are those of `Address.arguments`."""
    options = (word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
    given: dict[str, str] = dict(options)
    if "unix" in given:
        return Address(socket=Path(given["unix"])).uri()
    port = given.get("port", "")
    if not (port.isascii() and port.isdigit() and len(port) <= 5):
        return None
    return Address(host=given.get("ipaddr", LOOPBACK), port=int(port)).uri()
