"""`pbsfs info`: what is known of one place in the tree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import made
from tests.support.program import PBSFS, error_of, output_of, pbsfs
from tests.support.stocked import CHUNK, ENCRYPTED, FIRST, IMAGE, Stocked, stock


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Stocked:
    """A datastore that no test changes."""
    return stock(tmp_path_factory.mktemp("stocked") / "datastore")


def info(stocked: Stocked, path: str) -> dict[str, Any]:
    text = output_of(PBSFS, "info", "--datastore-dir", stocked.path, "--json", path)
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_file_is_told_with_its_size_and_its_data(stocked: Stocked) -> None:
    found = info(stocked, IMAGE)
    assert found["path"] == IMAGE
    assert (found["size"], found["data_size"], found["chunk_size"]) == ("525824", "329216", str(CHUNK))
    assert (found["backup_time"], found["crypt_mode"]) == ("2023-11-14T22:13:20Z", "none")


def test_a_snapshot_is_told_with_its_files_by_their_stored_names(stocked: Stocked) -> None:
    found = info(stocked, FIRST)
    assert {"drive-scsi0.img.fidx", "qemu-server.conf.blob"} <= set(found["files"])
    assert (found["protected"], found["verify_state"]) == ("true", "ok")


def test_a_group_is_told_with_its_last_backup(stocked: Stocked) -> None:
    found = info(stocked, "vm/100")
    assert (found["backup_count"], found["last_backup"]) == ("2", "2023-11-15T22:13:20Z")


def test_an_encrypted_file_is_told_with_its_key(stocked: Stocked) -> None:
    found = info(stocked, ENCRYPTED)
    assert (found["crypt_mode"], found["key_fingerprint"]) == ("encrypt", made.KEY.fingerprint)


def test_stored_names_find_the_file_too(stocked: Stocked) -> None:
    assert info(stocked, f"{IMAGE}.fidx")["path"] == IMAGE
    assert info(stocked, "vm/101/latest")["path"] == "vm/101/2023-11-14T22:13:20Z"


def test_text_is_aligned_and_obeyed_by_no_terminal(tmp_path: Path) -> None:
    own = stock(tmp_path / "datastore")
    own.writer.add_snapshot(made.snapshot("9"), {"a.conf.blob": b"x"}, notes="one\ntwo \x1b[31m\x07 red")
    text = output_of(PBSFS, "info", "--datastore-dir", own.path, "vm/9/latest")
    assert "\x1b" not in text
    assert "\x07" not in text
    lines = text.splitlines()
    values = [line for line in lines if not line.startswith(" ")]
    assert all(line.index(":") < 17 and line[16] == " " for line in values)
    at = lines.index("notes:           one")
    assert lines[at + 1].startswith(" " * 17 + "two ")


def test_what_does_not_exist_is_status_3(stocked: Stocked) -> None:
    text = error_of(pbsfs("info", "--datastore-dir", stocked.path, "vm/999"), 3)
    assert text == "vm: there is no '999'; there is 100, 101"
