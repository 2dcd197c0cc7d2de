"""The life of a nbdkit with the plugin: what it refuses to start with, how it ends, what it keeps secret."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pbsfs import __version__
from pbsfs.testing.writer import DatastoreWriter
from tests.nbd.disks import MIB, ONE, Disk
from tests.support import made
from tests.support.large import large_images
from tests.support.mounts import is_running
from tests.support.nbd import (
    AT_ONCE,
    LIFETIME,
    PLUGIN,
    READ,
    Client,
    NbdError,
    command,
    connected,
    has_content,
    nbdkit,
    refused,
    serving_at,
)
from tests.support.needs import need, need_root
from tests.support.program import environment, output_of, run
from tests.support.server import ReferenceServer
from tests.support.serving import PASSWORD, TOKEN, USER, access, serving, without
from tests.support.stocked import IMAGE, Stocked
from tests.support.strangers import closed_port
from tests.support.terminal import at_a_terminal
from tests.support.waiting import wait_until

PROGRAM_BUDGET = 150 * MIB
"""What it may take besides its cache."""


@pytest.fixture(scope="module")
def server(stocked: Stocked) -> Iterator[ReferenceServer]:
    with serving(stocked.path) as found:
        yield found


# --- a limited rate


def test_with_a_tiny_rate_a_read_waits_and_nbdkit_ends_in_order(stocked: Stocked) -> None:
    with nbdkit(stocked.path, *ONE, "limit_rate=1") as server:
        failures: list[BaseException] = []

        def read() -> None:
            try:
                server.read()
            except (OSError, EOFError, NbdError) as error:
                failures.append(error)

        reading = threading.Thread(target=read, daemon=True)
        reading.start()
        client = connected(server.socket)  # a second one is greeted while the first waits
        assert client.recv(8) == b"NBDMAGIC"
        client.close()
        server.process.terminate()
        reading.join(AT_ONCE)
        assert not reading.is_alive()
        assert failures
        server.log_lines()
        server.check_end()


# --- what it refuses to start with


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("vmid=100 nonsense=1", "parameter 'nonsense': unknown; use profile, repo, "),
        ("vmid=100 image=drive-scsi0.img", "timestamp= is missing; vm/100 has 2023-11-14T22:13:20Z, 2023-"),
        (
            "vmid=100 timestamp=2020-01-01T00:00:00Z",
            "there is no '2020-01-01T00:00:00Z'; there is 2023-11-14T",
        ),
        ("vmid=100 timestamp=latest image=x", "there is no 'x'; there is drive-scsi0.img"),
        ("vmid=99 timestamp=latest image=x", "there is no '99'; there is 100, 101"),
        ("type=vm image=x", "id= is missing; vm has 100, 101"),
        ("path=vm/100/latest/index.json", "is not an image, but a file"),
        ("namespace=none vmid=100", "none"),
        (
            "vmid=101 timestamp=latest image=drive-scsi0.img",
            f"is encrypted with the key {made.KEY.fingerprint}",
        ),
        ("keyfile=/nowhere/key.json", "key file /nowhere/key.json: No such file or directory"),
    ],
)
def test_what_cannot_be_served_is_one_line_before_it_starts(
    stocked: Stocked, words: str, reason: str
) -> None:
    assert reason in refused(stocked.path, *words.split())


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "No such file or directory" in refused(tmp_path / "none")
    assert str(tmp_path) in refused(tmp_path)


@pytest.mark.parametrize("name", ["cow", "cache", "cacheextents"])
def test_a_filter_that_would_mix_up_images_is_refused(stocked: Stocked, name: str) -> None:
    said = refused(stocked.path, "vmid=100", "timestamp=latest", options=[f"--filter={name}"])
    assert f"filter {name} does not support multiple exports" in said
    assert "drive-scsi0.img" in said


def test_no_source_and_no_password_are_refused(server: ReferenceServer) -> None:
    assert "repo= or PBS_REPOSITORY" in refused(environment(), *ONE)
    told = without(access(server), "PBS_PASSWORD")
    assert "no password" in refused(told, *ONE)


def test_a_server_that_refuses_is_one_line_before_it_starts(server: ReferenceServer) -> None:
    assert "does not accept reader@pbs" in refused(access(server, USER, "wrong"), *ONE)
    assert "does not accept reader@pbs!laptop" in refused(access(server, TOKEN, PASSWORD), *ONE)
    other = ":".join(["00"] * 32)
    said = refused(access(server, PBS_FINGERPRINT=other), *ONE)
    assert "fingerprint" in said
    assert server.fingerprint in said.lower()
    said = refused(access(server), *ONE, f"repo={server.repository(USER, store='store9')}")
    assert "store9" in said


def test_a_server_that_is_not_there_is_one_line_and_not_waited_for(server: ReferenceServer) -> None:
    with closed_port() as port:
        said = refused(access(server, PBS_REPOSITORY=f"{USER}@127.0.0.1:{port}:store1"), *ONE)
    assert "Connection refused" in said


def test_a_socket_that_cannot_be_made_is_an_error(stocked: Stocked, tmp_path: Path) -> None:
    done = run(command(stocked.path, *ONE, options=["-f", "-U", tmp_path / "none" / "socket"]))
    assert done.returncode == 1
    assert "No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_it_is_can_be_asked() -> None:
    shown = output_of(*command(None, options=["--dump-plugin"]))
    lines = shown.splitlines()
    assert f"pbsfs_version={__version__}" in lines
    assert "thread_model=parallel" in lines


# --- secrets


def traces_of(pid: int) -> bytes:
    """All that others can see of a process."""
    return b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ", "comm"))


@pytest.mark.parametrize("form", ["password=+FILE", "password=-FD", "PBS_PASSWORD_FILE", "PBS_PASSWORD_FD"])
def test_a_password_is_seen_nowhere(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path, form: str
) -> None:
    need_root("look at another process' environment")
    file = tmp_path / "secret"
    file.write_text(f"{PASSWORD}\n")
    fd = os.open(file, os.O_RDONLY)
    word, environment_has = {
        "password=+FILE": (f"password=+{file}", {}),
        "password=-FD": (f"password=-{fd}", {}),
        "PBS_PASSWORD_FILE": ("namespace=", {"PBS_PASSWORD_FILE": str(file)}),
        "PBS_PASSWORD_FD": ("namespace=", {"PBS_PASSWORD_FD": str(fd)}),
    }[form]
    told = without(access(server), "PBS_PASSWORD") | environment_has
    try:
        with nbdkit(told, *ONE, word, pass_fds=[fd]) as found:
            file.unlink()  # it was read
            assert found.read() == stocked.contents[IMAGE]
            seen = traces_of(found.pid)
            assert b"nbdkit" in seen
            assert PASSWORD.encode() not in seen
    finally:
        os.close(fd)


def test_a_plain_password_works_and_is_warned_of(server: ReferenceServer, stocked: Stocked) -> None:
    with nbdkit(without(access(server), "PBS_PASSWORD"), *ONE, f"password={PASSWORD}") as found:
        (line,) = found.log_lines()
        assert line.startswith("pbsfs: WARNING: ")
        assert "can be read by every user" in line
        assert PASSWORD not in line
        assert found.read() == stocked.contents[IMAGE]


@pytest.mark.parametrize("way", ["parameter", "variable"])
def test_the_log_can_be_json(server: ReferenceServer, way: str) -> None:
    told = without(access(server), "PBS_PASSWORD") | (
        {"PBSFS_LOG_FORMAT": "json"} if way == "variable" else {}
    )
    words = ["log-format=json"] if way == "parameter" else []
    with nbdkit(told, f"password={PASSWORD}", *ONE, *words) as found:
        entries = [json.loads(line) for line in found.log_lines()]
    (entry,) = entries
    expected = {"level": "warning", "logger": "pbsfs.nbd.parameters"}
    assert expected.items() <= entry.items()
    assert "can be read by every user" in entry["message"]


def sized(*words: str) -> list[str]:
    """A command that starts nbdkit, and nbdinfo with it, which prints the size of the export."""
    need("nbdinfo")
    options = ["-U", "-", "--run", 'nbdinfo --size "$uri"']
    plugin = command(None, *ONE, *words)
    return [plugin[0], *options, *plugin[1:]]


def test_a_password_is_read_from_a_pipe(server: ReferenceServer, stocked: Stocked) -> None:
    told = without(access(server), "PBS_PASSWORD")
    done = run(sized("password=-"), env=told, stdin=None, input=f"{PASSWORD}\nrest\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == len(stocked.contents[IMAGE])


def test_a_password_is_asked_for_at_a_terminal_and_not_shown(
    server: ReferenceServer, stocked: Stocked
) -> None:
    told = without(access(server), "PBS_PASSWORD")
    status, shown = at_a_terminal(sized("password=-"), [("password: ", PASSWORD)], told)
    assert status == 0
    assert shown == f"password: \n{len(stocked.contents[IMAGE])}\n"


# --- how it lives and ends


@pytest.mark.parametrize("relative", [False, True])
def test_it_serves_in_the_background_and_a_signal_ends_it(
    stocked: Stocked, tmp_path: Path, relative: bool
) -> None:
    place, pidfile = tmp_path / "socket", tmp_path / "pid"
    source = Path(os.path.relpath(stocked.path, tmp_path)) if relative else stocked.path
    line = command(source, *ONE, options=["-U", place, "--pidfile", pidfile])
    done = run(line, cwd=tmp_path)
    try:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        wait_until(lambda: has_content(pidfile), "it serves")
        pid = int(pidfile.read_text())
        assert serving_at(place) == [pid]
        with Client(connected(place)) as client:
            assert client.read_all() == stocked.contents[IMAGE]
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_running(pid), "it ends", limit=AT_ONCE)
    finally:
        for pid in serving_at(place):
            os.kill(pid, signal.SIGKILL)


def test_a_server_is_served_from_in_the_background_too(
    server: ReferenceServer, stocked: Stocked, tmp_path: Path
) -> None:
    place, pidfile = tmp_path / "socket", tmp_path / "pid"
    (tmp_path / "secret").write_text(PASSWORD)
    told = without(access(server), "PBS_PASSWORD")
    line = command(None, *ONE, f"password=+{tmp_path}/secret", options=["-U", place, "--pidfile", pidfile])
    done = run(line, env=told)
    try:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        wait_until(lambda: has_content(pidfile), "it serves")
        with Client(connected(place)) as client:
            assert client.read_all() == stocked.contents[IMAGE]
        (pid,) = serving_at(place)
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_running(pid), "it ends", limit=AT_ONCE)
        wait_until(lambda: not server.open_sessions(), "the session ends with it")
    finally:
        for pid in serving_at(place):
            os.kill(pid, signal.SIGKILL)


def test_it_ends_with_its_parent_where_that_was_asked_for(stocked: Stocked, tmp_path: Path) -> None:
    place, pidfile = tmp_path / "socket", tmp_path / "pid"
    options: list[str | Path] = ["-f", "--exit-with-parent", "-U", place, "--pidfile", pidfile]
    line = ["sh", "-c", '"$@" & wait', "sh", *command(stocked.path, *ONE, options=options)]
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, env=environment()) as parent:
        try:
            wait_until(lambda: has_content(pidfile), "it serves")
            pid = int(pidfile.read_text())
            with Client(connected(place)) as client:
                assert client.read(0, 512) == stocked.contents[IMAGE][:512]
            parent.kill()
            wait_until(lambda: not is_running(pid), "it ends", limit=AT_ONCE)
        finally:
            parent.kill()
            for pid in serving_at(place):
                os.kill(pid, signal.SIGKILL)


def test_a_signal_ends_it_in_the_middle_of_reads(large: Disk) -> None:
    with nbdkit(large.path, *ONE, "cache_size=32M") as server:
        clients = [server.connect() for _ in range(16)]
        for number, client in enumerate(clients):
            client.start(READ, number * 5 * MIB, MIB)
        server.process.terminate()
        for client in clients:  # nbdkit waits for those that stay
            client.abandon()
        server.log_lines()
        server.check_end(limit=AT_ONCE)


BRIDGE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("nbd_bridge", {PLUGIN!r})
bridge = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bridge)
globals().update({{name: value for name, value in vars(bridge).items() if not name.startswith("__")}})
"""
"""A plugin that is the bridge, for tests to change."""

