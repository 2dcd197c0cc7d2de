"""Socket activation: `pbsfs nbd` serves on sockets that a service manager hands to it (sd_listen_fds(3))."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import pytest

from pbsfs.base.errors import UsageError
from pbsfs.nbd.launch import Address
from tests.support.needs import need
from tests.support.program import PBSFS, environment, error_of, output_of, run
from tests.support.stocked import IMAGE, stock

STARTER = """
import os, sys
first, *command = sys.argv[1:]
fds = [int(fd) for fd in first.split(",")]
kept = [os.dup2(fd, 200 + place) for place, fd in enumerate(fds)]
for place, fd in enumerate(kept):
    os.dup2(fd, 3 + place, inheritable=True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds))}
os.execv(command[0], command)
"""
"""Becomes the command in its arguments, started as systemd starts a service for a socket."""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a path that is short enough for a socket's."""
    with TemporaryDirectory() as path:
        yield Path(path)


def listening(address: str | tuple[str, int]) -> socket.socket:
    made = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    made.bind(address)
    made.listen()
    return made


def started(sockets: Sequence[socket.socket | IO[str]], *arguments: str | Path) -> list[str]:
    numbers = ",".join(str(made.fileno()) for made in sockets)
    return [sys.executable, "-c", STARTER, numbers, PBSFS, "nbd", *map(str, arguments)]


def test_the_service_serves_on_its_sockets_until_the_last_client_leaves(place: Path) -> None:
    need("nbdkit", "nbdcopy")
    stocked = stock(place / "datastore")
    with ExitStack() as stack:
        local = stack.enter_context(listening(str(place / "s")))
        tcp = stack.enter_context(listening(("127.0.0.1", 0)))
        command = started([local, tcp], "--datastore-dir", stocked.path, IMAGE, "--filter=exitlast")
        process = stack.enter_context(
            subprocess.Popen(
                command,
                pass_fds=[local.fileno(), tcp.fileno()],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(),
            )
        )
        stack.callback(process.kill)
        uri = f"nbd+unix:///?socket={place}/s"
        other = f"nbd://127.0.0.1:{tcp.getsockname()[1]}/"
        output_of("nbdcopy", other, place / "copy")
        said, errors = process.communicate(timeout=60)
        assert (process.returncode, said, errors) == (0, f"{uri}\n", "")
    assert (place / "copy").read_bytes() == stocked.contents[IMAGE]
    assert (place / "s").exists()  # it belongs to the service manager


def test_sockets_for_another_process_are_not_taken() -> None:
    assert Address.inherited({}) is None
    assert Address.inherited({"LISTEN_PID": str(os.getppid()), "LISTEN_FDS": "1"}) is None


@pytest.mark.parametrize("number", ["", "0", "x", "1000", "-1"])
def test_a_number_of_sockets_is_checked(number: str) -> None:
    with pytest.raises(UsageError, match="not a number of sockets"):
        Address.inherited({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": number})


def test_what_does_not_listen_is_refused(place: Path) -> None:
    (place / "file").touch()
    with socket.socket(socket.AF_UNIX) as unbound, (place / "file").open() as file:
        for given, reason in ((unbound, "not a socket that listens"), (file, "not that many sockets")):
            done = run(
                started([given], "--all", "--datastore-dir", place),
                pass_fds=[given.fileno()],
            )
            assert reason in error_of(done, 2)


def test_another_address_is_refused(place: Path) -> None:
    with listening(str(place / "s")) as made:
        command = started([made], "--all", "--datastore-dir", place, "--listen", ":10810")
        done = run(command, pass_fds=[made.fileno()])
        assert "the service manager listens already; leave out --socket and --listen" in error_of(done, 2)
