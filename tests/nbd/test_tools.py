"""The programs that people use with block devices, each as a recipe: the plugin in the real nbdkit."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pbsfs.testing.writer import DatastoreWriter
from tests.nbd.disks import CHUNK, MIB, ONE, Disk
from tests.support import made
from tests.support.mounts import cleaned_up
from tests.support.nbd import (
    AT_ONCE,
    LIFETIME,
    PLUGIN,
    Client,
    Nbdkit,
    command,
    connected,
    has_content,
    nbdkit,
    uri,
)
from tests.support.needs import need, need_fuse
from tests.support.program import environment, output_of, run
from tests.support.server import ReferenceServer
from tests.support.server.certificate import make
from tests.support.serving import PASSWORD, USER, access, serving
from tests.support.stocked import Stocked
from tests.support.sums import sum_of
from tests.support.waiting import wait_until

FORMATS = ("raw", "qcow2", "vmdk")

PARTITION = range(8 * 512, 300 * 512)
"""The bytes of the partition in `DISK`."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    """A disk of whole sectors, with an MBR and one partition, data and holes."""
    content = bytearray(made.image(41, "r0tr00rr0r"))
    entry = struct.pack("<B3sB3sII", 0x80, b"\0\2\0", 0x83, b"\0\0\0", 8, 292)
    content[446:512] = entry + bytes(48) + b"\x55\xaa"
    path = tmp_path_factory.mktemp("disk") / "datastore"
    DatastoreWriter(path).add_snapshot(
        made.snapshot(), {"drive-scsi0.img.fidx": bytes(content)}, chunk_size=CHUNK
    )
    return Disk(path, bytes(content))


@pytest.fixture(scope="module")
def original(disk: Disk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was backed up, as a file."""
    path = tmp_path_factory.mktemp("original") / "disk.img"
    path.write_bytes(disk.content)
    return path


@pytest.fixture(scope="module")
def server(disk: Disk) -> Iterator[Nbdkit]:
    """The disk as the only export. No test makes it log anything."""
    with nbdkit(disk.path, *ONE, lifetime=300) as found:
        yield found


def same(first: str | Path, second: str | Path, kind: str = "raw") -> bool:
    """Whether `qemu-img compare` finds no difference; `kind`: the format of the first."""
    shown = output_of("qemu-img", "compare", "-f", kind, "-F", "raw", first, second)
    return "Images are identical." in shown


# --- libnbd's


def test_nbdinfo_tells_of_an_export(server: Nbdkit, disk: Disk) -> None:
    need("nbdinfo")
    shown = output_of("nbdinfo", server.uri())
    assert f"export-size: {len(disk.content)}" in shown
    for line in ("is_read_only: true", "can_multi_conn: true", "can_cache: true", "is_rotational: false"):
        assert line in shown
    assert "block_size_preferred: 65536" in shown
    assert output_of("nbdinfo", "--size", server.uri()) == f"{len(disk.content)}\n"
    (export,) = json.loads(output_of("nbdinfo", "--json", server.uri()))["exports"]
    assert export["export-size"] == len(disk.content)
    assert export["is_read_only"]
    assert "DOS/MBR boot sector" in export.get("content", "DOS/MBR boot sector")


