"""`pbsfs export files/… DEST` from made archives: options, damage, interruptions, users, poor places."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from pbsfs.formats.index import DynamicIndex
from pbsfs.testing.archives import Node, Written, write, write_catalog
from pbsfs.testing.writer import DatastoreWriter
from tests.contents.trees import acl, directory, file
from tests.support import damage, made
from tests.support.needs import need, need_another_user, need_root
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs, run
from tests.support.restoring import seen
from tests.support.server import Drop, Hold
from tests.support.serving import access, serving
from tests.support.terminal import at_a_terminal
from tests.support.truth import names_below
from tests.support.waiting import wait_until

ROOT = "files/ct/200/latest/root"
NOBODY = 0xFFFFFFFF

both_versions = pytest.mark.parametrize("split", [False, True], ids=["version-1", "version-2"])


@dataclass
class Store:
    """A datastore with one archive. `contents`: of its files, by path."""

    path: Path
    writer: DatastoreWriter
    written: Written
    contents: dict[str, bytes]
    split: bool

    @property
    def index(self) -> Path:
        name = "root.ppxar.didx" if self.split else "root.pxar.didx"
        return self.writer.snapshot_path(made.snapshot("200", type="ct")) / name

    def chunk_of(self, path: str) -> tuple[Path, list[str]]:
        """The chunk that holds the middle of a file, and the files of which it holds some bytes."""
        data = self.written.payload if self.split else self.written.main
        assert data is not None
        index = DynamicIndex(self.index.read_bytes())
        places = {name: data.index(content) for name, content in self.contents.items() if content}
        number = index.find(places[path] + len(self.contents[path]) // 2)
        start, end = index.span(number)
        hit = [
            name for name, place in places.items() if place < end and place + len(self.contents[name]) > start
        ]
        return self.writer.chunk_path(index.digest(number)), hit


def store(path: Path, root: Node, *, split: bool, time: int = made.TIME) -> Store:
    writer = DatastoreWriter(path)
    written = write(root, split=split)
    if written.payload is not None:
        files: dict[str, bytes | Path] = {"root.mpxar.didx": written.main, "root.ppxar.didx": written.payload}
    else:
        catalog = write_catalog({b"root.pxar.didx": root})
        files = {"root.pxar.didx": written.main, "catalog.pcat1.didx": catalog}
    writer.add_snapshot(made.snapshot("200", type="ct", time=time), files)
    contents: dict[str, bytes] = {}
    nodes = [("", root)]
    for place, node in nodes:
        nodes += [(os.path.join(place, os.fsdecode(child.name)), child) for child in node.children]
        if stat.S_ISREG(node.mode):
            contents[place] = (node.link_to or node).data
    return Store(path, writer, written, contents, split)


def many(count: int = 60, size: int = 50_000) -> Node:
    """Directories of files, in several chunks."""
    source = random.Random(7)
    files = [file(b"f%03d" % n, source.randbytes(size), mtime_ns=n) for n in range(count)]
    folders = [
        directory(b"d%d" % n, *files[n * count // 3 : (n + 1) * count // 3], mtime_ns=9) for n in range(3)
    ]
    return directory(b"", *folders, mtime_ns=8)


@pytest.fixture(params=[False, True], ids=["version-1", "version-2"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return store(tmp_path / "datastore", many(), split=request.param)


def export(stored: Store, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return pbsfs("export", "--datastore-dir", stored.path, *arguments)


def assert_whole(stored: Store, out: Path) -> None:
    found = {os.fsdecode(path): what[7] for path, what in seen(out).items() if stat.S_ISREG(what[0])}
    assert found == stored.contents


# --- where to


def test_single_entries_go_where_files_go_that_are_copied(tmp_path: Path) -> None:
    first = file(b"first", b"content", mtime_ns=5)
    nodes = [
        first,
        Node(b"again", link_to=first),
        Node(b"link", stat.S_IFLNK | 0o777, target=b"first"),
        Node(b"pipe", stat.S_IFIFO | 0o640),
    ]
    own = store(tmp_path / "datastore", directory(b"", *nodes), split=True)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("first", "again", "pipe"):
        assert (export(own, f"{ROOT}/{name}", out).returncode, os.listdir(out)) == (0, [name])
        text = error_of(export(own, f"{ROOT}/{name}", out), 8)
        assert f"cannot write {out}/{name}: File exists; " in text
        assert "--overwrite" in text
        assert export(own, "--overwrite", f"{ROOT}/{name}", out).returncode == 0
        (out / name).unlink()
    assert export(own, f"{ROOT}/link", out / "new").returncode == 0  # what the link leads to
    (out / "new").unlink()
    assert export(own, f"{ROOT}/again", out / "new").returncode == 0
    assert ((out / "new").read_bytes(), (out / "new").stat().st_mtime_ns) == (b"content", 5)
    assert "No such file or directory" in error_of(export(own, f"{ROOT}/first", tmp_path / "a/b"), 8)
    assert "--overwrite" in error_of(export(own, "--force", f"{ROOT}/first", out), 2)


def test_a_directory_is_restored_to_an_empty_one_or_a_new_one(stored: Store, tmp_path: Path) -> None:
    for out in (tmp_path / "new", tmp_path / "empty"):
        if out.name == "empty":
            out.mkdir()
        done = export(stored, ROOT, out)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert_whole(stored, out)
        assert (out / "d1").stat().st_mtime_ns == 9
        assert out.stat().st_mtime_ns == 8
    assert "File exists; restore to an empty directory" in error_of(export(stored, ROOT, tmp_path / "new"), 8)
    (tmp_path / "file").touch()
    assert "Not a directory" in error_of(export(stored, ROOT, tmp_path / "file"), 8)
    text = error_of(export(stored, ROOT, tmp_path / "a/b"), 8)
    assert f"No such file or directory; there is no directory {tmp_path}/a: create it with mkdir" in text


def test_patterns_choose_what_is_restored(stored: Store, tmp_path: Path) -> None:
    done = export(
        stored, "--pattern", "d1", "--pattern", "!f02*", "--exclude", "f03?", ROOT, tmp_path / "out"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert names_below(tmp_path / "out") == {b"d1"}
    done = export(stored, "--pattern", "/d1/**", "--exclude", "f02*", ROOT, tmp_path / "other")
    assert names_below(tmp_path / "other") == {b"d1", *(b"d1/f03%d" % n for n in range(10))}
    assert "pattern '[a'" in error_of(export(stored, "--pattern", "[a", ROOT, tmp_path / "none"), 2)
    assert not (tmp_path / "none").exists()


def test_patterns_that_match_nothing_are_reported(stored: Store, tmp_path: Path) -> None:
    done = export(stored, "--pattern", "absent", ROOT, tmp_path / "out")
    assert done.returncode == 0
    assert done.stderr == "pbsfs: no entry below PATH matches --pattern, so none is restored\n"
    assert names_below(tmp_path / "out") == set()
    for form in ("tar", "zip"):
        done = export(stored, "--format", form, "--pattern", "absent", ROOT, tmp_path / form)
        assert (done.returncode, done.stderr.count("no entry below PATH matches")) == (0, 1)


# --- as another user


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that other users get to."""
    with TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        yield Path(place)


