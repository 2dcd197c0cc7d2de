"""nbdkit as a child: where it listens, what it is told, and whether it fits."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from pbsfs.base.errors import HelperError, UsageError, exit_status_of
from pbsfs.nbd import launch
from pbsfs.nbd.launch import Address, bridge, command_line, find_nbdkit, plugin_environment, private_socket
from tests.support.needs import need
from tests.support.program import output_of
from tests.support.waiting import wait_until

OURS = ".".join(map(str, sys.version_info[:2]))


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a path that is short enough for a socket's."""
    with TemporaryDirectory() as path:
        yield Path(path)


# --- addresses


@pytest.mark.parametrize(
    ("text", "host", "port", "uri"),
    [
        (":10810", "127.0.0.1", 10810, "nbd://127.0.0.1:10810/"),
        (":10809", "127.0.0.1", 10809, "nbd://127.0.0.1/"),
        ("127.0.0.2", "127.0.0.2", 10809, "nbd://127.0.0.2/"),
        ("127.0.0.2:1", "127.0.0.2", 1, "nbd://127.0.0.2:1/"),
        ("host.example.com:65535", "host.example.com", 65535, "nbd://host.example.com:65535/"),
        ("0.0.0.0:", "0.0.0.0", 10809, "nbd://0.0.0.0/"),
        ("[::1]", "::1", 10809, "nbd://[::1]/"),
        ("[::1]:10810", "::1", 10810, "nbd://[::1]:10810/"),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1, None),
    ],
)
def test_a_host_and_a_port_are_an_address(text: str, host: str, port: int, uri: str | None) -> None:
    address = Address.parse(text)
    assert (address.host, address.port) == (host, port)
    assert address.arguments() == [f"--ipaddr={host}", f"--port={port}"]
    assert uri is None or address.uri() == uri
    assert uri is None or address.uri(tls=True) == uri.replace("nbd:", "nbds:")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *((f":{port}", "is not a port") for port in ("0", "65536", "-1", "http", "+80", "8 0", "٨٠", "1e3")),
        ("host:99999", "'99999' is not a port"),
        ("[::1]:x", "'x' is not a port"),
        ("::1", "without brackets; write it as in [::1]:10809"),
        ("fe80::1:10809", "without brackets"),
        ("[::1:10809", "without brackets"),
        ("10809", "write a port alone as :10809"),
    ],
)
def test_what_is_no_address_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match="--listen") as caught:
        Address.parse(text)
    assert reason in str(caught.value)


NAMES = (
    "vm/100/2023-11-14T22:13:20Z/drive-scsi0.img",
    "two words, a %41 and a + sign",
    "what?#is=this&that;[]\\'\"",
    "Größe/€",
)


@pytest.mark.parametrize("name", NAMES)
def test_any_export_name_reaches_the_server_as_it_is(place: Path, name: str) -> None:
    need("nbdkit", "nbdcopy", "qemu-img")
    address = Address.of_socket(place / "a socket; more? #+='")
    command = ["nbdkit", "--foreground", "--exit-with-parent", *address.arguments(), "info", "exportname"]
    with subprocess.Popen(command) as server:
        try:
            wait_until(lambda: _listens(address), "nbdkit listens")
            output_of("nbdcopy", address.uri(name), place / "by libnbd")
            output_of("qemu-img", "convert", "-f", "raw", "-O", "raw", address.uri(name), place / "by qemu")
        finally:
            server.terminate()
    assert (place / "by libnbd").read_bytes() == name.encode()
    assert (place / "by qemu").read_bytes().rstrip(b"\0") == name.encode()  # which has whole sectors


@pytest.mark.parametrize("name", ["a&b", "50%", "a%20b"])
def test_a_socket_that_qemu_would_not_find_is_refused(place: Path, name: str) -> None:
    with pytest.raises(UsageError, match="name another path"):
        Address.of_socket(place / name)


def _listens(address: Address) -> bool:
    return address.socket is not None and address.socket.exists()


