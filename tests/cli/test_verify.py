"""`pbsfs verify`: the report as text and as JSON, the statuses, the progress, and how it is stopped."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pbsfs.base.names import MANIFEST
from pbsfs.formats.manifest import CryptMode
from pbsfs.testing.writer import DatastoreWriter
from tests.support import damage, golden, made
from tests.support.keyfiles import key_file
from tests.support.program import PBSFS, environment, error_of, pbsfs
from tests.support.serving import access, serving
from tests.support.stocked import (
    ARCHIVE,
    CHUNK,
    CONFIGURATION,
    ENCRYPTED,
    FIRST,
    IMAGE,
    IN_NAMESPACE,
    NEWER_IMAGE,
    SECOND,
    Stocked,
    stock,
)

WHOLE = "0 damaged, 0 not checked"


@pytest.fixture
def spoiled(tmp_path: Path) -> Stocked:
    """A datastore with a damaged chunk, which two images share, a damaged file and a damaged index."""
    own = stock(tmp_path / "datastore")
    damage.flip_bit(chunk_of(own), 8 * 500)
    damage.flip_bit(own.path / f"{CONFIGURATION}.blob", 8 * 14)
    damage.flip_bit(own.path / f"{ARCHIVE}.didx", 8 * 4100)
    return own


def digest_of(stocked: Stocked) -> str:
    return hashlib.sha256(stocked.contents[IMAGE][CHUNK : 2 * CHUNK]).hexdigest()


def chunk_of(stocked: Stocked) -> Path:
    """The file of the second chunk of `IMAGE` and `IN_NAMESPACE`."""
    return stocked.writer.chunk_path(bytes.fromhex(digest_of(stocked)))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A file of the key of what is encrypted in a stocked datastore."""
    (path := tmp_path / "key.json").write_bytes(key_file())
    return path


def verify(stocked: Stocked, status: int, *arguments: str | Path) -> list[str]:
    """The lines that it prints; it has to end with `status`, and to say nothing on standard error."""
    done = pbsfs("verify", "--datastore-dir", stocked.path, *arguments)
    assert (done.returncode, done.stderr) == (status, "")
    return done.stdout.splitlines()


def report_of(stocked: Stocked, status: int, *arguments: str | Path) -> dict[str, Any]:
    found = json.loads("\n".join(verify(stocked, status, "--json", *arguments)))
    assert isinstance(found, dict)
    return found


# --- what is printed, and the status


def test_what_is_whole_is_one_line_and_status_0(stocked: Stocked, key: Path) -> None:
    (line,) = verify(stocked, 0, "vm/100")
    chunks = "rrtrrr"  # of the image, the tail, and of the newer image
    assert line.startswith(f"6 files, {len(chunks) + 2} chunks, ")
    assert line.endswith(WHOLE)
    (line,) = verify(stocked, 0, "--keyfile", key)
    assert line.endswith(WHOLE)


def test_the_json_has_the_same(stocked: Stocked) -> None:
    assert report_of(stocked, 0, f"{SECOND}/drive-scsi0.img") == {
        "files": 1,
        "chunks": 2,
        "bytes": CHUNK + 1,
        "damaged": [],
        "unverified": [],
    }


def test_what_can_not_be_checked_without_its_key_is_status_5(stocked: Stocked) -> None:
    *lines, summary = verify(stocked, 5)
    assert len(lines) == 1
    needed = f"not checked: the key {made.KEY.fingerprint} was not given (--keyfile): "
    assert lines == [needed + ENCRYPTED]
    assert summary.endswith("0 damaged, 1 not checked")
    (entry,) = report_of(stocked, 5)["unverified"]
    assert entry["path"] == ENCRYPTED
    assert made.KEY.fingerprint in entry["reason"]


def test_files_that_need_one_key_are_one_line(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "datastore")
    snapshots = [made.snapshot(str(number)) for number in range(105, 99, -1)]
    for snapshot in snapshots:
        key = made.OTHER_KEY if snapshot.group.id == "103" else made.KEY
        content = {"a.img.fidx": b"a" * 4096}
        writer.add_snapshot(snapshot, content, chunk_size=4096, crypt_mode=CryptMode.ENCRYPT, key=key)
    done = pbsfs("verify", "--datastore-dir", tmp_path / "datastore")
    assert (done.returncode, done.stderr) == (5, "")
    paths = [f"vm/{number}/{snapshots[0].time_text}/a.img" for number in (100, 101, 102, 103)]
    some = f"{', '.join(paths[:3])}, … (5 in all)"
    assert done.stdout.splitlines()[:-1] == [
        f"not checked: the key {made.KEY.fingerprint} was not given (--keyfile): {some}",
        f"not checked: the key {made.OTHER_KEY.fingerprint} was not given (--keyfile): {paths[3]}",
    ]
    listed = pbsfs("verify", "--json", "--datastore-dir", tmp_path / "datastore")
    assert len(json.loads(listed.stdout)["unverified"]) == 6


