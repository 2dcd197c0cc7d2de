"""What is restored of archives, and what never happens whatever they say."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pbsfs.base.errors import DamageError, OutputError
from pbsfs.contents.archive import Archive
from pbsfs.tasks.extract import destination as destinations
from pbsfs.tasks.extract import extract
from pbsfs.tasks.extract.attributes import Kept, Part
from pbsfs.tasks.extract.extract import OnDamage
from pbsfs.tasks.patterns import Selection
from pbsfs.testing.archives import Node, write
from tests.contents.trees import acl, directory, expected, file, some
from tests.support.needs import need_root
from tests.support.restoring import Chunked, empty, restored, seen, untouched

ME, GROUP = os.geteuid(), os.getegid()
NOBODY = 0xFFFFFFFF

both_versions = pytest.mark.parametrize("split", [False, True], ids=["version-1", "version-2"])


def fields(root: Node) -> dict[bytes, tuple[Any, ...]]:
    """What a file system has to say of a tree: as `seen`."""
    return {
        path: (mode, uid, gid, mtime, rdev, links, xattrs, target or data)
        for path, (mode, uid, gid, mtime, _size, rdev, target, xattrs, data, links) in expected(root).items()
    }


def mine(root: Node) -> Node:
    """A tree of which each entry belongs to the user who runs the tests."""
    nodes = [root]
    for node in nodes:
        node.uid, node.gid = ME, GROUP
        nodes += node.children
    return root


@both_versions
def test_everything_is_restored(tmp_path: Path, split: bool) -> None:
    need_root("restore owners and devices")
    result, unset = restored(write(some(), split=split), tmp_path / "out")
    assert seen(tmp_path / "out") == fields(some())
    assert (str(unset), result.files, result.lost_count) == ("", 14 - 1, 0)


@both_versions
def test_names_are_bytes_of_any_length(tmp_path: Path, split: bool) -> None:
    names = [b"a" * 255, b"\xff" * 255, b"\x01\n\x1b[31m", b" ", b"...", b"-rf", b"caf\xe9", "ü".encode()]
    root = mine(directory(b"", *(file(name, name) for name in names)))
    restored(write(root, split=split), tmp_path / "out")
    assert seen(tmp_path / "out") == fields(root)
    restored(write(root, split=split), tmp_path / "out", overwrite=True)
    assert len(os.listdir(tmp_path / "out")) == len(names)


def test_two_thousand_levels_are_restored(tmp_path: Path) -> None:
    root = inner = directory()
    for _level in range(2000):
        below = directory(b"d", mtime_ns=7)
        inner.children = [below]
        inner = below
    inner.children = [file(b"deep", b"there")]
    restored(write(mine(root), split=False), tmp_path / "out")
    fd = os.open(tmp_path / "out", os.O_RDONLY)
    for _level in range(2000):
        below_fd = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below_fd
        assert os.fstat(fd).st_mtime_ns == 7
    with open(os.open("deep", os.O_RDONLY, dir_fd=fd), "rb") as deep:
        assert deep.read() == b"there"
    os.close(fd)
    subprocess.run(["rm", "-r", tmp_path / "out"], check=True)  # Python cannot


@both_versions
def test_holes_stay_holes_and_the_bytes_around_them_are_right(tmp_path: Path, split: bool) -> None:
    block = extract.ZERO_BLOCK
    datas = [
        bytes(40 * block),
        b"x" + bytes(20 * block) + b"y",
        bytes(20 * block) + b"z" * 5,
        b"a" * 100 + bytes(30 * block),
        bytes(block) * 3 + b"q" * block + bytes(block) * 9 + b"\0" * 77,
        bytes(5),
        b"",
    ]
    root = mine(directory(b"", *(file(b"%d" % number, data) for number, data in enumerate(datas))))
    restored(write(root, split=split), tmp_path / "out")
    for number, data in enumerate(datas):
        place = tmp_path / "out" / str(number)
        assert place.read_bytes() == data
        if len(data) > 4 * block:
            assert place.stat().st_blocks * 512 <= 3 * block


def test_directories_that_nobody_may_write_to_are_filled_first(tmp_path: Path) -> None:
    inner = directory(b"inner", file(b"f", b"1"))
    outer = directory(b"outer", inner, file(b"g", b"2"))
    inner.mode, outer.mode = stat.S_IFDIR | 0o500, stat.S_IFDIR | 0o555
    root = mine(directory(b"", outer))
    restored(write(root, split=True), tmp_path / "out")
    assert seen(tmp_path / "out") == fields(root)
    restored(write(root, split=True), tmp_path / "out", overwrite=True, existing_directories=True)
    assert seen(tmp_path / "out") == fields(root)


def test_a_hard_link_to_what_is_not_restored_is_a_file(tmp_path: Path) -> None:
    first = file(b"first", b"content", uid=ME, gid=GROUP)
    root = directory(b"", first, directory(b"d", Node(b"again", link_to=first), Node(b"more", link_to=first)))
    selection = Selection.parse([], [b"first"])
    restored(write(mine(root), split=True), tmp_path / "out", selection=selection)
    assert (tmp_path / "out/d/again").read_bytes() == b"content"
    assert (tmp_path / "out/d/again").samefile(tmp_path / "out/d/more")


def test_hard_links_are_found_without_a_catalog(tmp_path: Path) -> None:
    first = file(b"first", b"content")
    other = file(b"other", b"more")
    root = directory(
        b"", first, other, directory(b"d", Node(b"again", link_to=first)), Node(b"z", link_to=other)
    )
    restored(write(mine(root), split=False), tmp_path / "out")
    assert (tmp_path / "out/first").samefile(tmp_path / "out/d/again")
    assert (tmp_path / "out/other").samefile(tmp_path / "out/z")


def test_more_hard_links_than_can_be_remembered_are_copies_and_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "MAX_FIRST_NAMES", 1)
    files = [file(b"%d" % number, b"%d" % number) for number in range(3)]
    links = [Node(b"link%d" % number, link_to=target) for number, target in enumerate(files)]
    _result, unset = restored(write(mine(directory(b"", *files, *links)), split=False), tmp_path / "out")
    assert (tmp_path / "out/0").samefile(tmp_path / "out/link0")
    assert (tmp_path / "out/link2").read_bytes() == b"2"
    assert unset.counts == {Part.HARD_LINK: 4}  # two files that became four


# --- options


def test_owners_modes_acls_and_xattrs_are_left_out_where_nobody_wants_them(tmp_path: Path) -> None:
    need_root("restore owners")
    list_ = acl((1, 6, NOBODY), (2, 7, 5), (4, 4, NOBODY), (16, 7, NOBODY), (32, 0, NOBODY))
    attributes = {b"user.a": b"1", b"system.posix_acl_access": list_}
    child = Node(b"f", stat.S_IFREG | 0o670, 5, 6, 9, b"x", xattrs=attributes)
    root = directory(b"", child, directory(b"d"))
    umask = os.umask(0)
    os.umask(umask)
    for kept, mode, owner, xattrs in [
        (Kept(), 0o670, 5, {b"user.a", b"system.posix_acl_access"}),
        (Kept(ownership=False), 0o670, 0, {b"user.a", b"system.posix_acl_access"}),
        (Kept(permissions=False, acls=False), 0o666 & ~umask, 5, {b"user.a"}),
        (Kept(acls=False), 0o670, 5, {b"user.a"}),
        (Kept(xattrs=False), 0o670, 5, {b"system.posix_acl_access"}),
        (Kept(xattrs=False, acls=False), 0o670, 5, set()),
    ]:
        restored(write(root, split=True), tmp_path / "out", kept=kept)
        found = seen(tmp_path / "out")[b"f"]
        assert (stat.S_IMODE(found[0]), found[1], set(found[6])) == (mode, owner, xattrs)
        if not kept.permissions:
            assert stat.S_IMODE(seen(tmp_path / "out")[b"d"][0]) == 0o777 & ~umask
        subprocess.run(["rm", "-r", tmp_path / "out"], check=True)


def test_access_control_lists_are_not_inherited_from_the_destination(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    inherited = acl((1, 7, NOBODY), (2, 7, 1234), (4, 5, NOBODY), (16, 7, NOBODY), (32, 5, NOBODY))
    os.setxattr(out, "system.posix_acl_default", inherited)
    root = mine(directory(b"", file(b"f", b"1"), directory(b"d", directory(b"e", file(b"g")))))
    restored(write(root, split=True), out)
    assert seen(out) == fields(root)


def test_existing_files_are_kept_unless_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "d").mkdir(parents=True)
    root = mine(directory(b"", directory(b"d", file(b"f", b"new"), file(b"big", bytes(2 << 20)))))
    with pytest.raises(OutputError, match=r"out/d: File exists.*--allow-existing-dirs"):
        restored(write(root, split=True), out)
    for name in ("f", "big"):
        (out / "d" / name).write_bytes(b"precious")
        with pytest.raises(OutputError, match=rf"out/d/{name}: File exists.*--overwrite"):
            restored(write(root, split=True), out, existing_directories=True)
        assert (out / "d" / name).read_bytes() == b"precious"
        (out / "d" / name).unlink()
    with pytest.raises(OutputError, match="--allow-existing-dirs"):
        restored(write(root, split=True), out, overwrite=True)
    restored(write(root, split=True), out, existing_directories=True, overwrite=True)
    assert (out / "d/f").read_bytes() == b"new"
    assert sorted(os.listdir(out / "d")) == ["big", "f"]


def test_files_links_and_devices_replace_each_other(tmp_path: Path) -> None:
    out, target = tmp_path / "out", tmp_path / "target"
    target.write_bytes(b"outside")
    first = file(b"a", b"1")
    kinds: list[Callable[[bytes], Node]] = [
        lambda name: file(name, b"new"),
        lambda name: Node(name, stat.S_IFLNK | 0o777, target=b"x"),
        lambda name: Node(name, stat.S_IFIFO | 0o600),
        lambda name: Node(name, link_to=first),
        lambda name: directory(name, file(b"in", b"it")),
    ]
    for make in kinds:
        root = mine(directory(b"", first, *(make(name) for name in (b"file", b"link", b"pipe", b"hard"))))
        out.mkdir()
        (out / "file").write_bytes(b"old")
        (out / "link").symlink_to(target)
        os.mkfifo(out / "pipe")
        (out / "other").write_bytes(b"other")
        os.link(out / "other", out / "hard")
        with pytest.raises(OutputError, match=r"File exists|directory"):
            restored(write(root, split=False), out, existing_directories=True)
        restored(write(root, split=False), out, existing_directories=True, overwrite=True)
        found = seen(out)
        assert found.pop(b"other")[7] == b"other"
        assert {path: what for path, what in found.items() if path} == {
            path: what for path, what in fields(root).items() if path
        }
        restored(write(root, split=False), out, existing_directories=True, overwrite=True)
        assert {path: what for path, what in seen(out).items() if path not in (b"", b"other")} == {
            path: what for path, what in fields(root).items() if path
        }
        subprocess.run(["rm", "-r", out], check=True)
    assert target.read_bytes() == b"outside"


def test_a_directory_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "out/f/kept").mkdir(parents=True)
    for child in (file(b"f"), Node(b"f", stat.S_IFLNK | 0o777, target=b"x"), Node(b"f", stat.S_IFIFO)):
        with pytest.raises(OutputError, match="out/f: Is a directory"):
            restored(write(mine(directory(b"", child)), split=True), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/f/kept").is_dir()
    assert os.listdir(tmp_path / "out") == ["f"]


# --- nothing outside


def test_links_in_the_destination_are_not_followed(tmp_path: Path) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    (outside / "d").mkdir(parents=True)
    (outside / "d/f").write_bytes(b"theirs")
    out.mkdir()
    (out / "d").symlink_to(outside / "d")
    (out / "f").symlink_to(outside / "d/f")
    (out / "loop").symlink_to("loop")
    root = mine(directory(b"", directory(b"d", file(b"f", b"1")), file(b"f", b"2"), file(b"loop", b"3")))
    with untouched(outside):
        for existing in (False, True):
            with pytest.raises(OutputError):
                restored(write(root, split=True), out, existing_directories=existing)
        restored(write(root, split=True), out, overwrite=True, existing_directories=True)
    assert seen(out) == fields(root)


def duplicates(*nodes: Node) -> Node:
    return mine(directory(b"", *nodes))


@pytest.mark.parametrize(
    "root",
    [
        duplicates(Node(b"x", stat.S_IFLNK | 0o777, target=b"../outside"), directory(b"x", file(b"f", b"!"))),
        duplicates(directory(b"x", file(b"f", b"!")), Node(b"x", stat.S_IFLNK | 0o777, target=b"../outside")),
        duplicates(Node(b"x", stat.S_IFLNK | 0o777, target=b"../outside/f"), file(b"x", b"!")),
        duplicates(file(b"..", b"!")),
        duplicates(directory(b"..", directory(b"outside", file(b"f", b"!")))),
        duplicates(file(b".", b"!")),
        duplicates(file(b"../outside/f", b"!")),
        duplicates(file(b"/f", b"!")),
        duplicates(file(b"a\0b", b"!")),
        duplicates(file(b"", b"!")),
    ],
    ids=lambda root: "-".join(repr(child.name)[2:20] for child in root.children).replace("/", "|"),
)
@both_versions
def test_hostile_names_stay_inside(tmp_path: Path, root: Node, split: bool) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    (outside / "f").write_bytes(b"theirs")
    written = write(root, split=split)
    with untouched(outside):
        for again in (False, True):
            with pytest.raises(DamageError):
                restored(written, out, overwrite=again, existing_directories=again)
            result, _unset = restored(
                written,
                out,
                on_damage=OnDamage(zero=True, skip=True),
                overwrite=True,
                existing_directories=True,
            )
            assert result.lost_count > 0
    assert sorted(os.listdir(tmp_path)) == ["out", "outside"]


def test_a_link_to_a_directory_outside_is_restored_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    links = [
        Node(b"absolute", stat.S_IFLNK | 0o777, target=os.fsencode(tmp_path / "outside"), mtime_ns=5),
        Node(b"up", stat.S_IFLNK | 0o777, target=b"../outside", mtime_ns=5),
    ]
    root = mine(directory(b"", *links, mtime_ns=5))
    with untouched(tmp_path / "outside"):
        restored(write(root, split=True), tmp_path / "out")
        restored(write(root, split=True), tmp_path / "out", overwrite=True)
    assert seen(tmp_path / "out") == fields(root)


@both_versions
def test_any_bit_flipped_restores_inside_or_fails_with_an_error(tmp_path: Path, split: bool) -> None:
    """Whatever an archive says: errors of pbsfs or files, and nothing beside the destination."""
    need_root("restore owners and devices")
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    (outside / "f").write_bytes(b"theirs")
    first = file(b"a", b"1", uid=1)
    root = directory(
        b"",
        first,
        Node(b"l", stat.S_IFLNK | 0o777, target=b"../outside/f"),
        directory(b"d", Node(b"h", link_to=first), Node(b"n", stat.S_IFCHR | 0o600, device=(1, 3))),
        file(b"x", b"2", xattrs={b"user.a": b"1"}),
    )
    out.mkdir()
    written = write(root, split=split)
    payloads = [] if written.payload is None else [written.payload]
    with untouched(outside):
        for bit in range(0, len(written.main) * 8, 3):
            data = bytearray(written.main)
            data[bit // 8] ^= 1 << bit % 8
            streams = [Chunked(bytes(data)), *(Chunked(payload) for payload in payloads)]
            try:
                restored(
                    written,
                    out,
                    streams=streams,
                    on_damage=OnDamage(zero=True, skip=True),
                    overwrite=True,
                    existing_directories=True,
                )
            except (DamageError, OutputError):
                continue
            finally:
                empty(out)
    assert sorted(os.listdir(tmp_path)) == ["out", "outside"]


# --- damage


def damaged_payload() -> tuple[Node, bytes]:
    data = random.Random(1).randbytes(10_000)
    return mine(
        directory(b"", file(b"before", b"1" * 5000), file(b"hit", data), file(b"after", b"2" * 5000))
    ), data


def test_directories_that_it_made_do_not_stay_where_nothing_is_in_them(tmp_path: Path) -> None:
    files = directory(b"b", directory(b"c", file(b"hit", b"1" * 5000)))
    written = write(mine(directory(b"", directory(b"a", files))), split=True)
    streams = [Chunked(written.main), Chunked(written.payload or b"", damaged=[0, 1])]
    (tmp_path / "out" / "a").mkdir(parents=True)
    with pytest.raises(DamageError, match="hit: chunk"):
        restored(written, tmp_path / "out", streams=streams, existing_directories=True)
    assert os.listdir(tmp_path / "out") == ["a"]
    assert os.listdir(tmp_path / "out" / "a") == []


def test_a_damaged_chunk_of_the_payload_costs_the_files_in_it(tmp_path: Path) -> None:
    root, data = damaged_payload()
    written = write(root, split=True)
    assert written.payload is not None
    start = written.payload.index(data)
    number = start // 4096 + 1  # a chunk that holds nothing but bytes of `hit`
    streams = [Chunked(written.main), Chunked(written.payload, damaged=[number])]
    with pytest.raises(DamageError, match="hit: chunk 2 is damaged"):
        restored(written, tmp_path / "fail", streams=streams)
    assert sorted(os.listdir(tmp_path / "fail")) == ["before"]
    for skip in (False, True):
        out = tmp_path / f"zero-{skip}"
        result, _unset = restored(written, out, streams=streams, on_damage=OnDamage(zero=True, skip=skip))
        bad = number * 4096 - start
        shown = data[:bad] + bytes(4096) + data[bad + 4096 :]
        assert (out / "hit").read_bytes() == shown
        assert (out / "before").read_bytes() == b"1" * 5000
        assert (out / "after").read_bytes() == b"2" * 5000
        assert [(path, [str(where) for where in ranges]) for path, ranges, _reason in result.zeroed] == [
            ("hit", [f"{bad}+4096"])
        ]
        assert result.lost_count == 0


def test_zeros_reach_from_the_header_that_cannot_be_read(tmp_path: Path) -> None:
    root, data = damaged_payload()
    written = write(root, split=True)
    assert written.payload is not None
    start = written.payload.index(data)
    streams = [Chunked(written.main), Chunked(written.payload, damaged=[start // 4096])]
    result, _unset = restored(written, tmp_path / "out", streams=streams, on_damage=OnDamage(zero=True))
    good = (start // 4096 + 1) * 4096 - start
    assert (tmp_path / "out/hit").read_bytes() == bytes(good) + data[good:]
    assert [path for path, _ranges, _reason in result.zeroed] == ["before", "hit"]


def test_entries_that_cannot_be_read_are_left_out_on_request_only(tmp_path: Path) -> None:
    kids = [directory(b"d%d" % number, *(file(b"f%d" % n, b"x") for n in range(40))) for number in range(5)]
    written = write(mine(directory(b"", *kids)), split=True)
    position = written.positions[kids[2].children[20]]
    streams = [Chunked(written.main, chunk=1024, damaged=[position // 1024]), Chunked(written.payload or b"")]
    for on_damage in (OnDamage(), OnDamage(zero=True)):
        with pytest.raises(DamageError, match="d2: "):
            restored(written, tmp_path / f"out-{on_damage.zero}", streams=streams, on_damage=on_damage)
    both = OnDamage(zero=True, skip=True)
    result, _unset = restored(written, tmp_path / "out", streams=streams, on_damage=both)
    assert [path for path, _reason in result.lost] == ["d2"]
    found = {name: len(os.listdir(tmp_path / "out" / name)) for name in os.listdir(tmp_path / "out")}
    assert {found.pop(name) for name in ("d0", "d1", "d3", "d4")} == {40}
    assert 20 < found["d2"] < 40


def test_bytes_of_another_file_are_never_written(tmp_path: Path) -> None:
    wrong = file(b"wrong", b"mine")
    root = mine(directory(b"", file(b"other", b"their"), wrong))
    wrong.reference = 16  # that of `other`, which has another size
    for on_damage in (OnDamage(), OnDamage(zero=True)):
        with pytest.raises(DamageError, match="wrong: the payload stream has another file's content"):
            restored(write(root, split=True), tmp_path / f"out-{on_damage.zero}", on_damage=on_damage)
        assert os.listdir(tmp_path / f"out-{on_damage.zero}") == ["other"]


# --- file systems that can do less


def test_without_nameless_files_names_come_last_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without(path: Any, flags: int, *arguments: Any, **given: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real(path, flags, *arguments, **given)

    monkeypatch.setattr("pbsfs.tasks.extract.destination.os.open", without)
    root = mine(directory(b"", file(b"f", b"1" * 100), file(b"n" * 255, b"2"), file(b".pbsfs-part", b"3")))
    for overwrite in (False, True):
        restored(write(root, split=True), tmp_path / "out", overwrite=overwrite)
        assert seen(tmp_path / "out") == fields(root)
    with pytest.raises(OutputError, match="File exists"):
        restored(write(root, split=True), tmp_path / "out")
    assert len(os.listdir(tmp_path / "out")) == 3
    work = write(root, split=True)
    streams = [Chunked(work.main), Chunked(work.payload or b"", damaged=[0])]
    with pytest.raises(DamageError):
        restored(work, tmp_path / "other", streams=streams)
    assert os.listdir(tmp_path / "other") == []


def test_an_owner_that_no_system_has_is_counted(tmp_path: Path) -> None:
    need_root("restore owners")
    root = directory(b"", file(b"f", uid=NOBODY, gid=5), file(b"g", uid=5, gid=NOBODY))
    _result, unset = restored(write(root, split=True), tmp_path / "out")
    assert unset.counts == {Part.NO_OWNER: 2}
    assert str(unset) == (
        "could not restore the owner or group 4294967295 of 2 entries: not a valid user or group; "
        "no system has it: pbsfs leaves it out, set another with chown"
    )
    assert (tmp_path / "out/f").stat().st_gid == 5
    assert (tmp_path / "out/g").stat().st_uid == 5


def test_a_time_that_the_file_system_cannot_hold_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel does on ext4 with small inodes: it takes the nearest time, without an error."""
    latest, real = (1 << 31) - 1, os.utime

    def clamped(place: int | bytes, ns: tuple[int, int], **given: Any) -> None:
        nearest = min(ns[1], latest * 10**9) // 10**9 * 10**9
        real(place, ns=(nearest, nearest), **given)

    monkeypatch.setattr("pbsfs.tasks.extract.attributes.os.utime", clamped)
    times = {b"now": 1_700_000_000_123_456_789, b"last": latest * 10**9 + 5, b"far": (latest + 9) * 10**9}
    link = Node(b"link", stat.S_IFLNK | 0o777, target=b"x", mtime_ns=(latest + 9) * 10**9)
    files = [file(name, mtime_ns=time, uid=os.getuid(), gid=os.getgid()) for name, time in times.items()]
    _result, unset = restored(write(mine(directory(b"", *files, link)), split=True), tmp_path / "out")
    assert unset.counts == {Part.CUT_TIME: 2}
    assert str(unset).startswith(
        "could not restore the time of 2 entries, set to the nearest time that fits: "
        "the file system cannot hold it; "
    )
    assert (tmp_path / "out/far").stat().st_mtime == latest


