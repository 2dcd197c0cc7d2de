"""The plugin in the real nbdkit, seen by a strict client: bytes, holes, exports."""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nbd.disks import CHUNK, LARGE_CHUNK, MIB, ONE, STRIPES, Disk, fails_with
from tests.support import golden, made
from tests.support.keyfiles import key_file
from tests.support.nbd import (
    CAN_CACHE,
    CAN_DF,
    DONT_FRAGMENT,
    HOLE_AND_ZERO,
    MULTI_CONN,
    READ,
    READ_ONLY,
    REQ_ONE,
    ROTATIONAL,
    Client,
    NbdError,
    Nbdkit,
    exports_of,
    nbdkit,
)
from tests.support.needs import need
from tests.support.program import environment, output_of
from tests.support.serving import WAYS_IN, access, serving
from tests.support.stocked import (
    ARCHIVE,
    CONFIGURATION,
    ENCRYPTED,
    FIRST,
    IMAGE,
    IN_NAMESPACE,
    LAYOUT,
    NEWER_IMAGE,
    Stocked,
    stock,
)
from tests.support.waiting import wait_until

MOST = 64 * MIB
"""What nbdkit reads at once, at the most."""

IMAGES = (IMAGE, NEWER_IMAGE, IN_NAMESPACE)


@pytest.fixture(scope="module")
def everything(stocked: Stocked) -> Iterator[Nbdkit]:
    """All images of the datastore, each an export. No test makes it log anything."""
    with nbdkit(stocked.path, lifetime=300) as found:
        yield found


@pytest.fixture(scope="module")
def one(large: Disk) -> Iterator[Nbdkit]:
    """The large disk, as the only export. No test makes it log anything."""
    with nbdkit(large.path, *ONE, lifetime=300) as found:
        yield found


# --- every byte


def check_requests(client: Client, content: bytes, wanted: list[tuple[int, int]], *, at_once: int) -> None:
    """Reads each (offset, size), with so many requests under way."""
    under_way: list[tuple[int, int, int]] = []
    for offset, size in [*wanted, *[(0, 0)] * at_once]:
        if size:
            under_way.append((client.start(READ, offset, size), offset, size))
        if len(under_way) == at_once or (not size and under_way):
            cookie, start, length = under_way.pop(0)
            assert client.finish(cookie).data == content[start : start + length], (start, length)
    assert not under_way


def some_requests(seed: int, size: int, most: int, total: int) -> list[tuple[int, int]]:
    """Offsets and sizes, as odd as they come, small ones as often as large ones, of `total` bytes in all."""
    source = random.Random(seed)
    found: list[tuple[int, int]] = []
    while sum(length for _offset, length in found) < total:
        length = min(int(2 ** source.uniform(0, most.bit_length())), most, size)
        found.append((source.randrange(size - length + 1), length))
    return found


@pytest.mark.parametrize("structured", [True, False])
def test_reads_of_any_offset_and_size_are_the_bytes(one: Nbdkit, large: Disk, structured: bool) -> None:
    size = len(large.content)
    edges = [(0, MOST), (1, MOST - 1), (size - 1, 1), (size - MOST + 1, MOST - 1), (LARGE_CHUNK - 1, 2)]
    with one.connect(structured=structured) as client:
        assert client.size == size
        check_requests(client, large.content, edges, at_once=1)
        requests = some_requests(structured, size, MOST, 5 * MOST)
        check_requests(client, large.content, requests, at_once=1)


def test_many_requests_at_once_on_one_connection_do_not_mix_up(one: Nbdkit, large: Disk) -> None:
    requests = some_requests(7, len(large.content), 2 * MIB, 200 * MIB)
    with one.connect() as client:
        check_requests(client, large.content, requests, at_once=16)


def test_reads_around_every_edge_of_a_chunk_are_the_bytes(everything: Nbdkit, stocked: Stocked) -> None:
    for path in IMAGES:
        content = stocked.contents[path]
        with everything.connect(path) as client:
            assert client.size == len(content)
            starts = [max(0, edge + by) for edge in range(0, len(content), CHUNK) for by in (-511, -1, 0, 1)]
            sizes = (1, 2, 513, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7)
            requests = [(a, min(n, len(content) - a)) for a in starts for n in sizes if a < len(content)]
            check_requests(client, content, requests, at_once=8)