def test_nothing_at_all_is_not_success(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "datastore")
    done = pbsfs("verify", "--datastore-dir", writer.path)
    assert f"datastore directory {writer.path}: it holds no backups, so nothing was checked" in error_of(
        done, 3
    )
    assert done.stdout == ""
    for path in ("/", "vm/100"):
        assert error_of(pbsfs("verify", "--datastore-dir", writer.path, path), 3)
    writer.group_path(
        made.snapshot().group
    ).mkdir()  # whoever asks for a group by name knows that it is right
    assert error_of(pbsfs("verify", "--datastore-dir", writer.path), 3)
    done = pbsfs("verify", "--datastore-dir", writer.path, "vm/100")
    assert (done.returncode, done.stdout) == (0, f"0 files, 0 bytes read; {WHOLE}\n")


def test_what_is_not_here_ends_it_with_status_4(tmp_path: Path) -> None:
    own = stock(tmp_path / "datastore")
    for path in own.path.glob(".chunks/*/*"):
        os.truncate(path, 0)
    done = pbsfs("verify", "--datastore-dir", own.path, "vm/100", "--log-level", "error")
    assert "are in an object store; read it through the server" in error_of(done, 4)
    assert done.stdout == ""


@pytest.mark.golden
def test_the_golden_bucket_is_whole_with_its_key() -> None:
    key = golden.ROOT / "keys" / "plain.json"
    bucket = golden.ROOT / "bucket" / "gbucket"
    done = pbsfs("verify", "--datastore-dir", bucket, "--keyfile", key)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"{WHOLE}\n")
    assert not done.stdout.startswith("0 files")


def test_damage_is_listed_by_file_and_range_and_is_status_6(spoiled: Stocked) -> None:
    lines = verify(spoiled, 6, "vm/100", "ct", "ns")
    damaged = [line for line in lines if line.startswith("damaged: ")]
    assert [line.split(": ")[1] for line in damaged] == sorted([ARCHIVE, IMAGE, CONFIGURATION, IN_NAMESPACE])
    place = f"bytes {CHUNK} to {2 * CHUNK - 1}: chunk {digest_of(spoiled)}: "
    assert all((place in line) == (IMAGE in line) for line in damaged)
    assert lines[-1].endswith("4 damaged, 0 not checked")
    rest = [line for line in lines[:-1] if line not in damaged]
    assert len(rest) == 2  # of the two images: the damage may hide volumes
    assert all(line.startswith("  files/") and "can't be read completely" in line for line in rest)


def test_damage_outweighs_what_can_not_be_checked(spoiled: Stocked) -> None:
    found = report_of(spoiled, 6)
    entries = {entry["path"]: entry["ranges"] for entry in found["damaged"]}
    part = [{"offset": CHUNK, "length": CHUNK}]
    assert entries == {ARCHIVE: [], CONFIGURATION: [], IMAGE: part, IN_NAMESPACE: part}
    assert [entry["path"] for entry in found["damaged"]] == sorted(entries)
    assert [entry["path"] for entry in found["unverified"]] == [ENCRYPTED]
    assert all(entry["reason"] for entry in (*found["damaged"], *found["unverified"]))


def test_a_snapshot_that_can_not_be_listed_is_damaged(tmp_path: Path) -> None:
    own = stock(tmp_path / "datastore")
    damage.truncate(own.path / SECOND / MANIFEST.filename, 30)
    done = pbsfs("verify", "--json", "--datastore-dir", own.path, "vm/100", "--log-level", "error")
    assert (done.returncode, done.stderr) == (6, "")
    (entry,) = json.loads(done.stdout)["damaged"]
    assert (entry["path"], entry["ranges"]) == (SECOND, [])
    assert entry["reason"].startswith("unreadable manifest")


def test_paths_that_overlap_are_read_once(stocked: Stocked) -> None:
    alone = report_of(stocked, 0, "vm/100")
    assert report_of(stocked, 0, FIRST, "vm/100/latest", IMAGE, "vm/100", IMAGE) == alone
    two = report_of(stocked, 0, IMAGE, NEWER_IMAGE)
    assert (two["files"], two["chunks"]) == (2, 8)