def test_programs_get_no_rights_of_another_owner(tmp_path: Path) -> None:
    need_root("make files of others")
    root = directory(b"", Node(b"su", stat.S_IFREG | 0o6755, 1234, 0, data=b"x"))
    _result, unset = restored(write(root, split=True), tmp_path / "out", kept=Kept(ownership=False))
    assert stat.S_IMODE((tmp_path / "out/su").stat().st_mode) == 0o2755
    assert unset.counts == {Part.SET_ID: 1}
    restored(write(root, split=True), tmp_path / "again")
    assert stat.S_IMODE((tmp_path / "again/su").stat().st_mode) == 0o6755


def test_what_the_file_system_does_not_take_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"File name too long; .* leave it out with --exclude"):
        restored(write(mine(directory(b"", file(b"n" * 300))), split=True), tmp_path / "out")


def test_names_are_refused_that_lead_elsewhere(tmp_path: Path) -> None:
    destination = destinations.Destination(str(tmp_path))
    for path in (b"..", b".", b"a\0"):
        with pytest.raises(OutputError, match="not a name"):
            destination.make_directory(path)
    destination.close()
    assert os.listdir(tmp_path) == []


def test_the_size_of_what_is_below_is_known_where_it_costs_little() -> None:
    archive = Archive(Chunked(write(some(), split=False).main))
    assert archive.size_below(archive.root) == archive.streams[0].size
    split = write(some(), split=True)
    both = Archive(Chunked(split.main), Chunked(split.payload or b""))
    inner = both.child(both.root, b"inner")
    assert inner is not None
    assert both.size_below(inner) == len(b"the first file") + 300