def test_an_unfragmented_read_is_one_chunk(everything: Nbdkit, stocked: Stocked) -> None:
    with everything.connect(IMAGE) as client:
        assert client.flags & CAN_DF
        assert client.read(1, 5 * CHUNK, DONT_FRAGMENT) == stocked.contents[IMAGE][1 : 1 + 5 * CHUNK]


@pytest.mark.parametrize("path", IMAGES)
def test_a_read_beyond_the_end_is_einval_and_the_connection_lives_on(stocked: Stocked, path: str) -> None:
    content = stocked.contents[path]
    size = len(content)
    assert size % 512 or path != NEWER_IMAGE
    with nbdkit(stocked.path) as server:
        with server.connect(path) as client:
            for offset, length in ((size, 1), (size - 1, 2), (0, size + 1), (1 << 62, 512), (0, MOST + 1)):
                with fails_with(errno.EINVAL):
                    client.read(offset, length)
                assert client.read(size - 1, 1) == content[-1:]
            assert client.read_all() == content
        assert all("invalid request" in line for line in server.log_lines())


@pytest.mark.parametrize("who", WAYS_IN)
def test_a_server_gives_the_same_bytes(stocked: Stocked, who: str) -> None:
    with serving(stocked.path) as server, nbdkit(access(server, who)) as found:
        assert {name for name, _description in exports_of(found.socket)} > set(IMAGES)
        (line,) = found.log_lines()
        assert "not listed, as their keys were not given: vm/101/" in line
        for path in IMAGES:
            assert found.read(path) == stocked.contents[path]
        assert {record.user for record in server.requests.all() if record.user} == {who}


def test_a_large_disk_of_a_server_is_read_in_any_order(large: Disk) -> None:
    requests = some_requests(9, len(large.content), 32 * MIB, 3 * MOST)
    with (
        serving(large.path) as server,
        nbdkit(access(server), *ONE, "cache_size=32M") as found,
        found.connect() as client,
    ):
        check_requests(client, large.content, requests, at_once=2)


def test_sixteen_connections_at_once_read_the_same(one: Nbdkit, large: Disk) -> None:
    def read(seed: int) -> None:
        with one.connect() as client:
            requests = some_requests(seed, len(large.content), MIB, 16 * MIB)
            check_requests(client, large.content, requests, at_once=4)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(read, range(16)))


def test_two_images_at_once_do_not_mix_up(everything: Nbdkit, stocked: Stocked) -> None:
    with everything.connect(IMAGE) as first, everything.connect(NEWER_IMAGE) as second:
        size = len(stocked.contents[NEWER_IMAGE])
        for offset in range(0, size - 99, 7919):
            cookies = [client.start(READ, offset, 99) for client in (first, second)]
            for client, cookie, path in zip((first, second), cookies, (IMAGE, NEWER_IMAGE), strict=True):
                assert client.finish(cookie).data == stocked.contents[path][offset : offset + 99]


def test_encrypted_images_are_read_with_their_key(stocked: Stocked, tmp_path: Path) -> None:
    (tmp_path / "key.json").write_bytes(key_file())
    with nbdkit(stocked.path, "vmid=101", "timestamp=latest", f"keyfile={tmp_path}/key.json") as server:
        assert server.read("drive-scsi0.img") == made.image(4, "r0", tail=5)
        ((_name, description),) = exports_of(server.socket)
        assert "encrypted" in description


@pytest.mark.golden
@pytest.mark.parametrize("source", ["directory", "server"])
def test_every_golden_image_is_the_original(tmp_path: Path, source: str) -> None:
    need("nbdcopy")
    keys = [f"keyfile={golden.ROOT}/keys/{name}.json" for name in ("plain", "scrypt", "pbkdf2")]
    images = [original for original in golden.originals() if original.path.endswith(".img")]
    assert len(images) > 15
    assert sum(original.encrypted for original in images) >= 4
    with serving(golden.DATASTORE) as server:
        told = environment() if source == "directory" else access(server)
        if source == "directory":
            keys.append(f"datastore_dir={golden.DATASTORE}")
        with nbdkit(told | {"PBS_ENCRYPTION_PASSWORD": "correct-horse"}, *keys, lifetime=120) as found:
            assert {name for name, _description in exports_of(found.socket)} >= {i.path for i in images}
            for original in images:
                if original.size == 1 << 30 and source == "server":
                    continue  # nearly all of them is a hole, which no source is asked for
                copy = tmp_path / "copy"
                output_of("nbdcopy", found.uri(original.path), copy)
                with copy.open("rb") as file:
                    assert hashlib.file_digest(file, "sha256").hexdigest() == original.sha256, original.path
                copy.unlink()


