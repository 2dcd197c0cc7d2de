"""What QEMU gets besides the machine."""

from __future__ import annotations

from pathlib import Path

from pbsfs.boot.qemu import screen


def test_the_path_of_the_screens_socket_may_have_commas() -> None:
    arguments, socket = screen("/nonexistent/qemu", [], {}, Path("/run/a,b"))
    assert arguments == ["-display", "vnc=unix:/run/a,,b/vnc.sock"]
    assert socket == Path("/run/a,b/vnc.sock")
