"""`pbsfs export --in-place`: what exists becomes the backup, by the real program."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pbsfs.testing.writer import DatastoreWriter
from tests.support import damage, made
from tests.support.in_place import VERIFIED, a_device, changed, in_place
from tests.support.keyfiles import document
from tests.support.program import PBSFS, TIMEOUT, environment, error_of, pbsfs
from tests.support.server import ReferenceServer
from tests.support.server.faults import Hold
from tests.support.serving import access, serving
from tests.support.stocked import CHUNK, CONFIGURATION, ENCRYPTED, IMAGE, Stocked, stock
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def server(stocked: Stocked) -> Iterator[ReferenceServer]:
    with serving(stocked.path) as running:
        yield running


@pytest.fixture
def content(stocked: Stocked) -> bytes:
    return stocked.contents[IMAGE]


@pytest.mark.parametrize("extra", [b"", b"more" * 4000], ids=["shorter", "longer"])
def test_a_file_gets_the_size_of_the_image(
    stocked: Stocked, content: bytes, tmp_path: Path, extra: bytes
) -> None:
    dest = tmp_path / "disk"
    dest.write_bytes(content + extra if extra else content[:1000])
    size = dest.stat().st_size
    assert (
        f"would get {len(content)} bytes instead of {size}"
        in in_place(stocked, "--dry-run", IMAGE, dest).stdout
    )
    assert f"got {len(content)} bytes instead of {size}" in in_place(stocked, IMAGE, dest).stdout
    assert dest.read_bytes() == content


def test_an_encrypted_backup_is_compared_by_its_keyed_digests(stocked: Stocked, tmp_path: Path) -> None:
    (keyfile := tmp_path / "key.json").write_text(json.dumps(document()))
    keyfile.chmod(0o600)
    keys = ("--keyfile", keyfile, ENCRYPTED)
    dest = tmp_path / "disk"
    assert pbsfs("export", "--datastore-dir", stocked.path, *keys, dest).returncode == 0
    wanted = dest.read_bytes()
    assert "would fetch 0 bytes" in in_place(stocked, "--dry-run", *keys, dest).stdout
    dest.write_bytes(changed(wanted, 0))
    assert f"fetched {CHUNK} bytes in 1 chunk that differs, " in in_place(stocked, *keys, dest).stdout
    assert dest.read_bytes() == wanted
    assert "was not given" in error_of(in_place(stocked, ENCRYPTED, dest), 5)


def test_a_server_is_asked_only_for_the_chunks_that_differ(
    stocked: Stocked, server: ReferenceServer, content: bytes, tmp_path: Path
) -> None:
    (dest := tmp_path / "disk").write_bytes(changed(content, 1, 5))
    count = server.faults.add(Hold(match="/chunk", times=None))
    count.release()
    done = pbsfs("export", "--in-place", IMAGE, dest, env=access(server))
    assert (done.returncode, done.stderr) == (0, "")
    assert count.hits == 2
    assert dest.read_bytes() == content


def test_a_restore_that_is_interrupted_before_it_writes_says_that_nothing_changed(
    stocked: Stocked, content: bytes, tmp_path: Path
) -> None:
    (dest := tmp_path / "disk").write_bytes(before := changed(content, 5))
    with serving(stocked.path) as own:
        hold = own.faults.add(Hold(match=hashlib.sha256(content[5 * CHUNK : 6 * CHUNK]).hexdigest()))
        command = [PBSFS, "export", "--in-place", IMAGE, str(dest)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=access(own)) as process:
            hold.wait()
            process.send_signal(signal.SIGINT)
            _output, errors = process.communicate(timeout=TIMEOUT)
        hold.release()
    assert (process.returncode, errors) == (130, f"pbsfs: interrupted: {dest} is unchanged\n")
    assert dest.read_bytes() == before


def test_damage_of_a_needed_chunk_is_status_6_and_says_what_the_file_is_now(
    content: bytes, tmp_path: Path
) -> None:
    own = stock(tmp_path / "datastore")
    digest = hashlib.sha256(content[5 * CHUNK : 6 * CHUNK]).digest()
    damage.flip_bit(own.writer.chunk_path(digest), 8 * 500)
    (dest := tmp_path / "disk").write_bytes(changed(content, 3, 5))
    with serving(own.path) as server:
        hold = server.faults.add(Hold(match=digest.hex()))
        command = [PBSFS, "export", "--in-place", IMAGE, str(dest)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=access(server)) as process:
            try:
                hold.wait()
                wait_until(lambda: not any(dest.read_bytes()[3 * CHUNK : 4 * CHUNK]), "a hole is made")
                hold.release()
                _output, errors = process.communicate(timeout=TIMEOUT)
            finally:
                process.kill()
    text = error_of(subprocess.CompletedProcess(command, process.returncode, "", errors), 6)
    assert digest.hex() in text
    assert text.endswith(
        f"; {dest} is now partly the backup and partly what it was before: run the same command again to "
        "finish it, with --on-damage zero if the damage stays"
    )
    dest.write_bytes(changed(content, 1))  # what is damaged is in the file already
    assert in_place(own, IMAGE, dest).returncode == 0
    assert dest.read_bytes() == content
    dest.write_bytes(changed(content, 5))
    done = in_place(own, "--on-damage", "zero", IMAGE, dest)
    assert done.returncode == 6
    assert f"{dest}.map lists them" in done.stderr
    assert dest.read_bytes() == content[: 5 * CHUNK] + bytes(CHUNK) + content[6 * CHUNK :]


def interrupted(
    command: list[str], hold: Hold, part: Path, env: dict[str, str], number: signal.Signals
) -> str:
    """Sends a signal to a command once it has written the first chunk of the image, and `hold` struck."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            hold.wait()
            wait_until(lambda: part.exists() and any(part.read_bytes()[:CHUNK]), "the first chunk is written")
            process.send_signal(number)
            _output, errors = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    hold.release()
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    return errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("options", [["--resume"], []], ids=["resume", "first"])
def test_what_an_interrupted_export_left_is_resumed(
    stocked: Stocked, content: bytes, tmp_path: Path, number: signal.Signals, options: list[str]
) -> None:
    dest, part = tmp_path / "disk", tmp_path / "disk.part"
    held = hashlib.sha256(content[5 * CHUNK : 6 * CHUNK]).hexdigest()
    with serving(stocked.path) as own:
        hold = own.faults.add(Hold(match=held))
        command = [PBSFS, "export", *options, IMAGE, str(dest)]
        errors = interrupted(command, hold, part, access(own), number)
        if number == signal.SIGKILL:
            assert errors == ""
        elif options:
            assert errors == f"pbsfs: interrupted: {part} is kept; run the same command again to finish it\n"
        else:
            assert errors == ""
            assert list(tmp_path.iterdir()) == []
            return
        assert not dest.exists()
        assert part.stat().st_mode & 0o777 == 0o600
        missing = [
            number
            for number in (0, 1, 4, 5, 7, 8)
            if part.read_bytes()[number * CHUNK :][:CHUNK] != content[number * CHUNK :][:CHUNK]
        ]
        assert 0 not in missing
        count = own.faults.add(Hold(match="/chunk", times=None))
        count.release()
        done = pbsfs("export", "--resume", IMAGE, dest, env=access(own))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert count.hits == len(missing)
    assert dest.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_a_part_of_another_image_becomes_this_one(stocked: Stocked, content: bytes, tmp_path: Path) -> None:
    (part := tmp_path / "disk.part").write_bytes(b"\xee" * (2 * len(content)))
    done = pbsfs("export", "--resume", "--datastore-dir", stocked.path, IMAGE, tmp_path / "disk")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "disk").read_bytes() == content
    assert not part.exists()


