"""The file of known fingerprints: in the form of the vendor's client; no line of others is lost."""

from __future__ import annotations

import fcntl
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pbsfs.access import fingerprints
from pbsfs.access.fingerprints import fingerprints_file, known_fingerprint, remember_fingerprint
from pbsfs.base.errors import UsageError
from tests.support.needs import need_root

OTHER = "ab" * 32
SHOWN_OTHER = ":".join(["ab"] * 32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return fingerprints_file(tmp_path / "config")


def test_the_file_is_the_one_of_the_vendors_client(tmp_path: Path) -> None:
    assert fingerprints_file(tmp_path) == tmp_path / "proxmox-backup" / "fingerprints"


def test_without_the_file_nobody_is_known(file: Path) -> None:
    assert known_fingerprint(file, "host") is None


def test_lines_are_read_as_the_vendors_client_writes_them(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(f"192.0.2.1 {SHOWN_OTHER}\npbs.example.com {'01:' * 31}01\n[fd00::1] {SHOWN_OTHER}\n")

    assert known_fingerprint(file, "192.0.2.1") == OTHER
    assert known_fingerprint(file, "pbs.example.com") == "01" * 32
    assert known_fingerprint(file, "fd00::1") == OTHER
    assert known_fingerprint(file, "example.com") is None
    assert known_fingerprint(file, "192.0.2.10") is None


def test_lines_that_make_no_sense_are_passed_over(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(
        b"\n# a remark\nhost\nhost abc\nhost one two\n\xff\xfe\n  host\t" + SHOWN_OTHER.encode() + b"  \n"
    )
    assert known_fingerprint(file, "host") == OTHER


def test_what_is_remembered_is_known_and_other_lines_stay(file: Path) -> None:
    remember_fingerprint(file, "host", OTHER)
    assert file.read_text() == f"host {SHOWN_OTHER}\n"

    file.write_text(f"other {SHOWN_OTHER}\nhost {SHOWN_OTHER}\n# a remark \n\xff")
    remember_fingerprint(file, "host", "01" * 32)

    assert file.read_text() == f"other {SHOWN_OTHER}\n# a remark \n\xff\nhost {'01:' * 31}01\n"
    assert known_fingerprint(file, "host") == "01" * 32
    assert known_fingerprint(file, "other") == OTHER
    assert [path.name for path in file.parent.iterdir()] == ["fingerprints"]


def test_bytes_that_are_no_text_stay_too(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(b"a\xffb " + SHOWN_OTHER.encode() + b"\n")
    remember_fingerprint(file, "host", OTHER)
    assert file.read_bytes().startswith(b"a\xffb ")


def test_an_address_of_ipv6_is_remembered_with_brackets_as_the_vendors_client_does(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(f"fd00::1 {SHOWN_OTHER}\n")
    remember_fingerprint(file, "fd00::1", "01" * 32)
    assert file.read_text() == f"[fd00::1] {'01:' * 31}01\n"


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "proxmox-backup").write_text("not a directory")
    file = fingerprints_file(tmp_path)
    with pytest.raises(UsageError, match=f"cannot remember the fingerprint in {file}"):
        remember_fingerprint(file, "host", OTHER)
    assert known_fingerprint(file, "host") is None


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_the_file_keeps_its_mode(file: Path, mode: int) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(f"other {SHOWN_OTHER}\n")
    file.chmod(mode)
    remember_fingerprint(file, "host", OTHER)
    assert stat.S_IMODE(file.stat().st_mode) == mode
    assert known_fingerprint(file, "other") == known_fingerprint(file, "host") == OTHER


def test_the_file_keeps_its_owner(file: Path) -> None:
    need_root("owners are given away")
    file.parent.mkdir(parents=True)
    file.write_text("")
    os.chown(file, 1234, 2345)
    remember_fingerprint(file, "host", OTHER)
    assert (file.stat().st_uid, file.stat().st_gid) == (1234, 2345)


def test_an_owner_that_cannot_be_kept_leaves_the_old_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_root("owners are given away")
    file.parent.mkdir(parents=True)
    file.write_text(f"other {SHOWN_OTHER}\n")
    os.chown(file, 1234, 2345)

    def refused(_fd: int, _uid: int, _gid: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refused)
    with pytest.raises(UsageError, match="Operation not permitted"):
        remember_fingerprint(file, "host", OTHER)
    assert file.read_text() == f"other {SHOWN_OTHER}\n"
    assert [path.name for path in file.parent.iterdir()] == ["fingerprints"]


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing yet"])
def test_what_a_link_points_to_is_written_and_the_link_stays(file: Path, tmp_path: Path, there: bool) -> None:
    target = tmp_path / "elsewhere" / "known"
    target.parent.mkdir()
    if there:
        target.write_text(f"other {SHOWN_OTHER}\n")
    file.parent.mkdir(parents=True)
    file.symlink_to("../../elsewhere/known")

    remember_fingerprint(file, "host", OTHER)

    assert file.is_symlink()
    assert not target.is_symlink()
    assert target.read_text() == (f"other {SHOWN_OTHER}\n" if there else "") + f"host {SHOWN_OTHER}\n"


def test_a_file_that_a_crash_left_is_not_in_the_way(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.with_name("fingerprints.new").symlink_to(file.parent / "trap")
    remember_fingerprint(file, "host", OTHER)
    assert [path.name for path in file.parent.iterdir()] == ["fingerprints"]


def test_many_that_write_at_once_lose_no_line(file: Path) -> None:
    hosts = [f"host{number}" for number in range(32)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda host: remember_fingerprint(file, host, OTHER), hosts))
    assert sorted(line.split()[0] for line in file.read_text().splitlines()) == sorted(hosts)


def test_the_file_is_read_under_the_lock(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.parent.mkdir(parents=True)
    file.write_text("")
    replace = fingerprints._replace

    def under_the_lock(target: Path, host: str, fingerprint: str) -> None:
        other = os.open(file.parent, os.O_RDONLY)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(other)
        replace(target, host, fingerprint)

    monkeypatch.setattr(fingerprints, "_replace", under_the_lock)
    remember_fingerprint(file, "host", OTHER)
    assert known_fingerprint(file, "host") == OTHER


def test_a_named_pipe_is_neither_waited_for_nor_replaced(file: Path) -> None:
    file.parent.mkdir(parents=True)
    os.mkfifo(file)
    assert known_fingerprint(file, "host") is None
    with pytest.raises(UsageError, match="not a regular file"):
        remember_fingerprint(file, "host", OTHER)
    assert stat.S_ISFIFO(file.stat().st_mode)


def test_a_file_that_is_too_large_stays_as_it_is(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(f"other {SHOWN_OTHER}\n")
    monkeypatch.setattr(fingerprints, "MAX_SIZE", 20)
    with pytest.raises(UsageError, match="File too large"):
        remember_fingerprint(file, "host", OTHER)
    assert file.read_text() == f"other {SHOWN_OTHER}\n"