def test_a_private_socket_is_private_and_goes_away(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    with private_socket() as address:
        assert address.socket is not None
        assert address.socket.parent.parent == place
        assert stat.S_IMODE(address.socket.parent.stat().st_mode) == 0o700
        address.socket.touch()
    assert not list(place.iterdir())


def test_without_a_runtime_directory_a_private_socket_is_temporary(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(place))
    for value in (None, "", str(place / "none")):
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        if value is not None:
            monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        with private_socket() as address:
            assert address.socket is not None
            assert address.socket.parent.parent == place
    assert not list(place.iterdir())


# --- the command line


def split(*options: str) -> tuple[list[str], list[str]]:
    """Which words come before the plugin, and which behind it."""
    words = command_line("nbdkit", Address(socket=Path("/s")), options, ["path=vm/100"])
    assert words[:3] == ["nbdkit", "--foreground", "--unix=/s"]
    at = words.index("python")
    assert words[at + 1 : at + 3] == [str(bridge()), "path=vm/100"]
    return words[3:at], words[at + 3 :]


@pytest.mark.parametrize(
    ("options", "own", "of_filters"),
    [
        ("", "", ""),
        ("-t 4 -v", "-t 4 -v", ""),
        ("--filter=partition partition=1", "--filter=partition", "partition=1"),
        ("--filter partition partition=1 -t 4", "--filter partition -t 4", "partition=1"),
        ("--filter=log logfile=/a=b", "--filter=log", "logfile=/a=b"),
        (
            "--filter=cow cow-block-size=4k cow_on_read=true",
            "--filter=cow",
            "cow-block-size=4k cow_on_read=true",
        ),
        ("-D nbdkit.backend.datapath=0", "-D nbdkit.backend.datapath=0", ""),
        ("-D python.x=1 rate=1M", "-D python.x=1", "rate=1M"),
        ("--debug a=1", "--debug a=1", ""),
        ("--log=null --tls=off", "--log=null --tls=off", ""),
        ("=x", "=x", ""),
    ],
)
def test_parameters_of_filters_go_behind_the_plugin(options: str, own: str, of_filters: str) -> None:
    assert split(*options.split()) == (own.split(), of_filters.split())


def test_a_command_to_run_stays_one_word() -> None:
    assert split("--run", "x=1 echo $uri", "offset=1") == (["--run", "x=1 echo $uri"], ["offset=1"])


def test_the_plugin_finds_the_environment_that_pbsfs_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugin_environment({"A": "b"}) == {"A": "b", "VIRTUAL_ENV": sys.prefix}
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert plugin_environment({"A": "b"}) == {"A": "b"}


def test_the_plugin_lies_beside_pbsfs() -> None:
    assert bridge().name == "nbd_bridge.py"
    assert (bridge().parent / "pbsfs" / "__init__.py").exists()


# --- nbdkit itself


@pytest.fixture
def fake_nbdkit(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nbdkit that comes first on PATH; a test says what it does."""
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    return place / "nbdkit"


def refusal(script: Path, text: str) -> str:
    """The one line about an nbdkit that is this shell script."""
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    with pytest.raises(HelperError) as caught:
        find_nbdkit()
    assert exit_status_of(caught.value) == 9
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nbdkit_is_found_with_a_plugin_of_our_python() -> None:
    need("nbdkit")
    assert find_nbdkit() == shutil.which("nbdkit")


def test_without_nbdkit_the_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_arguments, **_options: None)
    with pytest.raises(HelperError) as caught:
        find_nbdkit()
    assert str(caught.value) == "nbdkit is not installed; apt install nbdkit nbdkit-plugin-python"


@pytest.mark.parametrize(
    "script",
    [
        "echo 'nbdkit: error: cannot open plugin python' >&2; exit 1",
        "echo name=python",
        "exit 0",
        f"echo python_version={OURS}.1; exit 1",
    ],
)
def test_without_the_plugin_its_package_is_named(fake_nbdkit: Path, script: str) -> None:
    text = refusal(fake_nbdkit, script)
    assert text == "nbdkit has no Python plugin; apt install nbdkit-plugin-python"


@pytest.mark.parametrize("version", ["3.1.1", "2.7.18", f"{OURS}0.2", "4.0"])
def test_a_plugin_of_another_python_is_named_with_both(fake_nbdkit: Path, version: str) -> None:
    text = refusal(fake_nbdkit, f"echo python_version={version}")
    assert f"has Python {version}, and pbsfs is installed for {OURS}; install pbsfs with python" in text
    assert f"install pbsfs with python{'.'.join(version.split('.')[:2])}, or use `pbsfs mount`" in text


def test_only_the_first_two_numbers_of_the_version_count(fake_nbdkit: Path) -> None:
    fake_nbdkit.write_text(f"#!/bin/sh\necho python_version={OURS}.99\n")
    fake_nbdkit.chmod(0o755)
    assert find_nbdkit() == str(fake_nbdkit)


# --- the child


def test_a_child_that_ends_before_it_serves_is_told_with_its_status() -> None:
    reading, writing = os.pipe()
    try:
        with launch.running(["sh", "-c", "exit 3"], [writing]) as child:
            os.close(writing)
            with pytest.raises(HelperError, match="nbdkit ended with status 3 before it served"):
                launch.wait_until_ready(child, reading)
    finally:
        os.close(reading)


def test_a_child_that_gives_its_word_is_not_waited_for_any_longer() -> None:
    reading, writing = os.pipe()
    try:
        command = ["sh", "-c", f"echo 1 >/dev/fd/{writing}; exec sleep 600"]
        with launch.running(command, [writing]) as child:
            os.close(writing)
            launch.wait_until_ready(child, reading)
            assert child.poll() is None
        assert child.returncode == -signal.SIGTERM
    finally:
        os.close(reading)


def test_a_child_that_does_not_end_by_itself_is_killed() -> None:
    command = ["sh", "-c", "trap '' TERM; exec sleep 600"]
    with launch.running(command, [], stop_time=0.05) as child:
        comm = Path(f"/proc/{child.pid}/comm")
        wait_until(lambda: comm.read_text() == "sleep\n", "it ignores SIGTERM")
    assert child.returncode == -signal.SIGKILL
