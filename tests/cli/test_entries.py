"""`pbsfs ls` and `pbsfs info` of entries of archives: the vendor's own archives, in every field."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import tarfile
from typing import Any

import pytest

from pbsfs.formats.manifest import CryptMode
from pbsfs.testing.archives import Node, write, write_catalog
from pbsfs.testing.writer import DatastoreWriter
from tests.support import golden, made
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs
from tests.support.terminal import at_a_terminal
from tests.support.truth import ARCHIVES, FILES, Archive, truth

KEY = str(golden.ROOT / "keys" / "plain.json")
PLACE = ["--datastore-dir", str(FILES / "datastore"), "--keyfile", KEY]
TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}

every_archive = pytest.mark.parametrize("archive", ARCHIVES, ids=lambda archive: archive.path)


def expected(entry: dict[str, Any]) -> dict[str, Any]:
    """What the truth says of an entry, by the names that `ls --json` has."""
    fields: dict[str, Any] = {"type": TYPES[entry["t"]], "mode": f"{entry['m']:04o}", "mtime_ns": entry["mt"]}
    fields |= {"uid": entry["u"], "gid": entry["g"]}
    if entry["t"] != stat.S_IFDIR:
        fields["links"] = entry["n"]
    if entry["t"] == stat.S_IFREG:
        fields["size"] = entry["s"]
    elif entry["t"] == stat.S_IFLNK:
        fields["target"] = os.fsdecode(bytes.fromhex(entry["l"]))
    elif entry["t"] in (stat.S_IFCHR, stat.S_IFBLK):
        fields["device"] = ",".join(map(str, entry["d"]))
    return fields


@pytest.mark.golden
@every_archive
def test_ls_shows_every_field_of_every_entry(archive: Archive) -> None:
    rows = json.loads(output_of(PBSFS, "ls", *PLACE, "-R", "--json", f"files/{archive.path}"))
    found = {os.fsencode(row["name"]): row for row in rows}
    found.pop(b".pxarexclude-cli", None)
    known = truth(archive)
    del known[b""]
    assert found.keys() == known.keys()
    assert len(known) > 20
    wrong = [
        (path, field, found[path].get(field), value)
        for path, entry in known.items()
        for field, value in expected(entry).items()
        if found[path].get(field) != value
    ]
    assert wrong == []


@pytest.mark.golden
@every_archive
def test_info_shows_every_field_of_an_entry(archive: Archive) -> None:
    known = truth(archive)
    by_type = {entry["t"]: path for path, entry in known.items()}
    by_type[-1] = next((path for path, entry in known.items() if entry["x"]), b"")
    for path in by_type.values():
        place = os.fsencode(f"files/{archive.path}") + (b"/" + path if path else b"")
        found = json.loads(output_of(PBSFS, "info", *PLACE, "--json", os.fsdecode(place)))
        wanted = expected(known[path])
        del wanted["mtime_ns"]
        assert {name: found[name] for name in wanted} == {
            name: value if name == "target" else str(value) for name, value in wanted.items()
        }
        assert found["xattrs"] == sorted(os.fsdecode(bytes.fromhex(name)) for name in known[path]["x"])
        assert found["archive"].startswith(archive.path.rpartition("/")[2] + ".")
        assert int(found["archive_size"]) > 1000
        assert found["mtime"].endswith("Z")


def store(writer: DatastoreWriter, root: Node) -> str:
    """Stores an archive; the path of its root."""
    writer.add_snapshot(made.snapshot("200", type="ct"), {"root.pxar.didx": write(root, split=False).main})
    return "files/ct/200/latest/root"


def with_catalog(writer: DatastoreWriter, root: Node) -> str:
    """As `store`, with a catalog, from which the names are listed."""
    files = {"root.pxar.didx": write(root, split=False).main}
    files["catalog.pcat1.didx"] = write_catalog({b"root.pxar.didx": root})
    writer.add_snapshot(made.snapshot("200", type="ct"), files)
    return "files/ct/200/latest/root"


@pytest.fixture
def writer(tmp_path_factory: pytest.TempPathFactory) -> DatastoreWriter:
    return DatastoreWriter(tmp_path_factory.mktemp("entries") / "datastore")


def test_programs_get_the_bytes_of_names_that_are_not_text(writer: DatastoreWriter) -> None:
    names = [b"a\xffb", "ä".encode(), b"line\nbreak", b"\x1b[31mred"]
    place = store(writer, Node(children=[Node(name, stat.S_IFREG | 0o644) for name in sorted(names)]))
    command = [str(PBSFS), "ls", "--datastore-dir", str(writer.path), place]
    done = subprocess.run(command, check=True, capture_output=True, env=environment())
    assert done.stdout == b"".join(name + b"\n" for name in sorted(names))


def test_a_damaged_part_of_an_archive_is_an_error_and_hides_no_other(writer: DatastoreWriter) -> None:
    place = store(
        writer,
        Node(
            children=[
                Node(
                    b"d%d" % folder,
                    children=[
                        Node(
                            b"f%d" % number, stat.S_IFREG | 0o640, data=made.image(10 * folder + number, "rr")
                        )
                        for number in range(3)
                    ],
                )
                for folder in range(4)
            ]
        ),
    )
    whole = output_of(PBSFS, "ls", "--datastore-dir", writer.path, "-R", place).splitlines()
    assert len(whole) == 16
    for chunk in sorted((writer.path / ".chunks").glob("*/*")):
        kept = chunk.read_bytes()
        chunk.unlink()
        done = pbsfs("ls", "--datastore-dir", writer.path, "-R", "--log-level", "error", place)
        listed = done.stdout.splitlines()
        assert set(listed) <= set(whole)
        # Never short without an error.
        assert done.returncode == 6 if len(listed) < len(whole) else done.returncode in (0, 6)
        assert ("pbsfs: " in done.stderr) == (done.returncode == 6)
        chunk.write_bytes(kept)


def test_a_directory_that_is_itself_damaged_is_an_error_with_its_reason(writer: DatastoreWriter) -> None:
    # Many entries, so that their headers are in other chunks than the table of the directory.
    names = [b"%05d" % number + b"x" * 200 for number in range(2000)]
    place = store(
        writer, Node(children=[Node(name, stat.S_IFREG | 0o644, data=b"d" * 999) for name in names])
    )
    short = 0
    for chunk in sorted((writer.path / ".chunks").glob("*/*")):
        kept = chunk.read_bytes()
        chunk.unlink()
        done = pbsfs("ls", "--datastore-dir", writer.path, "--log-level", "error", place)
        if len(done.stdout.splitlines()) < len(names):
            assert done.returncode == 6
            assert done.stderr.startswith("pbsfs: ")
            short += done.stdout != "" and "files/ct/200/" in done.stderr
        chunk.write_bytes(kept)
    assert short


def test_an_entry_that_only_the_catalog_shows_is_an_error_in_a_long_listing(writer: DatastoreWriter) -> None:
    names = [b"%05d" % number + b"x" * 200 for number in range(1000)]
    children = [Node(name, stat.S_IFREG | 0o644, data=b"d" * 999) for name in names]
    place = with_catalog(writer, Node(children=children))
    unknown = 0
    for chunk in sorted((writer.path / ".chunks").glob("*/*")):
        kept = chunk.read_bytes()
        chunk.unlink()
        done = pbsfs("ls", "--datastore-dir", writer.path, "-l", "--log-level", "error", place)
        marked = [line for line in done.stdout.splitlines() if line.startswith("-?????????")]
        if marked:
            assert done.returncode == 6
            assert len(done.stderr.splitlines()) == len(marked)
            unknown += 1
        chunk.write_bytes(kept)
    assert unknown


def test_directories_may_be_nested_thousands_of_levels_deep(writer: DatastoreWriter) -> None:
    depth = 2000
    root = Node(b"d", children=[Node(b"leaf", stat.S_IFREG | 0o644, data=b"far down")])
    for _level in range(depth - 1):
        root = Node(b"d", children=[root])
    place = store(writer, Node(children=[root]))
    names = output_of(PBSFS, "ls", "--datastore-dir", writer.path, "-R", place).splitlines()
    assert len(names) == depth + 1
    leaf = "d/" * depth + "leaf"
    assert names[-1] == leaf
    assert output_of(PBSFS, "cat", "--datastore-dir", writer.path, f"{place}/{leaf}") == "far down"


def test_what_is_wrong_with_an_archive_names_the_archive(writer: DatastoreWriter) -> None:
    main = write(Node(children=[Node(b"a", stat.S_IFREG | 0o644, data=b"a" * 100)]), split=False).main
    for time, stored in enumerate((b"", main[:-20])):
        writer.add_snapshot(
            made.snapshot("200", type="ct", time=made.TIME + time), {"root.pxar.didx": stored}
        )
    done = pbsfs("ls", "--datastore-dir", writer.path, "-R", "files/ct/200")
    assert done.returncode == 6
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == [
        "files/ct/200/2023-11-14T22:13:20Z/root",
        "files/ct/200/2023-11-14T22:13:21Z/root",
    ]
    inside = "files/ct/200/2023-11-14T22:13:20Z/root"
    error = error_of(pbsfs("cat", "--datastore-dir", writer.path, f"{inside}/a"), 6)
    assert error.startswith(f"{inside}: ")


def test_a_terminal_gets_no_escape_codes_of_names(writer: DatastoreWriter) -> None:
    place = store(writer, Node(children=[Node(b"\x1b[31mred\nforged", stat.S_IFREG | 0o644)]))
    for option, header in (("--recursive", 0), ("--tree", 1), ("--long", 1)):
        status, shown = at_a_terminal(
            [PBSFS, "ls", "--datastore-dir", writer.path, option, place], [], environment()
        )
        assert status == 0
        assert "\x1b" not in shown
        assert len(shown.splitlines()) == header + 1


def test_tar_archives_have_names_of_attributes_as_gnu_tar_encodes_them(writer: DatastoreWriter) -> None:
    file = Node(b"a", stat.S_IFREG | 0o644, xattrs={b"user.a=b": b"1", b"user.c%3Dd": b"2"})
    place = store(writer, Node(children=[file]))
    done = subprocess.run(
        [PBSFS, "export", "--datastore-dir", writer.path, "--format", "tar", place, "-"],
        capture_output=True,
        timeout=60,
        check=True,
        env=environment(),
    )
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        found = tar.getmember("./a").pax_headers
    assert found["SCHILY.xattr.user.a%3Db"] == "1"
    assert found["SCHILY.xattr.user.c%253Dd"] == "2"


def test_metadata_without_a_payload_is_shown_as_an_archive_that_cannot_be_read(
    writer: DatastoreWriter,
) -> None:
    main = write(Node(children=[Node(b"a", stat.S_IFREG | 0o644)]), split=True).main
    writer.add_snapshot(made.snapshot("200", type="ct"), {"root.mpxar.didx": main})
    place = "files/ct/200/latest"
    assert "root" in output_of(PBSFS, "ls", "--datastore-dir", writer.path, place).splitlines()
    error = error_of(pbsfs("ls", "--datastore-dir", writer.path, f"{place}/root"), 6)
    assert "has no payload stream" in error


def test_a_missing_key_hides_no_other_archive(writer: DatastoreWriter) -> None:
    store(writer, Node(children=[Node(b"a", stat.S_IFREG | 0o644)]))
    main = write(Node(children=[Node(b"b", stat.S_IFREG | 0o644)]), split=False).main
    first = made.snapshot("100", type="ct")
    writer.add_snapshot(first, {"root.pxar.didx": main}, crypt_mode=CryptMode.ENCRYPT, key=made.KEY)
    done = pbsfs("ls", "--datastore-dir", writer.path, "-R", "files/ct")
    assert done.returncode == 5
    assert [line for line in done.stdout.splitlines() if line.startswith("200") and line.endswith("/a")]
    assert made.KEY.fingerprint in done.stderr


def test_info_of_an_entry_that_cannot_be_read_is_an_error(writer: DatastoreWriter) -> None:
    place = store(writer, Node(children=[Node(b"a", stat.S_IFREG | 0o644)]))
    for chunk in (writer.path / ".chunks").glob("*/*"):
        chunk.unlink()
    error_of(pbsfs("info", "--datastore-dir", writer.path, "--log-level", "error", place), 6)