def test_a_resumed_export_is_refused_where_the_part_is_not_its_own(stocked: Stocked, tmp_path: Path) -> None:
    dest, part = tmp_path / "disk", tmp_path / "disk.part"
    command = ("export", "--resume", "--datastore-dir", stocked.path, IMAGE)
    (other := tmp_path / "other").write_bytes(b"precious")
    makers: list[Callable[[], None]] = [
        lambda: part.symlink_to(other),
        lambda: part.hardlink_to(other),
        lambda: os.mkfifo(part),
    ]
    for make in makers:
        make()
        assert f"{part}: not a file that an export of this user left" in error_of(pbsfs(*command, dest), 8)
        part.unlink()
    assert other.read_bytes() == b"precious"
    assert not dest.exists()
    dest.write_bytes(b"precious")
    assert "exists; remove it" in error_of(pbsfs(*command, dest), 8)
    assert "--resume requires a file" in error_of(pbsfs(*command, "-"), 2)
    assert "--resume requires a file" in error_of(pbsfs(*command, "/dev/null"), 2)
    assert "--resume is for images" in error_of(pbsfs(*command[:-1], CONFIGURATION, tmp_path / "c"), 2)
    assert "leave out --resume" in error_of(pbsfs(*command[:-1], "--in-place", IMAGE, dest), 2)
    assert dest.read_bytes() == b"precious"


def test_damage_leaves_what_can_be_resumed(content: bytes, tmp_path: Path) -> None:
    own = stock(tmp_path / "datastore")
    path = own.writer.chunk_path(hashlib.sha256(content[5 * CHUNK : 6 * CHUNK]).digest())
    stored = path.read_bytes()
    damage.flip_bit(path, 8 * 500)
    dest = tmp_path / "disk"
    command = ("export", "--resume", "--datastore-dir", own.path, IMAGE, dest)
    for _again in range(2):
        assert f"; {dest}.part is kept: run the same command again" in error_of(pbsfs(*command), 6)
    damage.replace(path, stored)
    assert pbsfs(*command).returncode == 0
    assert dest.read_bytes() == content