BROKEN_LOOP = """
def pread(export, buffer, offset, flags):
    bridge._serving().loop._token.run_sync_soon(lambda: 1 / 0)
"""


def test_it_ends_with_an_error_when_its_loop_has_failed(stocked: Stocked, tmp_path: Path) -> None:
    plugin = tmp_path / "broken.py"
    plugin.write_text(BRIDGE + BROKEN_LOOP)
    place = tmp_path / "socket"
    words = command(stocked.path, f"path={IMAGE}", options=["-f", "-U", place], plugin=str(plugin))
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(LIFETIME, process.kill)
        watchdog.start()
        try:
            wait_until(place.is_socket, "nbdkit serves")
            with connected(place) as connection:
                Client(connection).start(READ, 0, 512)
                _output, errors = process.communicate()  # with the client still connected
        finally:
            watchdog.cancel()
    assert process.returncode == 1
    assert "serving failed; nbdkit ends" in errors


OTHER_ERRORS = """
import traceback

def dump_plugin():
    try:
        raise PbsfsError("of other code")
    except PbsfsError as error:
        forms = (error,), (PbsfsError, error, error.__traceback__)
    for form in forms:
        print(traceback.format_exception(*form))
    try:
        bridge._serving()
    except IndexError as error:
        print(traceback.format_exception(IndexError, error, error.__traceback__))
"""


