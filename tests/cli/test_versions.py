"""`pbsfs versions`: a file over all nights, from a directory and from a server."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pbsfs.testing.archives import Node, write
from pbsfs.testing.writer import DatastoreWriter
from tests.support import golden, made
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs, run
from tests.support.serving import access, serving
from tests.support.truth import ARCHIVES, FILES, truth

FILE = stat.S_IFREG | 0o644
DAYS = [f"2023-11-{14 + day}T22:13:20Z" for day in range(8)]
PATH = "files/host/pc/latest/root/etc/hosts"


def night(etc: Node | None, number: int) -> dict[str, bytes]:
    root = Node(b"", children=[] if etc is None else [Node(b"etc", children=[etc])])
    root.children.append(Node(b"zz-link", stat.S_IFLNK | 0o777, target=b"etc"))
    written = write(root, split=number % 2 == 0)
    if written.payload is None:
        return {"root.pxar.didx": written.main}
    return {"root.mpxar.didx": written.main, "root.ppxar.didx": written.payload}


def hosts(data: bytes = b"one", mode: int = FILE, **fields: Any) -> Node:
    return Node(b"hosts", mode, data=data, mtime_ns=1_700_000_000_000_000_001, **fields)


NIGHTS = [
    None,  # not there yet
    hosts(),
    hosts(),
    hosts(b"longer"),
    None,
    hosts(b"longer", stat.S_IFREG | 0o600, uid=7),
    hosts(b"other!", stat.S_IFREG | 0o600, uid=7),  # which only its bytes tell
    Node(b"hosts", stat.S_IFLNK | 0o777, target=b"elsewhere"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    writer = DatastoreWriter(tmp_path_factory.mktemp("versions") / "store")
    for number, etc in enumerate(NIGHTS):
        snapshot = made.snapshot("pc", type="host", time=made.TIME + number * made.DAY)
        writer.add_snapshot(snapshot, night(etc, number))
    return writer.path


Versions = Callable[..., list[dict[str, Any]]]


@pytest.fixture(params=["directory", "server"])
def versions(request: pytest.FixtureRequest, store: Path) -> Iterator[Versions]:
    with ExitStack() as stack:
        told = environment(PBSFS_DATASTORE_DIR=str(store))
        if request.param == "server":
            told = access(stack.enter_context(serving(store)))

        def ask(*arguments: str) -> list[dict[str, Any]]:
            done = pbsfs("versions", "--json", *arguments, env=told)
            assert (done.returncode, done.stderr) == (0, "")
            rows: list[dict[str, Any]] = json.loads(done.stdout)
            return rows

        yield ask


def summary(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (DAYS.index(row["first"]), DAYS.index(row["last"]), row["snapshots"], row.get("changes"))
        for row in rows
    ]


def test_each_version_has_its_time_and_what_changed(versions: Versions) -> None:
    rows = versions(PATH)
    assert summary(rows) == [
        (0, 0, 1, None),
        (1, 2, 2, []),
        (3, 3, 1, ["size"]),
        (4, 4, 1, None),
        (5, 6, 2, ["mode", "owner"]),
        (7, 7, 1, ["type", "size", "mtime", "mode", "owner", "link"]),
    ]
    assert [row["exists"] for row in rows] == [False, True, True, False, True, True]
    assert rows[1] | {"changes": []} == {
        "first": DAYS[1],
        "last": DAYS[2],
        "snapshots": 2,
        "exists": True,
        "mode": "100644",
        "uid": 0,
        "gid": 0,
        "size": 3,
        "mtime_ns": 1_700_000_000_000_000_001,
        "changes": [],
    }
    assert rows[5]["target"] == "elsewhere"


def test_contents_tell_versions_apart_that_look_the_same(versions: Versions) -> None:
    rows = versions("--content", PATH)
    assert summary(rows)[4:6] == [(5, 5, 1, ["mode", "owner"]), (6, 6, 1, ["content"])]
    assert len({row["sha256"] for row in rows if "sha256" in row}) == 3


def test_the_path_may_lead_through_any_snapshot_and_through_links(versions: Versions) -> None:
    expected = versions(PATH)
    for path in (
        f"files/host/pc/{DAYS[0]}/root/etc/hosts",
        f"files/host/pc/{DAYS[4]}/root/./etc//hosts",
        "files/host/pc/latest/root/zz-link/hosts",
    ):
        assert versions(path) == expected


def test_lines(store: Path) -> None:
    lines = output_of(PBSFS, "versions", "--datastore-dir", store, PATH).splitlines()
    assert lines[0] == f"{DAYS[0]} to {DAYS[0]}    1 does not exist"
    assert lines[1] == f"{DAYS[1]} to {DAYS[2]}    2 -rw-r--r-- 0:0            3 2023-11-14T22:13:20Z"
    assert lines[4].endswith("    2 -rw------- 7:0            6 2023-11-14T22:13:20Z (mode, owner)")
    assert "-> elsewhere (type, size" in lines[5]


def test_what_is_in_no_snapshot_is_not_found(store: Path) -> None:
    done = pbsfs("versions", "--datastore-dir", store, f"{PATH}.bak")
    assert "no snapshot has root/etc/hosts.bak" in error_of(done, 3)


@pytest.mark.parametrize(
    "path", ["files", "files/host/pc", f"host/pc/{DAYS[0]}/root.mpxar", "files/host/pc/latest"]
)
def test_a_path_outside_of_archives_is_refused(store: Path, path: str) -> None:
    done = pbsfs("versions", "--datastore-dir", store, path)
    assert "not a file in an archive" in error_of(done, 2)


def test_damage_of_one_night_hides_only_that(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "store")
    for number in range(3):
        snapshot = made.snapshot("pc", type="host", time=made.TIME + number * made.DAY)
        writer.add_snapshot(snapshot, night(hosts(b"%d" % number * 9), 0))
    (writer.path / "host/pc" / DAYS[1] / "root.mpxar.didx").write_bytes(b"x" * 5000)
    done = pbsfs("versions", "--datastore-dir", writer.path, "--content", "--json", PATH)
    assert done.returncode == 6
    assert [row["first"] for row in json.loads(done.stdout)] == [DAYS[0], DAYS[2]]
    assert done.stderr.startswith(f"pbsfs: files/host/pc/{DAYS[1]}: ")


@pytest.mark.golden
@pytest.mark.parametrize("group", ["ct/210", "ct/211"])
def test_the_versions_of_the_vendors_archives_are_the_true_ones(group: str) -> None:
    old, new = truth(ARCHIVES[0]), truth(ARCHIVES[1])
    for path in (b"etc/conf-01.conf", b"etc/conf-04.conf", b"etc/conf-10.conf", b"dirs/added/file"):
        done = pbsfs(
            "versions",
            *("--datastore-dir", FILES / "datastore", "--content", "--json"),
            f"files/{group}/latest/root/{path.decode()}",
        )
        rows = json.loads(done.stdout)
        digests = [row.get("sha256") for row in rows for _ in range(row["snapshots"])]
        assert digests == [entries[path]["h"] if path in entries else None for entries in (old, new)]
    assert golden.is_there()


ALWAYS = "import pbsfs.cli.progress as p; p.INTERVAL = 0; from pbsfs.cli import main; main()"
"""The program, with each change of what it shows of its progress."""


def test_the_progress_counts_snapshots_and_leaves_no_trace(store: Path) -> None:
    words = [sys.executable, "-c", ALWAYS, "versions", "--datastore-dir", str(store), PATH]
    done = run([*words, "--progress"])
    shown = done.stderr.split("\n")[1:]  # text: each return is a line break
    assert shown[:-2] == [f"{count} of {len(NIGHTS)} snapshots" for count in range(len(NIGHTS) + 1)]
    assert (shown[-2].strip(), shown[-1]) == ("", "")
    plain = run(words)  # not a terminal
    assert (plain.stdout, plain.stderr) == (done.stdout, "")
