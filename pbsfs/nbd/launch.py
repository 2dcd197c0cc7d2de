"""nbdkit as a child process that serves images for as long as a command needs it.

Synchronous; used by commands. With `--exit-with-parent`, nbdkit also ends when this process is killed.
"""

from __future__ import annotations

import importlib.util
import os
import select
import shutil
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pbsfs.base.errors import HelperError, UsageError
from pbsfs.runtime.places import private_directory
from pbsfs.runtime.process import signals_held_back

STOP_TIME = 10.0
"""Seconds that nbdkit and QEMU may take to end after SIGTERM; they wait for requests that are under way."""

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 10809
"""IANA's port for NBD."""

LISTEN_PID = "LISTEN_PID"
LISTEN_FDS = "LISTEN_FDS"
"""The variables of sd_listen_fds(3): for which process the sockets are, and how many."""

MAX_SOCKETS = 64

_FOR_CHILD = 'LISTEN_PID=$$ exec "$0" "$@"'
"""A shell's script that runs nbdkit under the number of the shell's process, which only the child knows."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where nbdkit listens: on a Unix socket if there is one, otherwise on TCP.

    `descriptors`: the sockets, from 3 on, on which a service manager listens already (sd_listen_fds(3)).
    """

    socket: Path | None = None
    host: str = LOOPBACK
    port: int = DEFAULT_PORT
    descriptors: tuple[int, ...] = ()

    @classmethod
    def of_socket(cls, path: Path) -> Address:
        """A Unix socket. Raises UsageError for a path that some clients cannot read from a URI.

        QEMU 10 decodes the query of a URI twice, QEMU 7.2 and libnbd decode it once, so no form of these two
        characters works with all of them.
        """
        if any(c in "%&" for c in str(path)):
            raise UsageError(
                f"{path}: QEMU cannot use a socket whose path has a '%' or '&'; name another path"
            )
        return cls(socket=path)

    @classmethod
    def parse(cls, text: str) -> Address:
        """`HOST`, `HOST:PORT`, `:PORT` (loopback) or `[IPV6]:PORT`. Raises UsageError."""
        host, colon, port = text.rpartition(":")
        if not colon or text.endswith("]"):
            host, port = text, ""
        in_brackets = host.startswith("[") and host.endswith("]")
        host = host[1:-1] if in_brackets else host
        if ":" in host and not in_brackets:
            raise UsageError(
                f"--listen {text}: IPv6 address without brackets; write it as in [::1]:{DEFAULT_PORT}"
            )
        if host.isdigit():
            raise UsageError(f"--listen {text}: not a host; write a port alone as :{host}")
        host = host or LOOPBACK
        if not port:
            return cls(host=host)
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
            raise UsageError(f"--listen {text}: '{port}' is not a port; give one from 1 to 65535")
        return cls(host=host, port=int(port))

    @classmethod
    def inherited(cls, environment: Mapping[str, str]) -> Address | None:
        """The first of the sockets that the service manager started this process with; None without any.

        Raises UsageError for what is not a socket that listens.
        """
        if environment.get(LISTEN_PID) != str(os.getpid()):
            return None
        number = environment.get(LISTEN_FDS, "")
        if not (number.isascii() and number.isdigit() and 0 < int(number) <= MAX_SOCKETS):
            raise UsageError(f"{LISTEN_FDS}={number}: not a number of sockets; start pbsfs by a socket unit")
        descriptors = tuple(range(3, 3 + int(number)))
        try:
            for fd in descriptors:
                with socket.socket(fileno=os.dup(fd)) as listening:
                    if not listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        raise UsageError(f"descriptor {fd}: not a socket that listens; set Accept=no")
            with socket.socket(fileno=os.dup(3)) as first:
                name, is_local = first.getsockname(), first.family == socket.AF_UNIX
        except OSError as error:
            raise UsageError(
                f"{LISTEN_FDS}={number}: not that many sockets ({error.strerror}); correct the socket unit"
            ) from None
        if is_local:
            return cls(socket=Path(os.fsdecode(name)), descriptors=descriptors)
        return cls(host=name[0], port=name[1], descriptors=descriptors)

    def arguments(self) -> list[str]:
        """The address in nbdkit's options."""
        if self.descriptors:
            return []
        if self.socket is not None:
            return [f"--unix={self.socket}"]
        return [f"--ipaddr={self.host}", f"--port={self.port}"]

    def uri(self, export: str = "", *, tls: bool = False) -> str:
        """The NBD URI of an export here (the NBD project's doc/uri.md)."""
        scheme = "nbds" if tls else "nbd"
        name = urllib.parse.quote(export)
        if self.socket is not None:
            return f"{scheme}+unix:///{name}?socket={urllib.parse.quote(str(self.socket))}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port != DEFAULT_PORT else ""
        return f"{scheme}://{host}{port}/{name}"