def test_nbdinfo_shows_the_map(server: Nbdkit) -> None:
    need("nbdinfo")
    extents = json.loads(output_of("nbdinfo", "--map", "--json", server.uri()))
    found = [(extent["offset"] // CHUNK, extent["description"]) for extent in extents]
    expected = [(0, "data"), (1, "hole,zero"), (2, "data"), (4, "hole,zero"), (6, "data")]
    assert found == [*expected, (8, "hole,zero"), (9, "data")]
    totals = output_of("nbdinfo", "--map", "--totals", server.uri())
    assert re.search(r"60\.0%.*data", totals)


def test_nbdinfo_lists_exports(stocked: Stocked) -> None:
    need("nbdinfo")
    with nbdkit(stocked.path, "namespace=prod") as found:
        exports = json.loads(output_of("nbdinfo", "--list", "--json", found.uri()))["exports"]
        # Some versions of nbdinfo ask for the default export first.
        assert all("name an export, as in" in line for line in found.log_lines())
    assert [export["export-name"] for export in exports] == [
        "vm/100/latest/drive-scsi0.img",
        "vm/100/2023-11-14T22:13:20Z/drive-scsi0.img",
    ]
    assert all("513.5 KiB" in export["description"] for export in exports)


def test_nbdcopy_copies(server: Nbdkit, original: Path, tmp_path: Path) -> None:
    need("nbdcopy")
    for options in ([], ["--connections=4", "--requests=16"], ["--synchronous"], ["--no-extents"]):
        copy = tmp_path / "copy"
        output_of("nbdcopy", *options, server.uri(), copy)
        assert sum_of(copy) == sum_of(original)
        copy.unlink()


def test_nbdcopy_leaves_holes_as_holes(large: Disk, tmp_path: Path) -> None:
    need("nbdcopy")
    with nbdkit(large.path, *ONE) as found:
        output_of("nbdcopy", "--connections=8", found.uri(), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == large.content
    assert (tmp_path / "copy").stat().st_blocks * 512 <= len(large.content) - 5 * 4 * MIB + MIB


@pytest.mark.mount
@pytest.mark.parametrize("way", ["uri", "stdio", "activation"])
def test_nbdfuse_shows_it_as_a_file(
    server: Nbdkit, disk: Disk, original: Path, tmp_path: Path, way: str
) -> None:
    need("nbdfuse", "cmp", "fusermount3")
    need_fuse()
    place, pidfile = tmp_path / "m", tmp_path / "pid"
    place.mkdir()
    plugin = command(disk.path, *ONE)
    end = {
        "uri": [server.uri()],
        "stdio": ["--command", plugin[0], "-s", *plugin[1:]],
        "activation": ["[", *plugin, "]"],
    }[way]
    line = ["nbdfuse", "-r", "-P", str(pidfile), f"{place}/disk.img", *end]
    with cleaned_up(place), subprocess.Popen(line, env=environment()) as process:
        try:
            wait_until(lambda: has_content(pidfile) or process.poll() is not None, "it is mounted")
            output_of("cmp", place / "disk.img", original)
            output_of("fusermount3", "-u", place)
            assert process.wait(AT_ONCE) == 0
        finally:
            process.kill()


# --- qemu's


@pytest.mark.parametrize("kind", FORMATS)
def test_qemu_img_converts(server: Nbdkit, original: Path, tmp_path: Path, kind: str) -> None:
    need("qemu-img")
    output_of("qemu-img", "convert", "-f", "raw", "-O", kind, server.uri(), tmp_path / "copy")
    assert same(tmp_path / "copy", original, kind)


def test_qemu_img_compares_and_measures(server: Nbdkit, original: Path) -> None:
    need("qemu-img")
    assert same(server.uri(), original)
    found = json.loads(output_of("qemu-img", "info", "--output=json", "-f", "raw", server.uri()))
    assert found["virtual-size"] == original.stat().st_size
    mapped = json.loads(output_of("qemu-img", "map", "--output=json", "-f", "raw", server.uri()))
    assert sum(part["length"] for part in mapped if not part["zero"]) == 6 * CHUNK


def test_an_overlay_takes_what_is_written_and_the_export_stays(
    server: Nbdkit, original: Path, tmp_path: Path
) -> None:
    need("qemu-img", "qemu-io")
    overlay = tmp_path / "overlay.qcow2"
    output_of("qemu-img", "create", "-b", server.uri(), "-f", "qcow2", "-F", "raw", overlay)
    shown = output_of("qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 1000 70000", overlay)
    assert "wrote 70000/70000 bytes" in shown
    shown = output_of("qemu-io", "-f", "qcow2", "-c", "read -P 0x5a 1000 70000", overlay)
    assert "Pattern verification failed" not in shown
    assert same(server.uri(), original)
    output_of("qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, tmp_path / "copy")
    expected = bytearray(original.read_bytes())
    expected[1000:71000] = b"\x5a" * 70000
    assert (tmp_path / "copy").read_bytes() == expected


def test_qemu_io_reads_and_cannot_write(server: Nbdkit, disk: Disk) -> None:
    need("qemu-io")
    shown = output_of("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 65536 65536", server.uri())
    assert "read 65536/65536 bytes" in shown
    assert "Pattern verification failed" not in shown
    shown = output_of("qemu-io", "-r", "-f", "raw", "-c", "read -v 1 16", server.uri())
    assert disk.content[1:17].hex(" ") in shown
    done = run(["qemu-io", "-f", "raw", "-c", "write 0 512", server.uri()])
    assert done.returncode == 1


@contextmanager
def running(line: list[str], place: Path) -> Iterator[None]:
    """A program that serves at the socket `place`, as long as it is needed."""
    need(line[0])
    with subprocess.Popen(line, env=environment()) as process:
        try:
            wait_until(lambda: place.exists() or process.poll() is not None, "it serves")
            yield
            process.terminate()
            assert process.wait(AT_ONCE) == 0
        finally:
            process.kill()


def test_qemu_nbd_hands_it_on(server: Nbdkit, original: Path, tmp_path: Path) -> None:
    need("nbdcopy")
    place = tmp_path / "socket"
    line = ["qemu-nbd", "-r", "-t", "-e", "4", "-f", "raw", "-k", str(place), server.uri()]
    with running(line, place):
        output_of("nbdcopy", uri(place), tmp_path / "copy")
    assert sum_of(tmp_path / "copy") == sum_of(original)


def test_the_storage_daemon_hands_it_on(server: Nbdkit, original: Path, tmp_path: Path) -> None:
    need("nbdcopy")
    place = tmp_path / "socket"
    node = f"driver=nbd,node-name=n,read-only=on,server.type=unix,server.path={server.socket}"
    line = ["qemu-storage-daemon", "--blockdev", node]
    line += ["--nbd-server", f"addr.type=unix,addr.path={place}"]
    line += ["--export", "type=nbd,id=e,node-name=n,name=disk"]
    with running(line, place):
        output_of("nbdcopy", uri(place, "disk"), tmp_path / "copy")
    assert sum_of(tmp_path / "copy") == sum_of(original)


# --- load


def test_fio_verifies_what_it_reads_in_any_order(tmp_path: Path) -> None:
    need("fio")
    image, log = tmp_path / "image", tmp_path / "fio.json"
    basic = ["--name=j", "--bs=4k", "--size=24M", "--verify=crc32c", "--verify_fatal=1"]
    # What it writes into a file in order, it can verify in the backup of that file.
    output_of("fio", *basic, "--rw=write", f"--filename={image}", "--do_verify=0", cwd=tmp_path)
    DatastoreWriter(tmp_path / "datastore").add_snapshot(
        made.snapshot(), {"drive-scsi0.img.fidx": image}, chunk_size=CHUNK
    )
    with serving(tmp_path / "datastore") as source, nbdkit(access(source), *ONE, "cache_size=32M") as found:
        order = ["--rw=randread", "--ioengine=nbd", f"--uri={found.uri()}", "--iodepth=16"]
        report = [f"--output={log}", "--output-format=json"]
        output_of("fio", *basic, *order, *report, cwd=tmp_path)
    text = log.read_text()
    (job,) = json.loads(text[text.index("{") :])["jobs"]
    assert job["error"] == 0
    assert job["read"]["total_ios"] == 24 * MIB // 4096


# --- filters of nbdkit on top


def test_the_cow_filter_takes_what_is_written(disk: Disk, stocked: Stocked) -> None:
    with nbdkit(disk.path, *ONE, options=["--filter=cow"]) as found:
        with found.connect() as client:
            client.write(1234, b"new" * 1000)
            expected = disk.content[:1234] + b"new" * 1000 + disk.content[4234:]
            assert client.read_all() == expected
        assert found.read() == expected
    with nbdkit(disk.path, *ONE) as found:
        assert found.read() == disk.content


def test_the_partition_filter_shows_the_partition(disk: Disk) -> None:
    with nbdkit(disk.path, *ONE, "partition=1", options=["--filter=partition"]) as found:
        assert found.read() == disk.content[PARTITION.start : PARTITION.stop]


@pytest.mark.parametrize(
    "words",
    [
        ["cache"],
        ["cache", "cache-on-read=true"],
        ["readahead"],
        ["retry", "retries=2"],
        ["rate", "rate=80M"],
        ["blocksize", "minblock=512"],
        ["noextents"],
        ["nocache"],
        ["offset", "offset=512", "range=8192"],
        ["truncate", "round-up=1048576"],
        ["multi-conn", "multi-conn-mode=disable"],
    ],
    ids=" ".join,
)
def test_filters_do_with_it_what_they_do(disk: Disk, words: list[str]) -> None:
    expected = disk.content
    if words[0] == "offset":
        expected = expected[512 : 512 + 8192]
    elif words[0] == "truncate":
        expected = expected.ljust(MIB, b"\0")
    options = [f"--filter={words[0]}"]
    with nbdkit(disk.path, *ONE, *words[1:], options=options) as found, found.connect() as client:
        for _turn in range(2):
            assert client.read_all(10_007) == expected


def test_the_log_filter_has_the_requests(disk: Disk, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = ["--filter=log"]
    with nbdkit(disk.path, *ONE, f"logfile={log}", options=options) as found, found.connect() as client:
        client.read(513, 1025)
    (line,) = [line for line in log.read_text().splitlines() if " Read id=" in line]
    assert "offset=0x201 count=0x401" in line


def test_the_stats_filter_counts(disk: Disk, tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    with nbdkit(disk.path, *ONE, f"statsfile={stats}", options=["--filter=stats"]) as found:
        assert found.read() == disk.content
    assert re.search(r"^read: 1 ops, .*640\.00 KiB", stats.read_text(), re.MULTILINE), stats.read_text()


def test_with_the_exitlast_filter_it_ends_after_the_last_client(disk: Disk) -> None:
    with nbdkit(disk.path, *ONE, options=["--filter=exitlast"]) as found:
        with found.connect() as client, found.connect():
            assert client.read_all() == disk.content
        found.check_end(limit=AT_ONCE)


# --- ways to start and to reach it


def test_it_runs_a_command_with_itself(disk: Disk, original: Path, tmp_path: Path) -> None:
    need("nbdcopy")
    line = command(disk.path, *ONE, options=["-U", "-"])
    done = run([*line, "--run", f'echo "$nbd"; nbdcopy "$uri" {tmp_path}/copy && echo done'])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("done\n")
    assert sum_of(tmp_path / "copy") == sum_of(original)
    place = re.findall(r"/[^ :]*socket", done.stdout)[0]
    assert not Path(place).exists()
    assert run([*line, "--run", "exit 7"]).returncode == 7


def test_it_serves_over_its_standard_input_and_output(disk: Disk) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(LIFETIME)
    line = command(disk.path, *ONE, options=["-s"])
    with subprocess.Popen(line, stdin=theirs.fileno(), stdout=theirs.fileno(), env=environment()) as process:
        theirs.close()
        try:
            with Client(ours) as client:
                assert client.read_all() == disk.content
            assert process.wait(AT_ONCE) == 0
        finally:
            process.kill()


def test_libnbd_starts_it_by_socket_activation(disk: Disk, original: Path, tmp_path: Path) -> None:
    need("nbdinfo", "nbdcopy")
    activated = ["[", *command(disk.path, *ONE), "]"]
    assert output_of("nbdinfo", "--size", "--", *activated) == f"{len(disk.content)}\n"
    output_of("nbdcopy", "--", *activated, tmp_path / "copy")
    assert sum_of(tmp_path / "copy") == sum_of(original)


LAUNCHER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execvp(sys.argv[2], sys.argv[2:])
"""


def test_systemd_starts_it_by_socket_activation(disk: Disk, tmp_path: Path) -> None:
    place = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place))
        listening.listen()
        number = listening.fileno()
        line = [sys.executable, "-c", LAUNCHER, str(number), *command(disk.path, *ONE, options=["-f"])]
        with subprocess.Popen(line, pass_fds=[number], env=environment()) as process:
            listening.close()
            try:
                for _turn in range(2):
                    with Client(connected(place)) as client:
                        assert client.read_all() == disk.content
                process.terminate()
                assert process.wait(AT_ONCE) == 0
            finally:
                process.kill()


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        number = bound.getsockname()[1]
        assert isinstance(number, int)
        return number


@contextmanager
def over_tcp(line: list[str], port: int, told: dict[str, str], log: Path) -> Iterator[None]:
    """nbdkit in the foreground at a port of the loopback; it ends in order."""
    with log.open("wb") as file, subprocess.Popen(line, env=told, stderr=file) as process:
        try:
            wait_until(lambda: answers(port) or process.poll() is not None, "it serves")
            assert process.poll() is None, log.read_text()
            yield
            process.terminate()
            assert process.wait(AT_ONCE) == 0
        finally:
            process.kill()


def answers(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def test_it_serves_over_tcp(disk: Disk, original: Path, tmp_path: Path) -> None:
    need("nbdcopy")
    port = free_port()
    line = command(disk.path, *ONE, options=["-f", "-i", "127.0.0.1", "-p", str(port), "-t", "32"])
    with over_tcp(line, port, environment(), tmp_path / "log"):
        output_of("nbdcopy", "--connections=4", f"nbd://127.0.0.1:{port}", tmp_path / "copy")
    assert sum_of(tmp_path / "copy") == sum_of(original)


def test_with_tls_only_who_trusts_it_reads(disk: Disk, original: Path, tmp_path: Path) -> None:
    need("nbdinfo", "nbdcopy")
    certificate = make(ca_signed=True)
    assert certificate.ca is not None
    for name, content in (("server-cert", certificate._leaf), ("server-key", certificate._key)):
        (tmp_path / f"{name}.pem").write_bytes(content)
    client = tmp_path / "client"
    client.mkdir()
    for place in (tmp_path, client):
        (place / "ca-cert.pem").write_text(certificate.ca)
    options = ["--tls=require", f"--tls-certificates={tmp_path}"]
    with nbdkit(disk.path, *ONE, options=options) as found:
        secure = f"nbds+unix://localhost/?socket={found.socket}&tls-certificates={client}"
        assert "with TLS" in output_of("nbdinfo", secure)
        output_of("nbdcopy", secure, tmp_path / "copy")
        assert sum_of(tmp_path / "copy") == sum_of(original)
        assert run(["nbdinfo", found.uri()]).returncode != 0
        found.log_lines()


# --- as the plugin in C is used: the same commands, but for its name


def as_with_the_plugin_in_c(server: ReferenceServer, port: int, *options: str) -> list[str]:
    return [
        *("nbdkit", *options, "-f", "-p", str(port), "python", PLUGIN, "image=drive-scsi0.img", "vmid=100"),
        "timestamp=2023-11-14T22:13:20Z",
        f"repo={server.repository(USER)}",
        f"fingerprint={server.fingerprint.upper()}",
        f"password={PASSWORD}",
        "namespace=",
    ]


@pytest.mark.parametrize("options", [["--filter", "cow"], [], ["-t", "4"]], ids=" ".join)
def test_the_commands_of_the_plugin_in_c_work(
    disk: Disk, original: Path, tmp_path: Path, options: list[str]
) -> None:
    need("nbdkit", "nbdinfo", "qemu-img", "qemu-io")
    default = 10809
    port = free_port() if answers(default) else default
    with serving(disk.path) as server:
        line = as_with_the_plugin_in_c(server, port, *options)
        assert re.search("=[0-9A-F]{2}:[0-9A-F]{2}:", line[-3])
        with over_tcp(line, port, environment(), tmp_path / "log"):
            address = "nbd://localhost" + (f":{port}" if port != default else "")
            assert f"export-size: {len(disk.content)}" in output_of("nbdinfo", address)
            for kind in ("qcow2", "vmdk"):
                copy = tmp_path / f"copy.{kind}"
                output_of("qemu-img", "convert", "-p", address, "-f", "raw", "-O", kind, copy)
                assert same(copy, original, kind)
            image = tmp_path / "image.qcow2"
            output_of("qemu-img", "create", "-b", address, "-f", "qcow2", "-F", "raw", image)
            output_of("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4096", image)
            assert same(address, original)
        (warning,) = (tmp_path / "log").read_text().splitlines()
        assert "password= on the command line" in warning


# --- what takes a kernel with nbd, or an appliance


def device() -> Path:
    """A device that nothing is connected to."""
    if not Path("/dev/nbd0").exists():
        pytest.skip("there is no /dev/nbd0: this kernel has no nbd, which nothing here can change")
    free = [path for path in Path("/sys/block").glob("nbd*") if not (path / "pid").exists()]
    if not free:
        pytest.skip("every /dev/nbd* is in use")
    return Path("/dev") / min(free).name


@pytest.mark.parametrize("tool", ["nbd-client", "qemu-nbd"])
def test_the_kernel_reads_it(server: Nbdkit, disk: Disk, tool: str) -> None:
    target = device()
    need(tool)
    if tool == "qemu-nbd":
        connect = ["qemu-nbd", "-r", "-f", "raw", "-c", str(target), server.uri()]
    else:
        connect = ["nbd-client", "-unix", str(server.socket), str(target), "-readonly"]
    output_of(*connect)
    try:
        wait_until(lambda: target.read_bytes() == disk.content, "the device has the content")
    finally:
        output_of(tool, "-d", str(target))


def test_guestfish_looks_into_it(server: Nbdkit, disk: Disk) -> None:
    # Not in CI's list: it brings an appliance of its own, and a kernel.
    if run(["sh", "-c", "command -v guestfish"]).returncode:
        pytest.skip("guestfish is not installed")
    told = environment(LIBGUESTFS_BACKEND="direct", LIBGUESTFS_BACKEND_SETTINGS="force_tcg")
    words = ["run", ":", "blockdev-getsize64", "/dev/sda", ":", "list-partitions", ":", "checksum-device"]
    line = ["guestfish", "--ro", "--format=raw", "-a", f"nbd://?socket={server.socket}"]
    shown = output_of(*line, *words, "sha256", "/dev/sda", env=told)
    assert shown.split() == [str(len(disk.content)), "/dev/sda1", hashlib.sha256(disk.content).hexdigest()]