def test_a_file_system_with_nothing_but_files_gets_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vfat: no nameless files, links, devices, owners, modes or attributes."""
    need_root("make devices elsewhere")
    real = os.open

    def without_nameless(path: Any, flags: int, *arguments: Any, **given: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *arguments, **given)

    def refused(*_arguments: Any, **_given: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def unsupported(*_arguments: Any, **_given: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    written = write(some(), split=True)
    with monkeypatch.context() as poor:
        poor.setattr("pbsfs.tasks.extract.destination.os.open", without_nameless)
        for name in ("link", "symlink", "mknod"):
            poor.setattr(f"pbsfs.tasks.extract.destination.os.{name}", refused)
        for name in ("chown", "chmod"):
            poor.setattr(f"pbsfs.tasks.extract.attributes.os.{name}", refused)
        poor.setattr("pbsfs.tasks.extract.attributes.os.setxattr", unsupported)
        for overwrite in (False, True):
            _result, unset = restored(
                written, tmp_path / "out", overwrite=overwrite, existing_directories=overwrite
            )
            assert unset.counts == {
                Part.OWNER: 9,
                Part.MODE: 9,
                Part.XATTR: 2,
                Part.CAPABILITY: 1,
                Part.ACL: 2,
                Part.HARD_LINK: 2,
                Part.LINK: 1,
                Part.DEVICE: 4,
            }
            assert len(str(unset).splitlines()) == 8
        with pytest.raises(OutputError, match="File exists"):
            restored(written, tmp_path / "out", existing_directories=True)
    found = {path: what[7] for path, what in seen(tmp_path / "out").items() if stat.S_ISREG(what[0])}
    assert found == {path: what[7] for path, what in fields(some()).items() if stat.S_ISREG(what[0])}