@contextmanager
def private_socket() -> Iterator[Address]:
    """A Unix socket that only this user can reach; removed at the end. Raises HelperError."""
    with private_directory() as directory:
        yield Address.of_socket(directory / "nbd.sock")


def find_nbdkit() -> str:
    """The path of an nbdkit that can run the plugin. Raises HelperError, which says what to install."""
    nbdkit = shutil.which("nbdkit") or shutil.which("nbdkit", path="/usr/sbin:/sbin:/usr/local/sbin")
    if nbdkit is None:
        raise HelperError("nbdkit is not installed; apt install nbdkit nbdkit-plugin-python")
    done = subprocess.run(
        [nbdkit, "python", "--dump-plugin"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    shown = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    version = shown.get("python_version")
    if done.returncode != 0 or version is None:
        raise HelperError("nbdkit has no Python plugin; apt install nbdkit-plugin-python")
    if tuple(version.split(".")[:2]) != tuple(map(str, sys.version_info[:2])):
        ours = ".".join(map(str, sys.version_info[:2]))
        raise HelperError(
            f"nbdkit's Python plugin has Python {version}, and pbsfs is installed for {ours}; install pbsfs "
            f"with python{'.'.join(version.split('.')[:2])}, or use `pbsfs mount` and nbdkit's file plugin"
        )
    return nbdkit


def bridge() -> Path:
    """The plugin's script. Raises HelperError if it was not installed with pbsfs."""
    found = importlib.util.find_spec("nbd_bridge")
    if found is None or found.origin is None:
        raise HelperError("nbd_bridge.py: missing beside pbsfs; install pbsfs again")
    return Path(found.origin)


def command_line(
    nbdkit: str, address: Address, options: Sequence[str], parameters: Sequence[str]
) -> list[str]:
    """The command that serves. `options`: for nbdkit; they may contain parameters of filters."""
    own: list[str] = []
    of_filters: list[str] = []
    previous = ""
    for word in options:
        name, equals, _value = word.partition("=")
        is_parameter = equals and name.replace("-", "").replace("_", "").isalnum() and word[0] != "-"
        (of_filters if is_parameter and previous not in ("-D", "--debug", "--run") else own).append(word)
        previous = word
    sockets = len(address.descriptors)
    return [
        *(("env", f"{LISTEN_FDS}={sockets}", "/bin/sh", "-c", _FOR_CHILD) if sockets else ()),
        *(nbdkit, "--foreground", *address.arguments(), *own),
        *("python", str(bridge()), *parameters, *of_filters),
    ]


def plugin_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment`, extended so that nbdkit's interpreter finds this installation of pbsfs."""
    if sys.prefix == sys.base_prefix:
        return dict(environment)
    return {**environment, "VIRTUAL_ENV": sys.prefix}


@contextmanager
def running(
    arguments: Sequence[str], descriptors: Sequence[int], *, stop_time: float = STOP_TIME
) -> Iterator[subprocess.Popen[bytes]]:
    """nbdkit as a child, which is stopped at the end if it still runs."""
    with ExitStack() as stack:
        with signals_held_back():
            child = subprocess.Popen(
                list(arguments), stdin=None, pass_fds=list(descriptors), env=plugin_environment(os.environ)
            )
            stack.callback(stop, child, stop_time)
        yield child


def stop(child: subprocess.Popen[bytes], stop_time: float = STOP_TIME) -> None:
    """Ends a child that still runs: by SIGTERM, and after `stop_time` seconds by SIGKILL."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(stop_time)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def ending(program: str, status: int, *, before: str = "") -> HelperError:
    """The error for a program that ended with `status`, as in `Popen.returncode`, without being stopped."""
    if status < 0:
        return HelperError(f"{program} was ended{before} by signal {-status}; start it again")
    return HelperError(
        f"{program} ended with status {status}{before}; correct what its own message above names"
    )


def wait_until_ready(child: subprocess.Popen[bytes], ready: int) -> None:
    """Waits for the byte on the pipe `ready` by which the plugin reports that clients can connect.

    Raises HelperError if nbdkit ends before that.
    """
    ended = os.pidfd_open(child.pid)
    try:
        poll = select.poll()
        poll.register(ready, select.POLLIN)
        poll.register(ended, select.POLLIN)
        events = [fd for fd, _event in poll.poll()]
        if ready not in events or not os.read(ready, 1):
            raise ending("nbdkit", child.wait(), before=" before it served")
    finally:
        os.close(ended)