def test_what_another_user_may_not_set_is_counted_once(public: Path) -> None:
    need_another_user()
    need("setpriv")
    capability = {b"security.capability": b"\x01\x00\x00\x02" + bytes(16)}
    nodes = [
        file(b"mine", b"1", uid=65534, gid=65534, xattrs={b"user.a": b"1"}),
        Node(b"su", stat.S_IFREG | 0o4755, 0, 0, data=b"2"),
        Node(b"null", stat.S_IFCHR | 0o666, device=(1, 3)),
        Node(b"ping", stat.S_IFREG | 0o755, 65534, 65534, data=b"3", xattrs=capability),
        Node(b"link", stat.S_IFLNK | 0o777, 65534, 65534, target=b"x"),
        Node(b"closed", stat.S_IFDIR | 0o555, 65534, 65534, children=[file(b"f", uid=65534, gid=65534)]),
        Node(b"dark", stat.S_IFDIR | 0o000, 65534, 65534, children=[file(b"f", uid=65534, gid=65534)]),
    ]
    nodes.append(Node(b"far", link_to=nodes[6].children[0]))
    own = store(public / "datastore", directory(b"", *nodes, uid=65534, gid=65534), split=True)
    subprocess.run(["chmod", "-R", "a+rX", own.path], check=True)
    (public / "place").mkdir()
    os.chown(public / "place", 65534, 65534)

    def as_nobody(*options: str) -> subprocess.CompletedProcess[str]:
        drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", PBSFS]
        command = [*drop, "export", "--datastore-dir", "datastore", *options, ROOT, "place/out"]
        return run(command, cwd=public, env=environment(HOME=str(public / "place")))

    done = as_nobody()
    again = as_nobody("--overwrite", "--allow-existing-dirs", "--ignore-ownership", "--ignore-xattrs")
    assert (done.returncode, again.returncode) == (0, 0), done.stderr
    not_permitted = "Operation not permitted; restore as root"
    assert sorted(done.stderr.splitlines()) == sorted(
        [
            f"pbsfs: could not restore the owner of 1 entry: {not_permitted}, or add --ignore-ownership",
            (
                "pbsfs: could not restore 1 set-user-ID or set-group-ID bit: the owner differs; "
                "the files belong to another user or group than stored"
            ),
            f"pbsfs: could not restore the capabilities of 1 file: {not_permitted}, or add --ignore-xattrs",
            (
                "pbsfs: could not restore 1 special file (device, FIFO, socket): "
                f"{not_permitted}, to a file system with them"
            ),
            (
                "pbsfs: could not restore 1 hard link, copied instead: Permission denied; "
                "restore to a file system with them"
            ),
        ]
    )
    assert "the owner" not in again.stderr.replace("the owner differs", "")
    assert "capabilities" not in again.stderr
    found = seen(public / "place/out")
    assert {(what[1], what[2]) for what in found.values()} == {(65534, 65534)}
    modes = {os.fsdecode(path): stat.S_IMODE(what[0]) for path, what in found.items()}
    assert (modes["su"], modes["closed"], modes["dark"]) == (0o755, 0o555, 0)
    assert "null" not in modes