# --- holes


def extents_of(client: Client, step: int) -> list[tuple[int, int, int]]:
    """(offset, end, flags) of all of it, neighbours merged, asked for in steps, as answers come."""
    found: list[tuple[int, int, int]] = []
    offset = 0
    while offset < client.size:
        for length, flags in client.extents(offset, min(step, client.size - offset)):
            if found and found[-1][2] == flags:
                found[-1] = (found[-1][0], offset + length, flags)
            else:
                found.append((offset, offset + length, flags))
            offset += length
    return found


def truth(content: bytes, chunk: int) -> list[tuple[int, int, int]]:
    """The same, from the bytes: whole chunks of zeros are holes."""
    found: list[tuple[int, int, int]] = []
    for offset in range(0, len(content), chunk):
        data = content[offset : offset + chunk]
        flags = 0 if any(data) or len(data) < chunk else HOLE_AND_ZERO
        merged = bool(found) and found[-1][2] == flags
        start = found.pop()[0] if merged else offset
        found.append((start, offset + len(data), flags))
    return found


@pytest.mark.parametrize("path", IMAGES)
@pytest.mark.parametrize("step", [513, CHUNK - 1, 3 * CHUNK + 5, 1 << 31])
def test_holes_are_the_truth(everything: Nbdkit, stocked: Stocked, path: str, step: int) -> None:
    with everything.connect(path) as client:
        assert extents_of(client, step) == truth(stocked.contents[path], CHUNK)


def test_holes_of_a_large_disk_are_the_truth(one: Nbdkit, large: Disk) -> None:
    with one.connect() as client:
        found = extents_of(client, 1 << 31)
        assert found == truth(large.content, LARGE_CHUNK)
        assert sum(flags == HOLE_AND_ZERO for _start, _end, flags in found) == 4
        for start, end, flags in found:
            if flags == HOLE_AND_ZERO:
                assert not any(client.read(start, end - start))


