"""`pbsfs export --format`: tar and zip archives, as other programs read them, and how writing them fails."""

from __future__ import annotations

import fcntl
import io
import os
import random
import signal
import stat
import struct
import subprocess
import tarfile
import termios
import zipfile
from pathlib import Path

import pytest
import zstandard

from pbsfs.formats.index import DynamicIndex
from pbsfs.testing.archives import Node, write
from pbsfs.testing.writer import DatastoreWriter
from tests.contents.trees import directory, file
from tests.support import golden, made
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs, run
from tests.support.truth import ARCHIVES, FILES, Archive, differences, truth
from tests.support.waiting import wait_until

KEY = str(golden.ROOT / "keys" / "plain.json")
ROOT = "files/host/pc/latest/root"
SPARSE = made.image(5, "r" + "0" * 60 + "r", tail=77)
LINK = stat.S_IFLNK | 0o777

each_archive = pytest.mark.parametrize("archive", ARCHIVES, ids=lambda archive: archive.path)


def tree() -> Node:
    first = file(b"first", b"1" * 1000)
    return directory(
        b"",
        directory(b"d" * 255, file(b"f" * 255, b"deep"), file(b"\xff" * 200, b"no text")),
        first,
        file(b"large-owner", b"", uid=0xFFFFFFFE, gid=3_000_000),
        Node(b"later", link_to=first),
        Node(b"link", LINK, target=b"t/" * 500),
        Node(b"\xff" * 90, LINK, target=b"\xff" * 100),  # the largest sums of a header's bytes
        file(b"sparse", SPARSE, mtime_ns=-1),
        file(b"\xfe.bin", b"x" * 513, xattrs={b"user.binary": bytes(range(256)), b"user.empty": b""}),
    )


def stored(place: Path, root: Node) -> DatastoreWriter:
    writer = DatastoreWriter(place)
    written = write(root, split=True)
    assert written.payload is not None
    files = {"root.mpxar.didx": written.main, "root.ppxar.didx": written.payload}
    writer.add_snapshot(made.snapshot("pc", type="host"), files)
    return writer


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("pack") / "store", tree()).path