def test_a_place_that_nobody_may_write_to_is_an_error(stored: Store, tmp_path: Path) -> None:
    need_root("mount")
    out = tmp_path / "out"
    out.mkdir()
    with mounted_for_a_test(out, "tmpfs", "ro"):
        assert "Read-only file system" in error_of(export(stored, ROOT, out), 8)
        assert "Read-only file system" in error_of(export(stored, ROOT, out / "new"), 8)


# --- places that are small or poor


@contextmanager
def mounted_for_a_test(place: Path, kind: str, options: str = "") -> Iterator[None]:
    flags = ["-o", options] if options else []
    subprocess.run(["mount", "-t", kind, *flags, "none", place], check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True, timeout=30)


def test_a_full_disk_is_an_error_and_leaves_whole_files_only(stored: Store, tmp_path: Path) -> None:
    need_root("mount")
    out = tmp_path / "out"
    out.mkdir()
    with mounted_for_a_test(out, "tmpfs", "size=1m"):
        text = error_of(export(stored, ROOT, out), 8)
        assert "No space left on device; make room, then run it again with --overwrite" in text
        found = {path: what[7] for path, what in seen(out).items() if stat.S_ISREG(what[0])}
        assert found
        for path, content in found.items():
            assert content == stored.contents[os.fsdecode(path)]
        subprocess.run(["mount", "-o", "remount,size=64m", out], check=True, timeout=30)
        assert export(stored, "--overwrite", "--allow-existing-dirs", ROOT, out).returncode == 0
        assert_whole(stored, out)


