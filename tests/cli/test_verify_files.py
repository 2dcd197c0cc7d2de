"""`pbsfs verify` and files in archives: which of them damage hits, and a path in an archive."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from pbsfs.formats.index import DynamicIndex
from pbsfs.testing.archives import Node, write, write_catalog
from pbsfs.testing.writer import DatastoreWriter
from tests.support import made
from tests.support.program import PBSFS, output_of, pbsfs

SNAPSHOT = "ct/200/2023-11-14T22:13:20Z"
ROOT = f"files/{SNAPSHOT}/root"
FILE = stat.S_IFREG | 0o644

both = pytest.mark.parametrize("split", [False, True], ids=["version 1", "version 2"])


def contents() -> dict[str, bytes]:
    return {
        f"d{folder}/f{number}": made.image(100 * folder + number, "rrrrrr"[: 1 + number % 6], tail=number)
        for folder in range(4)
        for number in range(6)
    }


def stored(writer: DatastoreWriter, *, split: bool) -> list[str]:
    """Writes the archive; the names of its streams."""
    root = Node()
    for path, data in contents().items():
        folder, _slash, name = path.partition("/")
        if not root.children or root.children[-1].name != folder.encode():
            root.children.append(Node(folder.encode()))
        root.children[-1].children.append(Node(name.encode(), FILE, data=data))
    written = write(root, split=split)
    files = {"root.pxar.didx": written.main, "catalog.pcat1.didx": write_catalog({b"root.pxar.didx": root})}
    if written.payload is not None:
        files = {"root.mpxar.didx": written.main, "root.ppxar.didx": written.payload}
    writer.add_snapshot(made.snapshot("200", type="ct"), files)
    return [name for name in files if not name.startswith("catalog")]


def verify(writer: DatastoreWriter, *paths: str) -> dict[str, Any]:
    done = pbsfs("verify", "--datastore-dir", writer.path, "--json", *paths)
    assert done.returncode in (0, 6), done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def not_restored(writer: DatastoreWriter, place: Path) -> set[str]:
    """The files that a restore could not give back as they were."""
    done = pbsfs("export", "--datastore-dir", writer.path, "--on-damage", "skip", ROOT, place)
    assert done.returncode == 20, done.stderr
    return {
        path
        for path, data in contents().items()
        if not (place / path).exists() or (place / path).read_bytes() != data
    }


@both
def test_the_files_that_damage_hits_are_named(tmp_path: Path, split: bool) -> None:
    writer = DatastoreWriter(tmp_path / "store")
    stream = stored(writer, split=split)[-1]
    index = DynamicIndex((writer.snapshot_path(made.snapshot("200", type="ct")) / stream).read_bytes())
    assert index.count > 8
    for number in (index.count // 3, index.count // 2):
        chunk = writer.chunk_path(index.digest(number))
        kept = chunk.read_bytes()
        chunk.unlink()
        (damage,) = verify(writer, SNAPSHOT)["damaged"]
        assert damage["path"] == f"{SNAPSHOT}/{stream.removesuffix('.didx')}"
        hit = {path.removeprefix(ROOT).removeprefix("/") for path in damage["files"]}
        assert damage["file_count"] == len(hit) > 0
        lost = not_restored(writer, tmp_path / f"restored-{number}")
        # A directory stands for what cannot be listed in it.
        assert {path for path in lost if not {path, os.path.dirname(path), ""} & hit} == set()
        assert {path for path in hit if path in contents()} <= lost
        assert len(lost) < len(contents())
        chunk.write_bytes(kept)
    assert verify(writer)["damaged"] == []


def test_damaged_metadata_names_the_directories_that_it_hides(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "store")
    metadata = stored(writer, split=True)[0]
    index = DynamicIndex((writer.snapshot_path(made.snapshot("200", type="ct")) / metadata).read_bytes())
    writer.chunk_path(index.digest(0)).unlink()
    (damage,) = verify(writer)["damaged"]
    assert damage["files"] == [ROOT]


@both
def test_a_path_in_an_archive_checks_what_is_below_it(tmp_path: Path, split: bool) -> None:
    writer = DatastoreWriter(tmp_path / "store")
    stream = stored(writer, split=split)[-1]
    index = DynamicIndex((writer.snapshot_path(made.snapshot("200", type="ct")) / stream).read_bytes())
    writer.chunk_path(index.digest(index.count // 2)).unlink()
    hit = set(verify(writer)["damaged"][0]["files"])
    whole = {found["path"] for found in verify(writer, ROOT)["damaged"]}
    assert whole == hit
    for folder in range(4):
        place = f"{ROOT}/d{folder}"
        below = {path for path in whole if path.startswith(place)}
        if below or ROOT not in whole:
            assert {found["path"] for found in verify(writer, place)["damaged"]} == below
    (path, *_others) = sorted(whole - {ROOT})
    assert [found["path"] for found in verify(writer, path)["damaged"]] == [path]


def test_the_text_names_the_first_of_them(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "store")
    stream = stored(writer, split=True)[-1]
    index = DynamicIndex((writer.snapshot_path(made.snapshot("200", type="ct")) / stream).read_bytes())
    for number in range(index.count):
        writer.chunk_path(index.digest(number)).unlink(missing_ok=True)
    lines = pbsfs("verify", "--datastore-dir", writer.path).stdout.splitlines()
    (named,) = [line for line in lines if "files in it that are damaged" in line]
    assert named.endswith(f", … ({len(contents())} in all)")
    assert named.count(ROOT) == 8


def test_all_of_files_can_be_verified(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "store")
    stored(writer, split=True)
    text = output_of(PBSFS, "verify", "--datastore-dir", writer.path, "files")
    assert "0 damaged, 0 not checked" in text


def test_the_files_below_a_path_are_counted(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "store")
    stored(writer, split=True)
    size = sum(len(data) for path, data in contents().items() if path.startswith("d1/"))
    said = output_of(PBSFS, "verify", "--datastore-dir", writer.path, f"{ROOT}/d1")
    assert said == f"6 files, {size} bytes read; 0 damaged, 0 not checked\n"