def test_options_that_do_not_go_together_are_refused(stocked: Stocked, tmp_path: Path) -> None:
    (dest := tmp_path / "disk").write_bytes(b"precious")
    error = error_of(pbsfs("export", "--dry-run", "--datastore-dir", stocked.path, IMAGE, dest), 2)
    assert error.startswith("--dry-run requires --in-place")
    assert "--in-place keeps the mode" in error_of(in_place(stocked, "--mode", "600", IMAGE, dest), 2)
    assert "--in-place is for images" in error_of(in_place(stocked, CONFIGURATION, dest), 2)
    assert "does not exist, and --in-place" in error_of(in_place(stocked, IMAGE, tmp_path / "none"), 8)
    assert dest.read_bytes() == b"precious"


@pytest.mark.root
def test_a_device_that_is_too_small_is_refused(stocked: Stocked, content: bytes, tmp_path: Path) -> None:
    small = b"\xff" * (4 * CHUNK)
    with a_device(tmp_path / "backing", small) as device:
        for options in ((), ("--dry-run",)):
            error = error_of(in_place(stocked, *options, IMAGE, device), 8)
            assert f"{device} has {4 * CHUNK} bytes, the image needs {len(content)}" in error
        assert device.read_bytes() == small


def test_progress_counts_all_of_the_image(tmp_path: Path) -> None:
    content = made.image(7, "rr0r", chunk_size=1 << 20)
    writer = DatastoreWriter(tmp_path / "datastore")
    (image := tmp_path / "image").write_bytes(content)
    writer.add_snapshot(made.snapshot(), {"drive-scsi0.img.fidx": image}, chunk_size=1 << 20)
    dest = tmp_path / "disk"
    for options, bar in [
        (("--in-place",), "1 MiB fetched, 2 reused, 1 holes"),
        (("--in-place", "--dry-run"), "0 MiB fetched, 3 reused, 1 holes"),
    ]:
        if options == ("--in-place",):
            dest.write_bytes(content[: 2 << 20])
        source = ("--datastore-dir", tmp_path / "datastore")
        terminal = environment(COLUMNS="80")
        done = pbsfs("export", *options, "--progress", *source, IMAGE, dest, env=terminal)
        assert done.returncode == 0
        assert "4.0/4.0 MiB" in done.stderr
        assert bar in done.stderr


def test_several_images_are_checked_before_the_first_is_written(content: bytes, tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "datastore")
    other = made.image(8, "r0r")
    images = {"drive-scsi0.img.fidx": content, "drive-scsi1.img.fidx": other}
    writer.add_snapshot(made.snapshot(), images, chunk_size=CHUNK)
    stocked = Stocked(writer.path, writer)
    names = [IMAGE, IMAGE.replace("scsi0", "scsi1")]
    (disks := tmp_path / "disks").mkdir()
    first, second = disks / "drive-scsi0.img", disks / "drive-scsi1.img"
    first.write_bytes(before := b"as it was")

    assert "several images require a directory" in error_of(in_place(stocked, *names, first), 2)
    assert f"{second} does not exist" in error_of(in_place(stocked, *names, disks), 8)
    second.symlink_to(first)
    assert f"{second} is the same file or device as {first}" in error_of(in_place(stocked, *names, disks), 8)
    second.unlink()
    second.write_bytes(before)
    assert "name the images of the snapshot" in error_of(in_place(stocked, str(Path(IMAGE).parent), disks), 2)
    assert first.read_bytes() == second.read_bytes() == before

    done = in_place(stocked, *names, disks)
    assert (done.returncode, done.stdout.count(VERIFIED)) == (0, 2), done.stderr
    assert (first.read_bytes(), second.read_bytes()) == (content, other)


def test_several_images_do_not_overwrite_one_file_by_its_links(content: bytes, tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "datastore")
    images = {"drive-scsi0.img.fidx": content, "drive-scsi1.img.fidx": made.image(8, "r0r")}
    writer.add_snapshot(made.snapshot(), images, chunk_size=CHUNK)
    names = [IMAGE, IMAGE.replace("scsi0", "scsi1")]
    (disks := tmp_path / "disks").mkdir()
    (one := tmp_path / "one").write_bytes(b"as it was")
    first, second = disks / "drive-scsi0.img", disks / "drive-scsi1.img"
    for link in (first, second):
        link.symlink_to(one)
    command: list[str | Path] = ["export", "--force", "--datastore-dir", writer.path, *names, disks]
    assert f"{second} is the same file or device as {first}" in error_of(pbsfs(*command), 8)
    assert one.read_bytes() == b"as it was"
    for link in (first, second):
        link.unlink()
        os.link(one, link)  # a name of its own is replaced
    assert pbsfs(*command).returncode == 0
    assert (first.read_bytes(), one.read_bytes()) == (content, b"as it was")


def test_a_complete_file_is_left_also_if_its_content_is_a_qcow2_file(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "datastore")
    writer.add_snapshot(made.snapshot(), {"drive-scsi0.img.fidx": b"QFI\xfb" + bytes(5000)}, chunk_size=CHUNK)
    command = ("export", "--resume", "--datastore-dir", writer.path, IMAGE, tmp_path / "disk")
    for _again in range(2):
        assert (done := pbsfs(*command)).returncode == 0, done.stderr