def test_without_extended_attributes_the_rest_is_restored(tmp_path: Path) -> None:
    need_root("mount")
    list_ = acl((1, 6, NOBODY), (2, 7, 5), (4, 4, NOBODY), (16, 7, NOBODY), (32, 0, NOBODY))
    nodes = [
        file(
            b"%d" % n,
            b"1",
            uid=5,
            xattrs={b"user.a": b"1", b"user.b": b"2", b"system.posix_acl_access": list_},
        )
        for n in range(3)
    ]
    own = store(tmp_path / "datastore", directory(b"", *nodes), split=False)
    out = tmp_path / "out"
    out.mkdir()
    with mounted_for_a_test(out, "ramfs"):
        done = export(own, ROOT, out)
        assert done.returncode == 0
        assert done.stderr.splitlines() == [
            (
                "pbsfs: could not restore 6 extended attributes: Operation not supported; "
                "restore as root, to a file system with them, or add --ignore-xattrs"
            ),
            (
                "pbsfs: could not restore 3 access control lists: Operation not supported; "
                "restore to a file system with them, or add --ignore-acls"
            ),
        ]
        again = ["--overwrite", "--allow-existing-dirs", "--ignore-xattrs", "--ignore-acls"]
        assert export(own, *again, ROOT, out).stderr == ""
        assert {what[1] for path, what in seen(out).items() if path} == {5}


# --- damage


@pytest.mark.parametrize("way", sorted(damage.CHUNK_DAMAGE))
def test_a_damaged_chunk_costs_the_files_in_it_and_no_other(stored: Store, tmp_path: Path, way: str) -> None:
    chunk, hit = stored.chunk_of("d1/f030")
    damage.CHUNK_DAMAGE[way](chunk, b"other")
    text = error_of(export(stored, ROOT, tmp_path / "fail"), 6)
    assert f"{hit[0]}: host/" in text or f"{hit[0]}: ct/200" in text or "d1: " in text
    assert not (tmp_path / "fail" / hit[0]).exists()
    out = tmp_path / "out"
    done = export(stored, "--on-damage", "skip", ROOT, out)
    assert done.returncode == 20
    *lines, last = done.stderr.splitlines()
    assert last.startswith("pbsfs: restored but for damaged data: ")
    found = {os.fsdecode(path): what[7] for path, what in seen(out).items() if stat.S_ISREG(what[0])}
    whole = {path: content for path, content in stored.contents.items() if path not in hit}
    assert {path: found.get(path) for path in whole} == whole
    for path in hit:
        if path in found:
            assert len(found[path]) == len(stored.contents[path])
            pairs = zip(found[path], stored.contents[path], strict=True)
            assert all(byte in (0, right) for byte, right in pairs)
            assert any(line.startswith(f"pbsfs: {path}: bytes ") and "are zeros" in line for line in lines)
    if stored.split:
        assert found.keys() == stored.contents.keys()
        assert len(lines) == len(hit)
        assert export(stored, "--on-damage", "zero", ROOT, tmp_path / "zero").returncode == 20
    else:
        assert any(line.startswith("pbsfs: d1: not restored: ") for line in lines)
        assert error_of(export(stored, "--on-damage", "zero", ROOT, tmp_path / "zero"), 6)


def test_where_the_first_file_fails_no_directory_stays(stored: Store, tmp_path: Path) -> None:
    chunk, _hit = stored.chunk_of("d1/f030")
    chunk.unlink()
    only = ("--pattern", "d1/f030", ROOT)
    error_of(export(stored, *only, tmp_path / "new"), 6)
    assert not (tmp_path / "new").exists()
    (own := tmp_path / "own").mkdir()
    error_of(export(stored, *only, own), 6)
    assert list(own.iterdir()) == []


def test_damage_is_the_same_from_a_server(stored: Store, tmp_path: Path) -> None:
    chunk, _hit = stored.chunk_of("d1/f030")
    damage.flip_bit(chunk, chunk.stat().st_size * 8 - 3)
    local = export(stored, "--on-damage", "skip", ROOT, tmp_path / "out")
    with serving(stored.path) as server:
        remote = pbsfs("export", "--on-damage", "skip", ROOT, tmp_path / "remote", env=access(server))
    assert (remote.returncode, local.returncode) == (20, 20)
    assert seen(tmp_path / "remote") == seen(tmp_path / "out")
    assert [line.partition(": ct/200")[0] for line in remote.stderr.splitlines()] == [
        line.partition(": ct/200")[0] for line in local.stderr.splitlines()
    ]


