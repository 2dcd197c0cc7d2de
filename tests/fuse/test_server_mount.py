"""Mounts of a server: the bytes, what is allowed, a server that goes away, and what a mount costs it."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pbsfs.base.names import MANIFEST, Namespace
from pbsfs.formats import blob
from pbsfs.testing.writer import DatastoreWriter
from pbsfs.tree.tree import DEFAULT_REFRESH
from tests.support import golden, made
from tests.support.mounts import Mounted, fails_with, mounted, opened, read_at
from tests.support.needs import need_root
from tests.support.program import PBSFS, error_of, output_of, pbsfs
from tests.support.server import OWN_GROUPS, READER, Hold, ReferenceServer
from tests.support.serving import PASSWORD, SECRET, STORE, TOKEN, USER, WAYS_IN, access, serving
from tests.support.stocked import (
    ARCHIVE,
    CONFIGURATION,
    FIRST,
    IMAGE,
    IN_NAMESPACE,
    LOG,
    NEWER_IMAGE,
    Stocked,
)
from tests.support.sums import sum_of
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount

MIB = 1 << 20
CHUNK = 4 * MIB
CHUNKS = 40
BIG = "vm/100/2023-11-14T22:13:20Z/drive-scsi0.img"
SMALL_CACHE = ("--cache-size", "32M")
"""Much less than the image, so that readers need the server all the time."""

AT_ONCE = 10.0
"""Seconds; what has to wait for a server takes the 120 of `--retry-timeout`."""

READABLE = [original for original in golden.originals() if not original.encrypted]
SPARSE = "vm/105/2023-11-14T23:13:24Z/drive-sata0.img"
DISK = "vm/100/2023-11-14T22:13:20Z/drive-scsi0.img"

ONE_SESSION = ("--connections", "1")
"""A busy machine takes long to answer, and pbsfs then opens more sessions, as for a distant server."""

each_way_in = pytest.mark.parametrize("who", WAYS_IN)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore with an image of 160 MiB that takes little room; no test changes it."""
    base = tmp_path_factory.mktemp("big")
    with (base / "image").open("wb") as file:
        for number in range(CHUNKS):
            file.write(b"%064d" % number * (CHUNK // 64))
    DatastoreWriter(base / "datastore").add_snapshot(
        made.snapshot(), {"drive-scsi0.img.fidx": base / "image", "second.img.fidx": b"%064d" % 7 * 1024}
    )
    (base / "image").unlink()
    return base / "datastore"


@pytest.fixture
def big_server(big: Path) -> Iterator[ReferenceServer]:
    with serving(big) as found:
        yield found


@pytest.fixture(scope="module")
def idling(big: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ReferenceServer, Mounted]]:
    """A mount of its own, in which something was read once: it is left alone while other tests run."""
    with (
        serving(big) as server,
        mounted(access(server), tmp_path_factory.mktemp("idling") / "m", *ONE_SESSION, lifetime=300) as mount,
    ):
        yield server, mount


@pytest.fixture(scope="module")
def golden_server() -> Iterator[ReferenceServer]:
    with serving(golden.DATASTORE) as found:
        yield found


def apparent_blocks(size: int) -> int:
    return -(-size // 512)


# --- what a server allows


@pytest.mark.parametrize("limit", [200, 10])
def test_an_image_of_small_chunks_is_read_whatever_the_server_allows_at_once(
    tmp_path: Path, limit: int
) -> None:
    content = b"".join(b"%064d" % number * 1024 for number in range(600))
    DatastoreWriter(tmp_path / "datastore").add_snapshot(
        made.snapshot(), {"drive-scsi0.img.fidx": content}, chunk_size=64 << 10
    )
    with serving(tmp_path / "datastore") as server:
        server.sessions.max_streams = limit
        with mounted(access(server), tmp_path / "m", *ONE_SESSION) as mount:
            assert sum_of(mount / BIG) == hashlib.sha256(content).hexdigest()
            assert mount.log_lines() == []
        (session,) = server.sessions.all()
    assert (session.refused, session.peak <= limit) == (0, True)
    assert server.requests.count("/chunk") == 600


# --- what a mount costs the server


def test_reading_opens_one_session_for_all_images_of_a_snapshot(
    idling: tuple[ReferenceServer, Mounted],
) -> None:
    server, mount = idling
    assert read_at(mount / BIG, 0, 64) == b"%064d" % 0
    assert (mount / BIG).with_name("second.img").read_bytes() == b"%064d" % 7 * 1024
    assert read_at(mount / BIG, 5 * CHUNK, 64) == b"%064d" % 5
    (session,) = server.sessions.all()
    assert str(session.snapshot) == str(Path(BIG).parent)


@each_way_in
def test_looking_at_everything_opens_no_session(own: Stocked, tmp_path: Path, who: str) -> None:
    with serving(own.path) as server, mounted(access(server, who), tmp_path / "m", *ONE_SESSION) as mount:
        shown = output_of("ls", "-lRn", str(mount.place))
        assert shown.count("drive-scsi0.img") == 4
        output_of("find", str(mount.place), "-printf", "%s %b %T@ %n\n")
        output_of("du", "-a", str(mount.place))
        os.statvfs(mount.place)
        assert (mount / CONFIGURATION).read_bytes() == own.contents[CONFIGURATION]
        assert (mount / LOG).read_bytes() == own.contents[LOG]
        assert server.sessions.all() == []
        assert read_at(mount / IMAGE, 0, 1) == own.contents[IMAGE][:1]
        assert len(server.sessions.all()) == 1


def test_mounting_asks_the_server_a_few_things_and_listing_it_one_for_each_group(
    own: Stocked, tmp_path: Path
) -> None:
    for day in range(2, 30):
        own.writer.add_snapshot(made.snapshot(time=made.TIME + day * made.DAY), {"a.img.fidx": b"x" * 512})
    options = ("--refresh", "600")
    with serving(own.path) as server, mounted(access(server), tmp_path / "m", *options) as mount:
        assert server.requests.count() <= 6
        server.requests.clear()
        output_of("find", str(mount.place))
        asked = [record.path.rpartition("/")[2] for record in server.requests.all()]
        assert asked.count("snapshots") == 4
        assert asked.count("groups") == 2
        assert len(asked) <= 4 + 2 + 2
        server.requests.clear()
        shown = output_of("ls", "-lR", str(mount.place))
        blobs = sum(shown.count(f" {name}\n") for name in ("index.json", "qemu-server.conf", "client.log"))
        asked = [record.path.rpartition("/")[2] for record in server.requests.all()]
        assert asked == ["download"] * blobs
        server.requests.clear()
        output_of("ls", "-lR", str(mount.place))
        assert server.requests.count() == 0


def test_opening_over_and_over_leaves_nothing_behind(own: Stocked, tmp_path: Path) -> None:
    need_root("look into a process that keeps its memory to itself")

    def held(mount: Mounted) -> tuple[int, int]:
        status = Path(f"/proc/{mount.pid}/status").read_text()
        threads = int(status.partition("Threads:")[2].split()[0])
        return len(os.listdir(f"/proc/{mount.pid}/fd")), threads

    with serving(own.path) as server, mounted(access(server), tmp_path / "m", "--refresh", "0") as mount:
        for path, content in own.contents.items():
            assert (mount / path).read_bytes() == content
        before = held(mount)
        for _ in range(50):
            server.drop_connections()
            for path, content in own.contents.items():
                assert read_at(mount / path, 0, 9) == content[:9]
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        descriptors, threads = held(mount)
        assert descriptors <= before[0] + 10
        assert threads <= before[1] + 10
        assert len(server.open_sessions()) <= len(own.contents)
        mount.log_lines()


# --- every byte


@pytest.mark.golden
@each_way_in
def test_every_readable_file_is_the_original(
    golden_server: ReferenceServer, tmp_path: Path, who: str
) -> None:
    assert len(READABLE) > 15
    assert {name.count("ns/") for name in (original.path for original in READABLE)} == {0, 1, 2}
    with mounted(access(golden_server, who), tmp_path / "m") as mount:
        for original in READABLE:
            path = mount / original.path
            before = path.stat()
            if path.suffix in (".img", ".pxar"):
                assert before.st_size == original.size
                assert before.st_blocks == apparent_blocks(original.size)
            assert sum_of(path) == original.sha256, original.path
            assert path.stat().st_size == original.size
            assert path.stat().st_blocks <= apparent_blocks(original.size)
        assert (mount / SPARSE).stat().st_blocks == 2 * CHUNK // 512
    assert {record.user for record in golden_server.requests.all() if record.user} <= set(WAYS_IN)


@pytest.mark.golden
@each_way_in
@pytest.mark.parametrize("namespace", ["prod", "prod/db"])
def test_a_nested_namespace_can_be_the_root(
    golden_server: ReferenceServer, tmp_path: Path, who: str, namespace: str
) -> None:
    prefix = "".join(f"ns/{part}/" for part in namespace.split("/"))
    inside = [original for original in READABLE if original.path.startswith(prefix)]
    assert inside
    with mounted(access(golden_server, who), tmp_path / "m", "--ns", namespace) as mount:
        for original in inside:
            assert sum_of(mount / original.path.removeprefix(prefix)) == original.sha256


@pytest.mark.golden
def test_the_tools_people_use_get_the_original(golden_server: ReferenceServer, tmp_path: Path) -> None:
    disk = next(original for original in READABLE if original.path == DISK)
    copy = tmp_path / "copy"
    with mounted(access(golden_server), tmp_path / "m") as mount:
        output_of("cp", "--sparse=auto", str(mount / SPARSE), str(copy))  # the first who opens it
        assert copy.stat().st_size == 1 << 30
        assert copy.stat().st_blocks * 512 <= 9 * MIB
        copy.unlink()
        assert output_of("dd", f"if={mount / DISK}", f"of={copy}", "bs=64k", "status=none") == ""
        assert sum_of(copy) == disk.sha256
        with opened(mount / DISK) as fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            assert hashlib.sha256(mapped).hexdigest() == disk.sha256
            assert mapped[-1536:] == copy.read_bytes()[-1536:]
    copy.unlink()


def by_size(path: Path) -> bytes:
    """As archivers read: as many bytes as a stat told before the file was opened."""
    size = path.lstat().st_size
    with path.open("rb", buffering=0) as file:
        return file.read(size)


def by_map(path: Path) -> bytes:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        return mapped[:]


def by_sendfile(path: Path) -> bytes:
    """Past the page cache's own look at the size; opened without a stat before."""
    with opened(path) as fd, tempfile.TemporaryFile() as copy:
        while os.sendfile(copy.fileno(), fd, None, 1 << 20):
            pass
        copy.seek(0)
        return copy.read()


def by_tar(path: Path) -> bytes:
    archive = run_bytes("tar", "-cf", "-", "-C", str(path.parent), path.name)
    return run_bytes("tar", "-xOf", "-", stdin=archive)


def by_cp(path: Path) -> bytes:
    with tempfile.TemporaryDirectory() as place:
        output_of("cp", str(path), place)
        return Path(place, path.name).read_bytes()


def run_bytes(*command: str, stdin: bytes | None = None) -> bytes:
    return subprocess.run(command, input=stdin, capture_output=True, check=True, timeout=60).stdout


WAYS_TO_READ: dict[str, Callable[[Path], bytes]] = {
    "read": Path.read_bytes,
    "size": by_size,
    "map": by_map,
    "sendfile": by_sendfile,
    "cat": lambda path: run_bytes("cat", str(path)),
    "cp": by_cp,
    "tar": by_tar,
    "dd": lambda path: run_bytes("dd", f"if={path}", "bs=16", "status=none"),
    "grep": lambda path: run_bytes("grep", "", str(path)),
}

each_way_to_read = pytest.mark.parametrize("way", WAYS_TO_READ)


@each_way_to_read
def test_small_files_that_nobody_looked_at_before_are_read_whole(
    own: Stocked, tmp_path: Path, way: str
) -> None:
    with serving(own.path) as server, mounted(access(server), tmp_path / "m") as mount:
        expected = []
        for number, name in enumerate(("qemu-server.conf", "client.log", "index.json") * 2):
            text = b"memory: %d\n" % number * 300
            snapshot = made.snapshot("small", time=made.TIME + number * made.DAY)
            own.writer.add_snapshot(snapshot, {"qemu-server.conf.blob": text}, client_log=text)
            if name == "index.json":
                raw = (own.path / str(snapshot) / MANIFEST.filename).read_bytes()
                text = blob.decode(raw, max_size=1 << 20)
            expected.append(text)
        # The group is listed only now.
        for number, name in enumerate(("qemu-server.conf", "client.log", "index.json") * 2):
            path = mount / str(made.snapshot("small", time=made.TIME + number * made.DAY)) / name
            if number >= 3:  # the kernel knows these files from a listing, but not how long they are
                assert name in os.listdir(path.parent)
            content = WAYS_TO_READ[way](path)
            assert content.rstrip(b"\n") == expected[number].rstrip(b"\n")
            assert way == "grep" or content == expected[number]
            assert path.stat().st_size == len(expected[number])
        assert server.sessions.all() == []


@pytest.mark.golden
@each_way_to_read
def test_configurations_that_the_vendor_s_client_wrote_are_read_whole(
    golden_server: ReferenceServer, tmp_path: Path, way: str
) -> None:
    blobs = [original for original in READABLE if original.path.endswith(".conf")]
    assert len(blobs) > 4
    with mounted(access(golden_server), tmp_path / "m") as mount:
        for original in blobs:
            content = WAYS_TO_READ[way](mount / original.path)
            assert hashlib.sha256(content).hexdigest() == original.sha256


def test_listing_names_asks_for_no_blob_and_stats_ask_once_for_each(own: Stocked, tmp_path: Path) -> None:
    with serving(own.path) as server, mounted(access(server), tmp_path / "m") as mount:
        output_of("find", str(mount.place))
        os.listdir(mount / FIRST)
        assert server.requests.count("/download") == 0
        for _ in range(2):
            output_of("ls", "-l", str(mount / FIRST))
            (mount / CONFIGURATION).stat()
            assert server.requests.count("/download") == 3  # index.json, the configuration, the log


# --- who may see what


def test_a_token_for_one_namespace_mounts_that(own: Stocked, tmp_path: Path) -> None:
    with serving(own.path) as server:
        server.add_token("reader@pbs!one", SECRET, grants={f"/datastore/{STORE}/prod": READER})
        with mounted(access(server, "reader@pbs!one", SECRET), tmp_path / "m") as mount:
            assert os.listdir(mount.place) == ["ns"]
            assert fails_with(errno.ENOENT, (mount / IMAGE).stat)
            assert (mount / IN_NAMESPACE).read_bytes() == own.contents[IN_NAMESPACE]
            (line,) = mount.log_lines()
            assert "left out" in line
            assert "missing Datastore.Audit|Datastore.Backup" in line


@pytest.mark.golden
def test_a_limited_token_reads_the_originals_that_it_may_see(
    golden_server: ReferenceServer, tmp_path: Path
) -> None:
    golden_server.add_token("reader@pbs!one", SECRET, grants={f"/datastore/{STORE}/prod": READER})
    inside = [original for original in READABLE if original.path.startswith("ns/prod/")]
    with mounted(access(golden_server, "reader@pbs!one", SECRET), tmp_path / "m") as mount:
        for original in inside:
            assert sum_of(mount / original.path) == original.sha256
        assert mount.log_lines()


def test_who_may_only_see_groups_of_their_own_mounts_those(own: Stocked, tmp_path: Path) -> None:
    content = made.image(21, "r0r", tail=7)
    token = "reader@pbs!own"
    own.writer.add_snapshot(made.snapshot("own", type="host"), {"a.img.fidx": content}, owner=token)
    with serving(own.path) as server:
        server.add_token(token, SECRET, grants={f"/datastore/{STORE}": OWN_GROUPS})
        server.accounts.grant(USER, f"/datastore/{STORE}", READER | OWN_GROUPS)
        with mounted(access(server, token, SECRET), tmp_path / "m") as mount:
            assert os.listdir(mount / "host") == ["own"]
            assert (mount / "host/own/latest/a.img").read_bytes() == content
            assert not (mount / "vm").exists()


def test_a_namespace_that_is_forbidden_is_eacces_and_ends_nothing(own: Stocked, tmp_path: Path) -> None:
    with serving(own.path) as server:
        path = f"/datastore/{STORE}"
        grants = {path: READER, f"{path}/prod": frozenset({"Datastore.Modify"})}
        server.add_user("some@pbs", PASSWORD, grants=grants)
        with mounted(access(server, "some@pbs", PASSWORD), tmp_path / "m") as mount:
            assert os.listdir(mount / "ns") == ["prod"]
            for _ in range(2):
                assert fails_with(errno.EACCES, lambda: os.listdir(mount / "ns/prod"))
            assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
            (line,) = mount.log_lines()
            assert "missing Datastore.Audit|Datastore.Backup on /datastore/store1/prod" in line


def test_a_token_that_is_withdrawn_is_eacces_until_it_is_back(own: Stocked, tmp_path: Path) -> None:
    options = ("--refresh", "0.1")
    with serving(own.path) as server, mounted(access(server, TOKEN), tmp_path / "m", *options) as mount:
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        server.remove(TOKEN)
        wait_until(lambda: fails_with(errno.EACCES, lambda: os.listdir(mount / "vm")), "it is refused")
        server.add_token(TOKEN, SECRET)
        assert "100" in os.listdir(mount / "vm")
        assert (mount / NEWER_IMAGE).read_bytes() == own.contents[NEWER_IMAGE]
        assert all("does not accept reader@pbs!laptop" in line for line in mount.log_lines())


def test_a_ticket_that_has_expired_is_renewed_without_anybody_noticing(own: Stocked, tmp_path: Path) -> None:
    with serving(own.path) as server, mounted(access(server), tmp_path / "m", "--refresh", "0.1") as mount:
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        server.clock.advance(3 * 3600)
        server.drop_connections()
        assert (mount / NEWER_IMAGE).read_bytes() == own.contents[NEWER_IMAGE]
        assert len(server.requests.matching("/access/ticket")) > 1


# --- a server that goes away


@contextmanager
def copying(source: Path, target: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["cp", source, target], stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def finished(copy: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    _nothing, errors = copy.communicate(timeout=50)
    return copy.returncode, errors


def is_big_image(path: Path) -> bool:
    """Whether a copy has the bytes that were backed up."""
    with path.open("rb") as file:
        right = all(file.read(CHUNK) == b"%064d" % number * (CHUNK // 64) for number in range(CHUNKS))
        return right and not file.read(1)


def tries_again(mount: Mounted) -> bool:
    return any("trying again" in line for line in mount.log_lines())


def test_a_copy_goes_on_when_the_server_is_restarted(big_server: ReferenceServer, tmp_path: Path) -> None:
    with mounted(access(big_server), tmp_path / "m", *SMALL_CACHE) as mount:
        held = big_server.faults.add(Hold(match="/chunk", skip=10))
        with copying(mount / BIG, tmp_path / "copy") as copy:
            held.wait()
            big_server.restart()
            held.release()
            assert finished(copy) == (0, b"")
        assert is_big_image(tmp_path / "copy")
        assert len(big_server.sessions.all()) > 1
        assert not [line for line in mount.log_lines() if "ERROR" in line]


def test_a_copy_goes_on_when_the_server_was_away_for_a_while(
    big_server: ReferenceServer, tmp_path: Path
) -> None:
    with mounted(access(big_server, TOKEN), tmp_path / "m", *SMALL_CACHE) as mount:
        held = big_server.faults.add(Hold(match="/chunk", skip=10))
        with copying(mount / BIG, tmp_path / "copy") as copy:
            held.wait()
            big_server.go_down()
            held.release()
            wait_until(lambda: tries_again(mount), "it waits for the server")
            assert copy.poll() is None
            big_server.come_back()
            assert finished(copy) == (0, b"")
        assert is_big_image(tmp_path / "copy")


def test_reads_fail_after_the_limit_and_work_again_when_the_server_does(
    big_server: ReferenceServer, tmp_path: Path
) -> None:
    options = (*SMALL_CACHE, "--retry-timeout", "1", "--refresh", "0.1")
    with mounted(access(big_server), tmp_path / "m", *options) as mount, opened(mount / BIG) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        assert os.pread(fd, 64, 0) == b"%064d" % 0
        big_server.go_down()
        started = time.monotonic()
        assert fails_with(errno.EIO, lambda: os.pread(fd, 64, 30 * CHUNK))
        assert time.monotonic() - started >= 1
        wait_until(lambda: fails_with(errno.EIO, lambda: os.listdir(mount / "vm/100")), "listing fails too")
        big_server.come_back()
        assert os.pread(fd, 64, 30 * CHUNK) == b"%064d" % 30
        assert "latest" in os.listdir(mount / "vm/100")
        assert read_at(mount / BIG, 20 * CHUNK, 64) == b"%064d" % 20
        assert any("Connection refused" in line for line in mount.log_lines())


@contextmanager
def waiting_reader(server: ReferenceServer, mount: Mounted) -> Iterator[subprocess.Popen[bytes]]:
    """A reader in the middle of an image, and the server is away."""
    assert read_at(mount / BIG, 0, 64) == b"%064d" % 0
    server.go_down()
    command = ["dd", f"if={mount / BIG}", "of=/dev/null", "bs=4096", "skip=30000", "status=none"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            wait_until(lambda: tries_again(mount), "it waits for the server")
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_mount_that_waits_for_the_server_at_once(
    big_server: ReferenceServer, tmp_path: Path, number: signal.Signals
) -> None:
    told = access(big_server)
    with (
        mounted(told, tmp_path / "m", *SMALL_CACHE) as mount,
        waiting_reader(big_server, mount) as reader,
    ):
        mount.signal(number)
        wait_until(mount.has_ended, "it ends", limit=AT_ONCE)
        status, errors = finished(reader)
        assert status == 1
        assert b"dd: " in errors


def test_an_unmount_takes_effect_at_once_while_the_server_is_waited_for(
    big_server: ReferenceServer, tmp_path: Path
) -> None:
    told = access(big_server)
    with (
        mounted(told, tmp_path / "m", *SMALL_CACHE) as mount,
        waiting_reader(big_server, mount) as reader,
    ):
        assert "busy" in error_of(pbsfs("umount", mount.place, timeout=AT_ONCE), 7)
        output_of(PBSFS, "umount", "--lazy", mount.place, timeout=AT_ONCE)
        assert not mount.is_mounted()
        reader.kill()
        assert reader.wait(AT_ONCE) == -signal.SIGKILL
        wait_until(mount.has_ended, "the process ends with its last reader", limit=AT_ONCE)


def test_a_reader_that_waits_for_the_server_can_be_killed(
    big_server: ReferenceServer, tmp_path: Path
) -> None:
    with mounted(access(big_server), tmp_path / "m", *SMALL_CACHE) as mount:
        with waiting_reader(big_server, mount) as reader:
            reader.kill()
            assert reader.wait(AT_ONCE) == -signal.SIGKILL
        output_of(PBSFS, "umount", mount.place, timeout=AT_ONCE)
        wait_until(mount.has_ended, "it ends", limit=AT_ONCE)


def test_a_program_that_waits_for_the_server_can_be_killed_after_a_signal_that_it_handles(
    big_server: ReferenceServer, tmp_path: Path
) -> None:
    code = (
        "import os, signal, sys; signal.signal(signal.SIGUSR1, lambda *_: None); "
        "print(flush=True); os.listdir(sys.argv[1])"
    )
    with mounted(access(big_server), tmp_path / "m") as mount:
        held = big_server.faults.add(Hold(match="/snapshots"))
        command = [sys.executable, "-c", code, str(mount / "vm/100")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as program:
            assert program.stdout is not None
            try:
                program.stdout.readline()
                held.wait()
                program.send_signal(signal.SIGUSR1)
                status = Path(f"/proc/{program.pid}/status")
                # From now on the kernel lets no signal end the wait.
                wait_until(lambda: "State:\tD" in status.read_text(), "the kernel has reported the signal")
                assert (mount / ".pbsfs/version").read_text()  # and pbsfs takes that report first
                program.kill()
                assert program.wait(AT_ONCE) == -signal.SIGKILL
            finally:
                held.release()


def test_a_snapshot_that_is_forgotten_under_a_reader_is_an_error_and_no_wrong_byte(
    own: Stocked, tmp_path: Path
) -> None:
    with serving(own.path) as server, mounted(access(server), tmp_path / "m", "--refresh", "0.1") as mount:
        with opened(mount / ARCHIVE) as fd:
            shutil.rmtree(own.path / Path(ARCHIVE).parent)
            server.drop_connections()
            assert fails_with(errno.EIO, lambda: os.pread(fd, 10, 0))
        wait_until(lambda: not (mount / ARCHIVE).exists(), "it is gone")
        assert any("does not exist" in line for line in mount.log_lines())
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]


# --- more than one, and what changes


def test_two_mounts_of_one_server_do_not_disturb_each_other(own: Stocked, tmp_path: Path) -> None:
    with (
        serving(own.path) as server,
        mounted(access(server, TOKEN), tmp_path / "m1", "--connections", "1") as first,
    ):
        with mounted(access(server), tmp_path / "m2", "--connections", "1", "--ns", "prod") as second:
            inside = IN_NAMESPACE.removeprefix("ns/prod/")
            assert (first / IN_NAMESPACE).read_bytes() == own.contents[IN_NAMESPACE]
            assert (second / inside).read_bytes() == own.contents[IN_NAMESPACE]
            assert {session.user for session in server.open_sessions()} == {USER, TOKEN}
        wait_until(lambda: len(server.open_sessions()) == 1, "the other's session ends with it")
        assert (first / IMAGE).read_bytes() == own.contents[IMAGE]


def test_a_new_backup_on_the_server_appears_within_refresh(own: Stocked, tmp_path: Path) -> None:
    content = made.image(9, "r", tail=3)
    with serving(own.path) as server, mounted(access(server), tmp_path / "m", "--refresh", "1") as mount:
        names = set(os.listdir(mount / "vm/100"))
        assert os.listdir(mount / "ns/prod/vm") == ["100"]
        own.writer.add_snapshot(made.snapshot(time=made.TIME + 2 * made.DAY), {"a.img.fidx": content})
        own.writer.add_snapshot(made.snapshot("new", namespace=Namespace(("prod",))), {"a.img.fidx": content})
        own.writer.add_snapshot(made.snapshot(namespace=Namespace(("more",))), {"a.img.fidx": content})
        made_at = time.monotonic()
        wait_until(lambda: set(os.listdir(mount / "vm/100")) > names, "the snapshot is listed")
        wait_until(lambda: "new" in os.listdir(mount / "ns/prod/vm"), "the group is listed")
        assert time.monotonic() - made_at < DEFAULT_REFRESH
        wait_until(lambda: "more" in os.listdir(mount / "ns"), "the namespace is listed")
        assert (mount / "vm/100/latest/a.img").read_bytes() == content
        assert (mount / "ns/more/vm/100/latest/a.img").read_bytes() == content


# --- last, because it takes until then


def test_after_idle_time_the_server_has_no_session_and_no_lock_of_ours(
    idling: tuple[ReferenceServer, Mounted],
) -> None:
    server, mount = idling
    if not server.sessions.all():  # run by itself
        assert read_at(mount / BIG, 0, 64) == b"%064d" % 0
    wait_until(lambda: not server.open_sessions(), "the session is closed", limit=60)
    assert server.sessions.locks() == {}
    server.requests.clear()
    assert read_at(mount / BIG, 6 * CHUNK, 64) == b"%064d" % 6
    assert len(server.open_sessions()) == 1