def test_extents_of_any_range_are_cut_to_it(everything: Nbdkit, stocked: Stocked) -> None:
    content = stocked.contents[IMAGE]
    source = random.Random(5)
    with everything.connect(IMAGE) as client:
        for _ in range(300):
            offset = source.randrange(len(content))
            size = source.randrange(1, len(content) - offset + 1)
            at = offset
            for length, flags in client.extents(offset, size):
                hole = LAYOUT[at // CHUNK : at // CHUNK + 1] == "0"
                assert flags == (HOLE_AND_ZERO if hole else 0)
                assert not hole or not any(content[at : at + length])
                at += length
            assert at >= offset + size


def test_one_extent_is_answered_where_one_is_asked_for(everything: Nbdkit) -> None:
    with everything.connect(IMAGE) as client:
        assert client.extents(0, client.size, REQ_ONE) == [(2 * CHUNK, 0)]
        assert client.extents(2 * CHUNK + 1, client.size - 2 * CHUNK - 1, REQ_ONE) == [
            (2 * CHUNK - 1, HOLE_AND_ZERO)
        ]
        assert client.extents(5, 7, REQ_ONE) == [(7, 0)]


def test_more_extents_than_fit_into_an_answer_come_in_parts(striped: Disk) -> None:
    with nbdkit(striped.path, *ONE) as server, server.connect() as client:
        first = client.extents(0, client.size)
        assert 100 < len(first) <= 1024 + 1  # nbdkit may add what it knows of the rest
        found = extents_of(client, 1 << 31)
        assert len(found) == 2 * STRIPES + 1
        assert found == truth(striped.content, CHUNK)


# --- exports, and what is said of them


def test_what_a_client_is_told_of_an_export(everything: Nbdkit, one: Nbdkit) -> None:
    with everything.connect(IMAGE) as client:
        assert client.flags & READ_ONLY
        assert client.flags & MULTI_CONN
        assert client.flags & CAN_CACHE
        assert not client.flags & ROTATIONAL
        assert client.block_sizes == (1, CHUNK, 32 * MIB)
        assert client.description is not None
        assert IMAGE in client.description
    with one.connect() as client:
        assert client.block_sizes == (1, LARGE_CHUNK, 32 * MIB)


def test_a_write_is_refused_and_changes_nothing(stocked: Stocked) -> None:
    with nbdkit(stocked.path, *ONE) as server, server.connect() as client:
        with fails_with(errno.EPERM):
            client.write(0, b"x" * 512)
        assert client.read_all() == stocked.contents[IMAGE]
        (line,) = server.log_lines()
        assert "write request on readonly connection" in line


def test_disk_images_are_listed_and_the_latest_come_first(stocked: Stocked, tmp_path: Path) -> None:
    (key := tmp_path / "key.json").write_bytes(key_file())
    with nbdkit(stocked.path, f"keyfile={key}") as server:
        listed = exports_of(server.socket)
    names = [name for name, _description in listed]
    assert len(set(names)) == len(names)
    latest = [name for name in names if "/latest/" in name]
    assert names[: len(latest)] == latest
    assert sorted(latest) == [
        "ns/prod/vm/100/latest/drive-scsi0.img",
        "vm/100/latest/drive-scsi0.img",
        "vm/101/latest/drive-scsi0.img",
    ]
    assert set(names) - set(latest) == {*IMAGES, ENCRYPTED}
    assert not {ARCHIVE, CONFIGURATION} & set(names)
    told = dict(listed)
    assert told[IMAGE] == f"{IMAGE}, 513.5 KiB: before the upgrade"
    assert told[ENCRYPTED].endswith(", encrypted")
    assert told["vm/100/latest/drive-scsi0.img"] == told[NEWER_IMAGE]


def test_images_without_their_keys_are_not_listed_and_logged_in_one_line(stocked: Stocked) -> None:
    names = {"vm/101/latest/drive-scsi0.img", ENCRYPTED}
    with nbdkit(stocked.path) as server:
        for _turn in range(2):
            assert not names & {name for name, _description in exports_of(server.socket)}
        (line,) = server.log_lines()
    assert f"keys were not given: vm/101/latest/drive-scsi0.img, {ENCRYPTED}, with" in line
    assert f"the keys {made.KEY.fingerprint[:23]}; give the key files" in line


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (ONE, [""]),
        (("path=/vm/100/latest/drive-scsi0.img",), [""]),
        (("vmid=100", "timestamp=latest"), ["drive-scsi0.img"]),
        (("type=vm", "id=100"), ["latest/drive-scsi0.img", *(f"{p[7:]}" for p in (NEWER_IMAGE, IMAGE))]),
        (("namespace=prod",), [f"vm/100/{t}/drive-scsi0.img" for t in ("latest", FIRST[7:])]),
        (("path=ns/prod/vm",), [f"100/{t}/drive-scsi0.img" for t in ("latest", FIRST[7:])]),
        (("type=ct",), []),
    ],
)
def test_what_is_exported_is_what_the_parameters_say(
    stocked: Stocked, words: tuple[str, ...], names: list[str]
) -> None:
    with nbdkit(stocked.path, *words) as server:
        assert [name for name, _description in exports_of(server.socket)] == names
        for name in names:
            with server.connect(name) as client:
                assert client.read(0, 512) in [content[:512] for content in stocked.contents.values()]


def test_a_single_image_answers_to_no_name_and_to_its_own(stocked: Stocked) -> None:
    with nbdkit(stocked.path, *ONE) as server:
        for name in ("", "drive-scsi0.img", "drive-scsi0.img.fidx", IMAGE):
            assert server.read(name) == stocked.contents[IMAGE]


def test_the_only_image_of_a_snapshot_is_the_default(stocked: Stocked) -> None:
    with nbdkit(stocked.path, "vmid=100", f"timestamp={FIRST[7:]}") as server:
        assert server.read("") == stocked.contents[IMAGE]
        assert server.read("drive-scsi0.img") == stocked.contents[IMAGE]