def packed(store: Path, *arguments: str, path: str = ROOT) -> bytes:
    done = subprocess.run(
        [PBSFS, "export", "--datastore-dir", store, *arguments, path, "-"],
        capture_output=True,
        check=False,
        env=environment(),
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- what other programs read


@pytest.mark.golden
@each_archive
def test_gnu_tar_restores_what_was(archive: Archive, tmp_path: Path) -> None:
    tar, copy = tmp_path / "a.tar", tmp_path / "copy"
    copy.mkdir()
    source = ("--datastore-dir", FILES / "datastore", "--keyfile", KEY)
    done = pbsfs("export", *source, "--format", "tar", f"files/{archive.path}", tar)
    sockets = {path for path, entry in truth(archive).items() if entry["t"] == stat.S_IFSOCK}
    assert done.returncode == 0
    assert done.stderr == (
        f"pbsfs: left out sockets: {len(sockets)}; a tar archive cannot hold them\n" * bool(sockets)
    )
    form = ("--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner")
    said = run(["tar", "-C", copy, "-xpf", tar, *form])
    assert said.returncode == 0
    assert all("time stamp" in line for line in said.stderr.splitlines())
    assert set(differences(copy, archive)) == {f"{path!r} is missing" for path in sockets}


def test_python_reads_all_of_it(store: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(packed(store))) as tar:
        found = {os.fsencode(info.name).removeprefix(b"./"): info for info in tar.getmembers()}
        assert set(found) == {
            b".",
            b"d" * 255,
            b"d" * 255 + b"/" + b"f" * 255,
            b"d" * 255 + b"/" + b"\xff" * 200,
            b"first",
            b"large-owner",
            b"later",
            b"link",
            b"\xff" * 90,
            b"sparse",
            b"\xfe.bin",
        }
        contents = {}
        for name, info in found.items():
            reader = tar.extractfile(info) if info.isreg() else None
            contents[name] = reader.read() if reader is not None else None
        assert contents[b"sparse"] == SPARSE
        assert contents[b"d" * 255 + b"/" + b"\xff" * 200] == b"no text"
        assert contents[b"\xfe.bin"] == b"x" * 513
        assert (found[b"large-owner"].uid, found[b"large-owner"].gid) == (0xFFFFFFFE, 3_000_000)
        assert found[b"link"].linkname == "t/" * 500
        assert found[b"later"].islnk()
        assert found[b"later"].linkname == "./first"
        assert found[b"sparse"].mtime == pytest.approx(-1e-9, abs=1e-12)
        assert len(found[b"sparse"].sparse or []) >= 2


def test_gnu_tar_reads_long_names_and_keeps_holes(store: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    form = ["--xattrs", "--xattrs-include=*", "--numeric-owner"]
    done = subprocess.run(
        ["tar", "-C", tmp_path / "copy", "-xp", *form],
        input=packed(store),
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert all(b"time stamp" in line or b"hdrcharset" in line for line in done.stderr.splitlines())
    root = os.fsencode(tmp_path / "copy")
    assert Path(os.fsdecode(root + b"/" + b"d" * 255 + b"/" + b"\xff" * 200)).read_bytes() == b"no text"
    sparse = tmp_path / "copy/sparse"
    assert sparse.read_bytes() == SPARSE
    assert sparse.stat().st_blocks * 512 < len(SPARSE) - (1 << 20)
    assert os.getxattr(root + b"/\xfe.bin", "user.binary") == bytes(range(256))
    assert (tmp_path / "copy/later").stat().st_ino == (tmp_path / "copy/first").stat().st_ino


def test_zstd_compresses_the_same_archive(store: Path) -> None:
    small = packed(store, "--format", "tar", "--zstd")
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(small)) as reader:
        assert reader.read() == packed(store)


def test_a_single_file_and_a_choice_of_files(store: Path) -> None:
    assert packed(store, path=f"{ROOT}/first") == b"1" * 1000
    with tarfile.open(fileobj=io.BytesIO(packed(store, "--format", "tar", path=f"{ROOT}/first"))) as tar:
        assert tar.getnames() == ["./first"]
    with tarfile.open(fileobj=io.BytesIO(packed(store, "--pattern", "/first", "--exclude", "later"))) as tar:
        assert tar.getnames() == [".", "./first"]


def test_zip_archives_have_names_contents_modes_and_links(store: Path, tmp_path: Path) -> None:
    done = pbsfs("export", "--datastore-dir", store, "--format", "zip", ROOT, tmp_path / "a.zip")
    assert (done.returncode, done.stderr) == (0, "")
    with zipfile.ZipFile(tmp_path / "a.zip") as found:
        assert found.testzip() is None
        assert found.read("sparse") == SPARSE
        assert found.read("later") == found.read("first") == b"1" * 1000
        assert found.read("link") == b"t/" * 500
        assert found.read(r"\xfe.bin") == b"x" * 513  # zip archives have names of text only
        assert found.read("d" * 255 + "/" + r"\xff" * 200) == b"no text"
        modes = {info.filename: info.external_attr >> 16 for info in found.infolist()}
        assert (modes["link"], modes["first"]) == (LINK, stat.S_IFREG | 0o644)
        assert modes["d" * 255 + "/"] == stat.S_IFDIR | 0o755
    assert (tmp_path / "a.zip").stat().st_mode & 0o777 == 0o600


# --- how it fails


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """An archive of three files, of which damage hits the second, and with it a part of the first."""
    files = [
        file(name, made.image(number, "rrrrrrrr", tail=9)) for number, name in enumerate((b"a", b"b", b"c"))
    ]
    writer = stored(tmp_path / "store", directory(b"", *files))
    path = writer.snapshot_path(made.snapshot("pc", type="host")) / "root.ppxar.didx"
    index = DynamicIndex(path.read_bytes())
    writer.chunk_path(index.digest(index.find(index.size // 2))).unlink()
    return writer.path


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_damage_leaves_no_archive(damaged: Path, tmp_path: Path, form: str) -> None:
    done = pbsfs("export", "--datastore-dir", damaged, "--format", form, ROOT, tmp_path / "a")
    text = error_of(done, 6)
    assert "chunk" in text
    assert {path.name for path in tmp_path.iterdir()} == {"store"}
    done = run(["sh", "-c", f"'{PBSFS}' export --datastore-dir '{damaged}' --format {form} {ROOT} - | wc -c"])
    assert "chunk" in done.stderr


@pytest.mark.parametrize("missing", [0, -1])
@pytest.mark.parametrize(
    ("form", "list_it"),
    [
        (("tar",), ("tar", "-t")),
        (("tar",), ("bsdtar", "-tf", "-")),
        (("tar", "--zstd"), ("tar", "--zstd", "-t")),
        (("tar", "--zstd"), ("zstd", "-dc")),
        (
            ("zip",),
            (
                "python3",
                "-c",
                "import io, sys, zipfile; zipfile.ZipFile(io.BytesIO(sys.stdin.buffer.read()))",
            ),
        ),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else str(value),
)
def test_an_archive_that_ends_early_is_reported_by_its_reader(
    tmp_path: Path, form: tuple[str, ...], list_it: tuple[str, ...], missing: int
) -> None:
    files = [file(name, made.image(number, "rrrrrrrr")) for number, name in enumerate((b"a", b"b"))]
    writer = stored(tmp_path / "store", directory(b"", *files))
    path = writer.snapshot_path(made.snapshot("pc", type="host")) / "root.ppxar.didx"
    index = DynamicIndex(path.read_bytes())
    writer.chunk_path(index.digest(index.find(index.size - 1) if missing else 0)).unlink()
    export = [PBSFS, "export", "--datastore-dir", str(writer.path), "--format", *form, ROOT, "-"]
    done = subprocess.run(export, capture_output=True, check=False, env=environment(), timeout=60)
    assert done.returncode == 6
    read = subprocess.run(list_it, input=done.stdout, capture_output=True, check=False, timeout=60)
    assert read.returncode != 0


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_damage_that_is_skipped_is_zeros(damaged: Path, tmp_path: Path, form: str) -> None:
    arguments = ("--datastore-dir", damaged, "--on-damage", "skip", "--format", form)
    done = pbsfs("export", *arguments, ROOT, tmp_path / "a")
    assert done.returncode == 20
    assert "b: bytes " in done.stderr
    if form == "tar":
        with tarfile.open(tmp_path / "a") as tar:
            members = {info.name.removeprefix("./"): tar.extractfile(info) for info in tar if info.isreg()}
            data = {name: reader.read() for name, reader in members.items() if reader is not None}
    else:
        with zipfile.ZipFile(tmp_path / "a") as found:
            data = {name: found.read(name) for name in found.namelist()}
    assert sorted(data) == ["a", "b", "c"]
    for number, name in enumerate("abc"):
        original = made.image(number, "rrrrrrrr", tail=9)
        assert len(data[name]) == len(original)
        assert all(a in (0, b) for a, b in zip(data[name], original, strict=True))
    assert data["b"] != made.image(1, "rrrrrrrr", tail=9)


def test_of_small_files_just_the_damaged_bytes_are_zeros(tmp_path: Path) -> None:
    contents = {f"{number:03d}": random.Random(number).randbytes(9_001) for number in range(300)}
    files = [file(name.encode(), data) for name, data in contents.items()]
    writer = stored(tmp_path / "store", directory(b"", *files))
    path = writer.snapshot_path(made.snapshot("pc", type="host")) / "root.ppxar.didx"
    index = DynamicIndex(path.read_bytes())
    number = index.find(index.size // 2)
    start, end = index.span(number)
    assert 0 < start < end < index.size
    assert end - start > 50_000
    writer.chunk_path(index.digest(number)).unlink()
    arguments = ("--datastore-dir", writer.path, "--on-damage", "skip", "--format", "tar")
    assert pbsfs("export", *arguments, ROOT, tmp_path / "a").returncode == 20
    with tarfile.open(tmp_path / "a") as tar:
        found = {}
        for info in tar:
            reader = tar.extractfile(info)
            found[info.name.removeprefix("./")] = b"" if reader is None else reader.read()
    assert found.keys() - {"."} == contents.keys()
    zeroed = 0
    partly = 0
    for name, data in contents.items():
        lost = sum(a != b for a, b in zip(found[name], data, strict=True))
        zeroed += lost
        partly += 0 < lost < len(data) * 0.9
        assert all(a in (0, b) for a, b in zip(found[name], data, strict=True))
    assert partly <= 2  # those at the ends of the chunk
    payload = 9_001 / (9_001 + 16)
    assert abs(zeroed - (end - start) * payload * 255 / 256) < 2_000  # a byte may be a zero anyway


def test_what_exists_is_overwritten_only_with_force(store: Path, tmp_path: Path) -> None:
    place = tmp_path / "a.tar"
    place.write_text("mine")
    arguments = ("export", "--datastore-dir", store, "--format", "tar")
    assert "exists" in error_of(pbsfs(*arguments, ROOT, place), 8)
    assert place.read_text() == "mine"
    assert pbsfs(*arguments, "--force", "--mode", "640", ROOT, place).returncode == 0
    assert place.stat().st_mode & 0o777 == 0o640
    assert tarfile.is_tarfile(place)


def test_overwrite_replaces_an_archive_when_the_new_one_is_complete(
    store: Path, damaged: Path, tmp_path: Path
) -> None:
    place = tmp_path / "a.zip"
    place.write_text("mine")
    place.chmod(0o644)
    refused = error_of(pbsfs("export", "--datastore-dir", store, "--format", "zip", ROOT, place), 8)
    assert refused == f"cannot write {place}: it exists; overwrite it with --overwrite, or name another file"
    overwriting = ("--format", "zip", "--overwrite", ROOT, place)
    assert pbsfs("export", "--datastore-dir", damaged, *overwriting).returncode == 6
    assert place.read_text() == "mine"
    assert pbsfs("export", "--datastore-dir", store, *overwriting).returncode == 0
    assert zipfile.is_zipfile(place)
    assert place.stat().st_mode & 0o777 == 0o644
    text = error_of(pbsfs("export", "--datastore-dir", store, "--format", "zip", ROOT, tmp_path), 8)
    assert text == f"cannot write {tmp_path}: it is a directory; name a file in it"


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.tar", "tar"), ("A.ZIP", "zip"), ("a.tar.zst", "tar --zstd"), ("a.tzst", "tar --zstd")],
)
def test_a_directory_does_not_get_the_name_of_an_archive(
    store: Path, tmp_path: Path, name: str, form: str
) -> None:
    place = tmp_path / name
    text = error_of(pbsfs("export", "--datastore-dir", store, ROOT, place), 2)
    assert text.startswith(f"{place}: without --format, pbsfs makes a directory of this name; ")
    assert text.endswith(f"add --format {form}, or write {place}/ for a directory")
    assert not place.exists()
    assert pbsfs("export", "--datastore-dir", store, ROOT, f"{place}/").returncode == 0
    assert (place / "first").read_bytes() == b"1" * 1000


def test_an_archive_that_another_program_compresses_is_piped_to_it(store: Path, tmp_path: Path) -> None:
    place = tmp_path / "a.tar.gz"
    text = error_of(pbsfs("export", "--datastore-dir", store, ROOT, place), 2)
    assert text.endswith(f"write the archive to - and pipe it to gzip, or write {place}/ for a directory")
    assert not place.exists()


def test_a_full_disk_leaves_nothing(store: Path, tmp_path: Path) -> None:
    export = f"exec '{PBSFS}' export --datastore-dir '{store}' --format tar {ROOT} a.tar"
    done = run(["sh", "-c", f"ulimit -f 100; trap '' XFSZ; {export}"], cwd=tmp_path)
    assert "cannot write a.tar" in error_of(done, 8)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_ends_it_quietly(store: Path) -> None:
    done = run(["sh", "-c", f"'{PBSFS}' export --datastore-dir '{store}' {ROOT} - | head -c 10 | wc -c"])
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "10", "")


def test_zstd_goes_with_tar_only(store: Path, tmp_path: Path) -> None:
    done = pbsfs("export", "--datastore-dir", store, "--format", "zip", "--zstd", ROOT, tmp_path / "a")
    assert "--zstd goes with --format tar" in error_of(done, 2)


# --- cat


def test_cat_writes_files_one_after_the_other(store: Path) -> None:
    arguments = ("cat", "--datastore-dir", store)
    assert output_of(PBSFS, *arguments, f"{ROOT}/first", f"{ROOT}/later") == "1" * 2000
    assert "path" not in output_of(PBSFS, *arguments, "host/pc/latest/index.json")[:5]
    assert "is not a file" in error_of(pbsfs(*arguments, ROOT), 2)
    assert "there is no 'none'" in error_of(pbsfs(*arguments, f"{ROOT}/none"), 3)


@pytest.mark.parametrize(
    "arguments",
    [("cat", f"{ROOT}/sparse"), ("export", ROOT, "-"), ("export", "--format", "zip", ROOT, "-")],
    ids=lambda words: " ".join(words[:3]),
)
def test_ctrl_c_ends_it_though_nobody_reads_what_it_writes(store: Path, arguments: tuple[str, ...]) -> None:
    command = [PBSFS, arguments[0], "--datastore-dir", str(store), *arguments[1:]]
    reading, writing = os.pipe()
    fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, 1 << 16)

    def waiting() -> int:
        """The bytes in the pipe."""
        (count,) = struct.unpack("i", fcntl.ioctl(reading, termios.FIONREAD, bytes(4)))
        return int(count)

    with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, env=environment()) as child:
        os.close(writing)
        wait_until(lambda: waiting() > 1 << 15, "the pipe fills")
        child.send_signal(signal.SIGINT)
        wait_until(lambda: child.poll() is not None, "it ends")
        assert child.returncode == 130
    os.close(reading)