@pytest.mark.parametrize(
    ("status", "arguments", "words"),
    [
        (2, ("--limit-rate", "0"), "a rate of 0 is too small: reading would never end"),
        (2, ("--limit-rate", "much"), "'much' is not a size"),
        (2, ("vm/..",), "'..' has no meaning here"),
        (3, ("vm/100", "vm/999"), "there is no '999'"),
        (3, ("--ns", "none"), "none"),
    ],
)
def test_what_makes_no_sense_or_is_not_there_is_refused(
    stocked: Stocked, status: int, arguments: tuple[str, ...], words: str
) -> None:
    done = pbsfs("verify", "--datastore-dir", stocked.path, *arguments)
    assert words in error_of(done, status)
    assert done.stdout == ""


def test_a_source_that_can_not_be_read_is_status_4_and_no_report(tmp_path: Path) -> None:
    done = pbsfs("verify", "--datastore-dir", tmp_path / "none")
    assert "No such file or directory" in error_of(done, 4)
    assert done.stdout == ""


def test_through_a_server_the_report_is_the_same(spoiled: Stocked) -> None:
    local = report_of(spoiled, 6)
    with serving(spoiled.path) as server:
        done = pbsfs("verify", "--json", env=access(server))
    assert (done.returncode, done.stderr) == (6, "")
    remote = json.loads(done.stdout)

    def places(report: dict[str, Any]) -> list[tuple[str, list[dict[str, int]]]]:
        return [(entry["path"], entry["ranges"]) for entry in report["damaged"]]

    assert places(remote) == places(local)
    assert remote["unverified"] == local["unverified"]
    assert [remote[name] for name in ("files", "chunks", "bytes")] == [
        local[name] for name in ("files", "chunks", "bytes")
    ]


@pytest.mark.golden
def test_golden_data_is_whole_with_its_keys() -> None:
    told = environment(PBS_ENCRYPTION_PASSWORD="correct-horse")
    keys = [f"--keyfile={golden.ROOT / 'keys' / name}.json" for name in ("plain", "scrypt", "pbkdf2")]
    done = pbsfs("verify", "--datastore-dir", golden.DATASTORE, *keys, env=told)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"{WHOLE}\n")


# --- progress, and being stopped


class Watched:
    """The program with a terminal as its standard error, and what that shows."""

    def __init__(self, *arguments: str | Path) -> None:
        self._ours, theirs = os.openpty()
        self.process = subprocess.Popen(
            [PBSFS, "verify", *arguments],
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
            env=environment(TERM="xterm"),
        )
        os.close(theirs)
        self.shown = ""

    def read(self) -> bool:
        """Takes what is shown next; False at the end."""
        try:
            data = os.read(self._ours, 1 << 16)
        except OSError:  # the last who had it open has closed it
            data = b""
        self.shown += data.decode()
        return bool(data)

    def close(self) -> None:
        os.close(self._ours)
        self.process.kill()
        self.process.communicate(timeout=30)


@pytest.fixture
def watched(stocked: Stocked, request: pytest.FixtureRequest) -> Iterator[Watched]:
    """Its options are the test's parameter."""
    found = Watched("--datastore-dir", stocked.path, *getattr(request, "param", ()))
    try:
        yield found
    finally:
        found.close()


@pytest.mark.parametrize("watched", [("vm/100", "ns")], indirect=True)
def test_a_terminal_shows_the_progress_to_its_end(watched: Watched) -> None:
    while watched.read():
        pass
    assert watched.process.wait(timeout=30) == 0
    assert "verify" in watched.shown
    done, total = re.findall(r"([\d.]+)/([\d.]+) KiB", watched.shown)[-1]
    assert done == total != "0"


@pytest.mark.parametrize("watched", [("vm/100", "--no-progress")], indirect=True)
def test_a_terminal_shows_nothing_where_none_is_wanted(watched: Watched) -> None:
    while watched.read():
        pass
    assert (watched.process.wait(timeout=30), watched.shown) == (0, "")


@pytest.mark.parametrize("watched", [("vm/100", "--limit-rate", "8K")], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once_without_a_report(watched: Watched, number: signal.Signals) -> None:
    while "verify" not in watched.shown:
        assert watched.read(), watched.shown
    watched.process.send_signal(number)  # at a chunk in 8 seconds it has a minute to go
    while watched.read():
        pass
    output, _nothing = watched.process.communicate(timeout=30)
    assert (watched.process.returncode, output) == (128 + number, "")
    assert "Traceback" not in watched.shown
