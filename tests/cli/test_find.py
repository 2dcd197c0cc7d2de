"""`pbsfs find`: every condition, every form of output, and what cannot be read; on both sources."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pbsfs.base.names import Namespace
from pbsfs.formats.manifest import CryptMode
from pbsfs.testing.archives import Node, write, write_catalog
from pbsfs.testing.writer import DatastoreWriter
from tests.contents.trees import directory, file
from tests.support import golden, made
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs, run
from tests.support.serving import access, serving
from tests.support.terminal import at_a_terminal
from tests.support.truth import ARCHIVES, FILES, truth

OLD, NEW = "2023-11-14T22:13:20Z", "2023-11-15T22:13:20Z"
SECOND = 1_000_000_000
DAY_2020 = 1_577_836_800 * SECOND


def tree(extra: bytes = b"") -> Node:
    return directory(
        b"",
        directory(
            b"etc",
            file(b"Hosts.CONF", b"x" * 10, mtime_ns=DAY_2020),
            file(b"app.conf", b"x" * 5000 + extra, mtime_ns=DAY_2020 + 86_400 * SECOND, uid=7),
            Node(b"link.conf", stat.S_IFLNK | 0o777, target=b"app.conf", mtime_ns=DAY_2020),
            Node(b"pipe", stat.S_IFIFO | 0o600, mtime_ns=DAY_2020),
            mtime_ns=DAY_2020,
        ),
        directory(b"line\nbreak", file(b"\xff.conf", mtime_ns=DAY_2020), mtime_ns=DAY_2020),
        mtime_ns=DAY_2020,
    )


def version_2(root: Node) -> dict[str, bytes]:
    written = write(root, split=True)
    assert written.payload is not None
    return {"root.mpxar.didx": written.main, "root.ppxar.didx": written.payload}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    writer = DatastoreWriter(tmp_path_factory.mktemp("find") / "store")
    writer.add_snapshot(made.snapshot("pc", type="host"), version_2(tree()))
    writer.add_snapshot(made.snapshot("pc", type="host", time=made.TIME + made.DAY), version_2(tree(b"more")))
    root = tree()
    old = {"root.pxar.didx": write(root, split=False).main}
    old["catalog.pcat1.didx"] = write_catalog({b"root.pxar.didx": root})
    writer.add_snapshot(made.snapshot("200", type="ct", namespace=Namespace(("prod",))), old)
    return writer.path


Find = Callable[..., list[str]]


@pytest.fixture(params=["directory", "server"])
def find(request: pytest.FixtureRequest, store: Path) -> Iterator[Find]:
    """Runs `pbsfs find` with `-0`; gives the paths."""
    with ExitStack() as stack:
        told = environment(PBSFS_DATASTORE_DIR=str(store))
        if request.param == "server":
            told = access(stack.enter_context(serving(store)))

        def ask(*arguments: str) -> list[str]:
            done = run([PBSFS, "find", "-0", *arguments], env=told, errors="surrogateescape")
            assert (done.returncode, done.stderr) == (0, "")
            return done.stdout.split("\0")[:-1]

        yield ask


PC = [f"files/host/pc/{OLD}/root", f"files/host/pc/{NEW}/root"]
CT = f"files/ns/prod/ct/200/{OLD}/root"


def test_all_nights_of_all_archives_are_searched(find: Find) -> None:
    found = find("--name", "*.conf", "--type", "f")
    inner = ["etc/app.conf", "line\nbreak/\udcff.conf"]
    assert sorted(found) == sorted(f"{root}/{path}" for root in (*PC, CT) for path in inner)


def test_names(find: Find) -> None:
    assert find("--iname", "hosts*", PC[0]) == [f"{PC[0]}/etc/Hosts.CONF"]
    assert find("--name", "hosts*", PC[0]) == []
    assert find("--name", "app*", "--name", "pi?e", PC[0]) == [f"{PC[0]}/etc/app.conf", f"{PC[0]}/etc/pipe"]
    assert find("--name", "[!a-z]*", "--type", "f", PC[0]) == [
        f"{PC[0]}/etc/Hosts.CONF",
        f"{PC[0]}/line\nbreak/\udcff.conf",
    ]
    assert find("--name", "root", PC[0], CT) == [PC[0], CT]


def test_whole_paths(find: Find) -> None:
    assert find("--regex", ".*/etc/[a-z]+[.]conf", PC[1]) == [
        f"{PC[1]}/etc/app.conf",
        f"{PC[1]}/etc/link.conf",
    ]
    assert find("--regex", "etc", PC[1]) == []


@pytest.mark.parametrize("place", [PC[0], CT])
def test_types_sizes_and_times(find: Find, place: str) -> None:
    assert find("--type", "l,p", place) == [f"{place}/etc/link.conf", f"{place}/etc/pipe"]
    assert find("--type", "d", place) == [place, f"{place}/etc", f"{place}/line\nbreak"]
    assert find("--size", "+4k", "--type", "f", place) == [f"{place}/etc/app.conf"]
    assert find("--size", "-5000", "--size", "+1", "--type", "f", place) == [f"{place}/etc/Hosts.CONF"]
    assert find("--size", "5000", place) == [f"{place}/etc/app.conf"]
    assert find("--newer", "2020-01-01T12:00:00Z", place) == [f"{place}/etc/app.conf"]
    assert find("--older", "2020-01-01T12:00Z", "--name", "app.conf", place) == []
    assert len(find("--older", "1d", place)) == len(find(place))


def test_latest_leaves_out_all_but_the_newest_night(find: Find) -> None:
    found = find("--latest", "--name", "app.conf")
    assert sorted(found) == sorted([f"{PC[1]}/etc/app.conf", f"{CT}/etc/app.conf"])
    assert find("--name", "app.conf", "files/host/pc/latest") == [f"{PC[1]}/etc/app.conf"]


@pytest.mark.parametrize("path", ["host", "host/pc/latest"])
def test_a_place_outside_of_files_is_refused_with_the_one_inside(store: Path, path: str) -> None:
    done = pbsfs("find", "--datastore-dir", store, "--name", "app.conf", path)
    text = error_of(done, 2)
    assert "find searches below files; name 'files/host" in text


@pytest.mark.parametrize(
    "arguments", [("*.conf",), ("*.conf", "files/host/pc"), ("files/host/pc", "*.conf")], ids=" ".join
)
def test_a_pattern_in_the_place_of_a_path_is_told_its_option(store: Path, arguments: tuple[str, ...]) -> None:
    text = error_of(pbsfs("find", "--datastore-dir", store, *arguments), 3)
    assert text.startswith("/: there is no '*.conf'; there is ")
    assert text.endswith("; for a name, write --name '*.conf'")
    text = error_of(pbsfs("find", "--datastore-dir", store, "files/none"), 3)
    assert "--name" not in text


def test_places_may_be_anywhere_below_files(find: Find) -> None:
    assert (
        len(find("files/host")) == 2 * 8 + 2 * 2 + 2
    )  # in two nights: the archive, the manifest, the snapshot
    assert find(f"{PC[0]}/etc/pipe") == [f"{PC[0]}/etc/pipe"]
    assert find("--name", "*.conf", f"{PC[0]}/etc") == [
        f"{PC[0]}/etc/app.conf",
        f"{PC[0]}/etc/link.conf",
    ]


def test_json_has_all_that_is_known(store: Path) -> None:
    arguments = ("find", "--datastore-dir", store, "--json")
    rows = json.loads(output_of(PBSFS, *arguments, "--name", "app.conf", PC[1]))
    assert rows == [
        {
            "path": f"{PC[1]}/etc/app.conf",
            "type": "f",
            "size": 5004,
            "mode": "0644",
            "uid": 7,
            "gid": 0,
            "mtime_ns": DAY_2020 + 86_400 * SECOND,
        }
    ]
    link = json.loads(output_of(PBSFS, *arguments, "--type", "l", PC[1]))
    assert link[0]["target"] == "app.conf"
    assert json.loads(output_of(PBSFS, *arguments, "--name", "none")) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--type", "x"], "'x' is not a type; use f, d, l"),
        (["--size", "big"], "not a size"),
        (["--newer", "yesterday"], "is not a time"),
        (["--regex", "("], "--regex '('"),
        (["--name", "[a"], "bracket"),
    ],
)
def test_conditions_that_make_no_sense_are_refused(store: Path, arguments: list[str], text: str) -> None:
    assert text in error_of(pbsfs("find", "--datastore-dir", store, *arguments), 2)


def test_what_cannot_be_read_hides_nothing_else(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "store")
    for number in range(3):
        snapshot = made.snapshot("pc", type="host", time=made.TIME + number * made.DAY)
        writer.add_snapshot(snapshot, version_2(tree()))
    writer.add_snapshot(
        made.snapshot("sealed", type="host"), version_2(tree()), crypt_mode=CryptMode.ENCRYPT, key=made.KEY
    )
    (writer.path / "host/pc" / NEW / "root.mpxar.didx").write_bytes(b"x" * 5000)
    done = pbsfs("find", "--datastore-dir", writer.path, "--name", "app.conf")
    assert done.returncode == 6
    assert len(done.stdout.splitlines()) == 2
    damage, sealed = sorted(done.stderr.splitlines())
    assert damage.startswith(f"pbsfs: files/host/pc/{NEW}/root: ")
    assert "was not given" in sealed
    done = pbsfs("find", "--datastore-dir", writer.path, "files/host/sealed")
    assert done.returncode == 5


def test_a_reader_that_leaves_ends_the_search_quietly(store: Path) -> None:
    done = run(["sh", "-c", f"'{PBSFS}' find --datastore-dir '{store}' | head -1"])
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


ALWAYS = "import pbsfs.cli.progress as p; p.INTERVAL = 0; from pbsfs.cli import main; main()"
"""The program, with each change of what it shows of its progress."""


def test_the_progress_counts_archives_and_matches_and_leaves_no_trace(store: Path) -> None:
    words = ["-c", ALWAYS, "find", "--datastore-dir", str(store), "--name", "app.conf"]
    done = run([sys.executable, *words, "--progress"])
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 3)
    first, *_others, last, blank, end = done.stderr.split("\n")[1:]  # text: each return is a line break
    assert first == "0 archives, 0 matches"
    assert last.startswith("3 archives, ")
    assert (blank, end) == (" " * len(last), "")
    assert run([sys.executable, *words]).stderr == ""  # not a terminal


def test_a_terminal_shows_matches_on_lines_of_their_own(store: Path) -> None:
    words = [str(PBSFS), "find", "--datastore-dir", str(store), "--name", "app.conf", PC[0]]
    status, shown = at_a_terminal(words, [], environment())
    assert status == 0
    assert shown.startswith("\r0 archives, 0 matches\r")
    assert f"\r{PC[0]}/etc/app.conf\n" in shown
    status, shown = at_a_terminal([*words, "--no-progress"], [], environment())
    assert (status, shown) == (0, f"{PC[0]}/etc/app.conf\n")


@pytest.mark.golden
@pytest.mark.parametrize(
    "archive", [archive for archive in ARCHIVES if not archive.key], ids=lambda a: a.path
)
def test_the_vendors_archives_have_the_true_entries(archive: Any) -> None:
    place = f"files/{archive.path}"
    done = run([PBSFS, "find", "-0", "--datastore-dir", FILES / "datastore", place], errors="surrogateescape")
    found = {
        os.fsencode(path).removeprefix(place.encode()).lstrip(b"/") for path in done.stdout.split("\0")[:-1]
    }
    assert found - {b".pxarexclude-cli"} == set(truth(archive))
    assert golden.is_there()