def test_a_server_that_fails_is_never_taken_for_damage(stored: Store, tmp_path: Path) -> None:
    chunk, _hit = stored.chunk_of("d2/f050")
    with serving(stored.path) as server:
        server.faults.add(Drop(match=chunk.name, times=None))
        options = ["--on-damage", "skip", "--retry-timeout", "1"]
        done = pbsfs("export", *options, ROOT, tmp_path / "out", env=access(server))
    assert done.returncode == 14
    assert b"d2/f050" not in names_below(tmp_path / "out")


# --- read-ahead and interruptions


@contextmanager
def running(*command: str | Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs meanwhile, and never longer."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


@both_versions
def test_chunks_of_files_that_follow_one_another_are_fetched_side_by_side(
    tmp_path: Path, split: bool
) -> None:
    own = store(tmp_path / "datastore", many(60, 200_000), split=split)
    with serving(own.path) as server:
        # In version 1 those of the first directory come before: its entries lie between the data.
        skip = 4 if split else 12
        hold = server.faults.add(Hold(match="/chunk", skip=skip, times=None))
        with running(PBSFS, "export", ROOT, tmp_path / "out", env=access(server)) as process:
            wait_until(lambda: hold.hits >= 6, "several chunks are requested at once")
            hold.release()
            assert process.wait(timeout=60) == 0
    assert_whole(own, tmp_path / "out")


@both_versions
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_is_interrupted_has_whole_files_only_and_can_be_completed(
    tmp_path: Path, split: bool, number: signal.Signals
) -> None:
    own = store(tmp_path / "datastore", many(60, 200_000), split=split)
    chunk, hit = own.chunk_of("d2/f055")
    out = tmp_path / "out"
    with serving(own.path) as server:
        hold = server.faults.add(Hold(match=chunk.name, times=None))
        with running(PBSFS, "export", ROOT, out, env=access(server)) as process:
            hold.wait()
            wait_until((out / "d1/f039").exists, "what comes before is reown")
            process.send_signal(number)
            _nothing, errors = process.communicate(timeout=30)
        hold.release()
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert (process.returncode, errors) == (128 + number, b"")
        found = {os.fsdecode(path): what[7] for path, what in seen(out).items() if stat.S_ISREG(what[0])}
        assert 40 <= len(found) < 60
        assert not set(hit) & set(found)
        assert all(own.contents[path] == content for path, content in found.items())
        again = pbsfs("export", "--overwrite", "--allow-existing-dirs", ROOT, out, env=access(server))
        assert (again.returncode, again.stderr) == (0, "")
    assert_whole(own, out)
    assert (out / "d2").stat().st_mtime_ns == 9


# --- progress


def test_a_terminal_shows_files_bytes_rate_and_time_left(stored: Store, tmp_path: Path) -> None:
    command: list[str | Path] = [PBSFS, "export", "--datastore-dir", stored.path]
    size = sum(map(len, stored.contents.values()))
    for path, options, name in [
        (ROOT, [], "root"),
        (f"{ROOT}/d1", [], "d1"),
        (ROOT, ["--exclude", "none"], "root"),
    ]:
        out = tmp_path / f"{len(os.listdir(tmp_path))}"
        status, shown = at_a_terminal([*command, *options, path, out], [], environment(TERM="xterm"))
        assert status == 0
        last = [line for line in shown.replace("\r", "\n").splitlines() if " files" in line][-1]
        files, part = (63, size) if name == "root" else (20, size // 3)
        assert name in last
        assert f"{files} files" in last
        assert f"{part / 2**20:.1f} MiB" in last or f"{part / 2**10:.1f} KiB" in last
        assert "MB/s" in last or "?" in last  # where it was too quick to have a rate
        assert "0:00:00" in last
    assert export(stored, ROOT, tmp_path / "quiet").stderr == ""


def test_the_output_of_nothing_is_nothing(stored: Store, tmp_path: Path) -> None:
    assert output_of(PBSFS, "export", "--datastore-dir", stored.path, ROOT, tmp_path / "out") == ""