WRONG = {
    "": "name an export, as in nbd://localhost/NAME; / has vm, ct, ns",
    "vm/999/latest/a.img": "there is no '999'; there is 100, 101",
    f"{FIRST}/other.img": "there is no 'other.img'; there is drive-scsi0.img",
    "vm/100": "'vm/100' is not an image; vm/100 has",
    CONFIGURATION: "is not an image, but a file",
    "../../etc/passwd": "'..' has no meaning here",
    ENCRYPTED: f"is encrypted with the key {made.KEY.fingerprint}",
    "x" * 4000: "there is no 'xxx",
}
"""Exports that can't be had, and what the log says of each."""


def test_a_wrong_export_is_refused_and_the_server_lives_on(stocked: Stocked) -> None:
    with nbdkit(stocked.path) as server:
        for name, reason in WRONG.items():
            before = len(server.log_lines())
            with pytest.raises(NbdError):
                server.connect(name)
            assert any(reason in line for line in server.log_lines()[before:]), server.log_lines()
            assert server.read(IMAGE) == stocked.contents[IMAGE]


def test_a_name_for_a_single_image_that_is_not_its_own_is_refused(stocked: Stocked) -> None:
    with nbdkit(stocked.path, *ONE) as server:
        with pytest.raises(NbdError):
            server.connect(NEWER_IMAGE)
        assert any("there is no export" in line for line in server.log_lines())
        assert server.read() == stocked.contents[IMAGE]


def test_latest_stays_what_it_was_while_somebody_has_it_open(tmp_path: Path) -> None:
    own = stock(tmp_path / "datastore")
    name = "latest/drive-scsi0.img"
    before, newest = own.contents[NEWER_IMAGE], made.image(9, "rr", tail=3)
    with nbdkit(own.path, "vmid=100") as server:
        with server.connect(name) as client:
            count = len(exports_of(server.socket))
            own.writer.add_snapshot(
                made.snapshot(time=made.TIME + 2 * made.DAY), {"drive-scsi0.img.fidx": newest}
            )
            wait_until(lambda: len(exports_of(server.socket)) > count, "it is listed")
            assert server.read(name) == before
            assert client.read_all() == before
        wait_until(lambda: server.read(name) == newest, "who comes now gets the newest")


def test_latest_stays_what_it_was_at_the_start_where_it_was_asked_for_by_parameter(tmp_path: Path) -> None:
    own = stock(tmp_path / "datastore")
    words = ("vmid=100", "timestamp=latest", "image=drive-scsi0.img")
    with nbdkit(own.path, *words) as server:
        own.writer.add_snapshot(made.snapshot(time=made.TIME + 2 * made.DAY), {"drive-scsi0.img.fidx": b"x"})
        assert server.read() == own.contents[NEWER_IMAGE]
        ((_name, description),) = exports_of(server.socket)
        assert description.startswith("vm/100/2023-11-15T22:13:20Z")


def test_what_a_client_wants_cached_is_fetched_and_then_there(stocked: Stocked) -> None:
    with serving(stocked.path) as server, nbdkit(access(server), *ONE) as found, found.connect() as client:
        client.cache(CHUNK // 2, 4 * CHUNK)
        wait_until(lambda: server.requests.count("/chunk") >= 3, "they are fetched")
        # What was asked for first is read while the rest comes.
        assert client.read(0, 5 * CHUNK) == stocked.contents[IMAGE][: 5 * CHUNK]
        before = server.requests.count("/chunk")
        assert client.read(0, 5 * CHUNK) == stocked.contents[IMAGE][: 5 * CHUNK]
        assert server.requests.count("/chunk") == before


def test_no_more_is_cached_than_was_asked_for(stocked: Stocked) -> None:
    assert LAYOUT[2:5] == "00t"
    with serving(stocked.path) as server, nbdkit(access(server), *ONE) as found, found.connect() as client:
        client.cache(2 * CHUNK, 2 * CHUNK)
        client.cache(4 * CHUNK, CHUNK)
        wait_until(lambda: server.requests.count("/chunk"), "it is fetched")
        assert client.read(5 * CHUNK - 1, 1) == stocked.contents[IMAGE][5 * CHUNK - 1 : 5 * CHUNK]
        assert server.requests.count("/chunk") == 1


def test_wanting_more_cached_than_there_is_room_is_no_error(large: Disk) -> None:
    with nbdkit(large.path, *ONE, "cache_size=32M") as server, server.connect() as client:
        client.cache(0, client.size)
        assert client.read(5 * MIB, 99) == large.content[5 * MIB : 5 * MIB + 99]