def test_only_what_a_callback_raises_on_purpose_is_formatted_as_one_line(tmp_path: Path) -> None:
    plugin = tmp_path / "other.py"
    plugin.write_text(BRIDGE + OTHER_ERRORS)
    shown = output_of(*command(None, options=["--dump-plugin"], plugin=str(plugin)))
    lists = [line for line in shown.splitlines() if line.startswith("[")]
    assert len(lists) == 3
    assert all(line.startswith("['Traceback (most recent call last):") for line in lists)


def test_it_keeps_no_core_dump_and_no_other_user_looks_into_it(stocked: Stocked) -> None:
    need_root("look at another process' limits")
    with nbdkit(stocked.path, *ONE) as server:
        assert server.read()
        limits = Path(f"/proc/{server.pid}/limits").read_text()
        (line,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
        assert line.split()[4:6] == ["0", "0"]


# --- memory


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    """A disk of 256 MiB in chunks of 4 MiB, all different, which takes little room."""
    base = tmp_path_factory.mktemp("long")
    with (base / "image").open("wb") as file:
        for number in range(64):
            file.write(b"%064d" % number * (4 * MIB // 64))
    DatastoreWriter(base / "datastore").add_snapshot(
        made.snapshot(), {"drive-scsi0.img.fidx": base / "image"}
    )
    (base / "image").unlink()
    return Disk(base / "datastore", b"")


def test_memory_is_bounded_however_many_exports_are_open(writer: DatastoreWriter) -> None:
    count, size, limit = 110, 1 << 40, 256 * MIB
    data = b"data" * MIB
    names = large_images(writer, data, size=size, count=count)
    assert count * size // len(data) * 32 > 2 * (32 * MIB + PROGRAM_BUDGET + limit)
    with nbdkit(writer.path, "cache_size=32M", "path=/") as found, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(found.connect(name)) for name in names]
        for offset in (5, size - 5000):  # all tables were dropped and fetched again by the second
            for client in clients:
                assert client.read(offset, 4) == (data * 2)[offset % 4 :][:4]
        peak = found.status("VmHWM") << 10
    assert peak < 32 * MIB + PROGRAM_BUDGET + limit, f"{peak / MIB:.0f} MiB"


@pytest.mark.parametrize("source", ["directory", "server"])
def test_memory_is_bounded_however_much_is_read(long: Disk, source: str) -> None:
    connections, step = 16, 256 << 10

    def read(number: int, barrier: threading.Barrier) -> None:
        # Each begins elsewhere, in sequence, with four requests under way.
        with found.connect() as client:
            barrier.wait(LIFETIME)
            start = number * client.size // connections
            for at in range(0, client.size // 4, 4 * step):
                offsets = [(start + at + by * step) % client.size for by in range(4)]
                for cookie, offset in [(client.start(READ, at, step), at) for at in offsets]:
                    chunk, inside = divmod(offset, 4 * MIB)
                    assert inside % 64 == 0
                    assert client.finish(cookie).data == b"%064d" % chunk * (step // 64)

    with serving(long.path) as server:
        told = long.path if source == "directory" else access(server)
        with nbdkit(told, *ONE, "cache_size=32M") as found:
            barrier = threading.Barrier(connections)
            with concurrent.futures.ThreadPoolExecutor(connections) as pool:
                for reader in [pool.submit(read, number, barrier) for number in range(connections)]:
                    reader.result()
            peak = found.status("VmHWM") << 10
    assert peak < 32 * MIB + PROGRAM_BUDGET, f"{peak / MIB:.0f} MiB"


def test_a_client_of_large_requests_keeps_no_other_out(large: Disk) -> None:
    """Each request that is under way has a thread of nbdkit, with a buffer of its own."""
    size, count = 32 * MIB, 10
    assert count * size > 256 * MIB + 32 * MIB
    with nbdkit(large.path, *ONE, "cache_size=32M") as found, found.connect() as client:
        for cookie in [client.start(READ, number * MIB, size) for number in range(count)]:
            assert client.finish(cookie).error is None
        with found.connect() as other:
            assert other.read(5, 100) == large.content[5:105]
