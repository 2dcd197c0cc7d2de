"""`pbsfs export`: an image is copied whole, or not at all."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from pbsfs.testing.writer import DatastoreWriter
from tests.support import damage, made
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs
from tests.support.stocked import (
    ARCHIVE,
    CHUNK,
    CONFIGURATION,
    ENCRYPTED,
    FIRST,
    IMAGE,
    NEWER_IMAGE,
    Stocked,
    stock,
)
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore with an image that takes long enough to be interrupted: 400 MiB."""
    base = tmp_path_factory.mktemp("large")
    image = base / "image"
    with image.open("wb") as file:
        for number in range(100):
            file.write(b"%064d" % number * (1 << 16))
    DatastoreWriter(base / "datastore").add_snapshot(made.snapshot(), {"drive-scsi0.img.fidx": image})
    image.unlink()
    return base / "datastore"


def export(stocked: Stocked, *arguments: str | Path) -> None:
    assert output_of(PBSFS, "export", "--datastore-dir", stocked.path, *arguments) == ""


def refused(stocked: Stocked, status: int, *arguments: str | Path) -> str:
    return error_of(pbsfs("export", "--datastore-dir", stocked.path, *arguments), status)


def test_a_file_gets_the_content_and_keeps_its_holes(stocked: Stocked, tmp_path: Path) -> None:
    for path in (IMAGE, ARCHIVE, CONFIGURATION):
        copy = tmp_path / "copy"
        export(stocked, path, copy)
        assert copy.read_bytes() == stocked.contents[path]
        if path == IMAGE:
            assert copy.stat().st_blocks * 512 < len(stocked.contents[path]) - 2 * CHUNK
        copy.unlink()
    assert not list(tmp_path.iterdir())


def test_a_directory_gets_the_file_under_its_name(stocked: Stocked, tmp_path: Path) -> None:
    export(stocked, IMAGE, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["drive-scsi0.img"]
    assert (tmp_path / "drive-scsi0.img").read_bytes() == stocked.contents[IMAGE]


def test_standard_output_gets_every_byte(stocked: Stocked) -> None:
    for path in (IMAGE, CONFIGURATION):
        command = [PBSFS, "export", "--datastore-dir", str(stocked.path), path, "-"]
        done = subprocess.run(command, capture_output=True, timeout=60, check=True, env=environment())
        assert done.stdout == stocked.contents[path]
        assert done.stderr == b""


def test_a_reader_that_closes_early_is_no_error(large: Path) -> None:
    path = "vm/100/latest/drive-scsi0.img"
    command = f"'{PBSFS}' export --datastore-dir '{large}' {path} - | head -c 5; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True, env=environment()
    )
    assert (done.stdout, done.stderr) == ("00000141\n", "")


def test_nothing_is_overwritten_unless_told(stocked: Stocked, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(b"precious")
    assert "--force" in refused(stocked, 8, IMAGE, copy)
    assert copy.read_bytes() == b"precious"
    export(stocked, "--force", IMAGE, copy)
    assert copy.read_bytes() == stocked.contents[IMAGE]


def test_what_a_killed_export_left_is_not_continued(stocked: Stocked, tmp_path: Path) -> None:
    copy, part = tmp_path / "copy", tmp_path / "copy.part"
    part.write_bytes(b"left" * 500_000)
    assert f"{part} is left from an earlier export" in refused(stocked, 8, IMAGE, copy)
    assert not copy.exists()
    export(stocked, "--force", IMAGE, copy)
    assert copy.read_bytes() == stocked.contents[IMAGE]
    assert not part.exists()


def test_damage_is_status_6_and_leaves_no_file(tmp_path: Path) -> None:
    own = stock(tmp_path / "datastore")
    digest = hashlib.sha256(own.contents[IMAGE][5 * CHUNK : 6 * CHUNK]).digest()
    damage.flip_bit(own.writer.chunk_path(digest), 8 * 500)
    (out := tmp_path / "out").mkdir()
    text = refused(own, 6, IMAGE, out)
    assert digest.hex() in text
    assert IMAGE in text
    assert not list(out.iterdir())


def test_an_encrypted_file_without_its_key_is_status_5(stocked: Stocked, tmp_path: Path) -> None:
    assert made.KEY.fingerprint in refused(stocked, 5, ENCRYPTED, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_status_8(stocked: Stocked, tmp_path: Path) -> None:
    assert "No such file or directory" in refused(stocked, 8, IMAGE, tmp_path / "none" / "copy")
    assert "No space left" in refused(stocked, 8, IMAGE, "/dev/full")


@pytest.mark.parametrize("options", [["--format", "tar"], ["--exclude", "x"], ["--overwrite"]], ids=" ".join)
def test_options_for_files_in_archives_are_refused_for_images(
    options: list[str], stocked: Stocked, tmp_path: Path
) -> None:
    for path in (IMAGE, CONFIGURATION):
        error = refused(stocked, 2, *options, path, tmp_path / "copy")
        assert f"{options[0]} is for files in archives" in error
    assert not list(tmp_path.iterdir())


def test_a_group_is_not_exported(stocked: Stocked, tmp_path: Path) -> None:
    text = refused(stocked, 2, "vm/100", tmp_path)
    assert FIRST.rpartition("/")[2] in text
    assert "each has to be a snapshot or a file of one" in refused(stocked, 2, IMAGE, "vm/100", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_snapshot_is_exported_with_all_its_files(stocked: Stocked, tmp_path: Path) -> None:
    dest = tmp_path / "new"
    export(stocked, FIRST, dest)
    found = {path.name: path.read_bytes() for path in dest.iterdir()}
    assert found["drive-scsi0.img"] == stocked.contents[IMAGE]
    assert found["qemu-server.conf"] == stocked.contents[CONFIGURATION]
    assert sorted(found) == ["client.log", "drive-scsi0.img", "index.json", "qemu-server.conf"]
    assert "exists; remove it, or overwrite it with --force" in refused(stocked, 8, FIRST, dest)
    assert {path.name: path.read_bytes() for path in dest.iterdir()} == found
    export(stocked, "--force", FIRST, dest)
    assert {path.name: path.read_bytes() for path in dest.iterdir()} == found


def test_several_files_are_exported_into_a_directory(stocked: Stocked, tmp_path: Path) -> None:
    export(stocked, IMAGE, CONFIGURATION, ARCHIVE, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.rpartition("/")[2]: stocked.contents[path] for path in (IMAGE, CONFIGURATION, ARCHIVE)
    }


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_several_files_are_not_exported_over_one_another(
    stocked: Stocked, tmp_path: Path, options: tuple[str, ...]
) -> None:
    dest = tmp_path / "one"
    dest.write_bytes(b"mine")
    said = refused(stocked, 8, *options, IMAGE, CONFIGURATION, dest)
    assert said == f"cannot write {dest}: Not a directory; name a place in a directory"
    assert dest.read_bytes() == b"mine"


def test_of_several_files_none_is_copied_where_one_exists(stocked: Stocked, tmp_path: Path) -> None:
    (dest := tmp_path / "dest").mkdir()
    (dest / "qemu-server.conf").write_bytes(b"precious")
    assert "qemu-server.conf exists" in refused(stocked, 8, IMAGE, CONFIGURATION, dest)
    assert "several files have the name drive-scsi0.img" in refused(stocked, 2, IMAGE, NEWER_IMAGE, dest)
    assert "- is for one PATH" in refused(stocked, 2, FIRST, "-")
    assert "--format is for files in archives" in refused(stocked, 2, "--format", "tar", FIRST, dest)
    assert "there is no directory" in refused(stocked, 8, FIRST, tmp_path / "none" / "below")
    assert [path.name for path in dest.iterdir()] == ["qemu-server.conf"]


def test_a_snapshot_is_resumed_and_complete_files_are_left_alone(stocked: Stocked, tmp_path: Path) -> None:
    content = stocked.contents[IMAGE]
    (tmp_path / "drive-scsi0.img.part").write_bytes(content[: 3 * CHUNK])
    (conf := tmp_path / "qemu-server.conf").write_bytes(stocked.contents[CONFIGURATION])
    inode = conf.stat().st_ino
    export(stocked, "--resume", FIRST, tmp_path)
    image = tmp_path / "drive-scsi0.img"
    assert image.read_bytes() == content
    assert conf.stat().st_ino == inode
    inode = image.stat().st_ino
    export(stocked, "--resume", FIRST, tmp_path)
    assert image.stat().st_ino == inode
    image.write_bytes(content[:-1] + b"?")
    assert "drive-scsi0.img exists" in refused(stocked, 8, "--resume", FIRST, tmp_path)
    assert image.read_bytes() == content[:-1] + b"?"


def test_where_the_first_file_fails_no_directory_stays(stocked: Stocked, tmp_path: Path) -> None:
    (own := tmp_path / "own").mkdir()
    refused(stocked, 5, ENCRYPTED, CONFIGURATION, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    refused(stocked, 5, ENCRYPTED, CONFIGURATION, own)
    assert list(own.iterdir()) == []


def test_damage_in_one_of_several_files_leaves_the_others(tmp_path: Path) -> None:
    own = stock(tmp_path / "datastore")
    digest = hashlib.sha256(own.contents[IMAGE][5 * CHUNK : 6 * CHUNK]).digest()
    damage.flip_bit(own.writer.chunk_path(digest), 8 * 500)
    out = tmp_path / "out"
    done = pbsfs("export", "--datastore-dir", own.path, "--on-damage", "zero", FIRST, out)
    assert done.returncode == 6
    assert f"{out / 'drive-scsi0.img.map'} lists them" in done.stderr
    assert (out / "qemu-server.conf").read_bytes() == own.contents[CONFIGURATION]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_and_leaves_no_part(large: Path, tmp_path: Path, number: signal.Signals) -> None:
    part = tmp_path / "copy.part"
    command = [PBSFS, "export", "--datastore-dir", str(large), "vm/100/latest/drive-scsi0.img"]
    with subprocess.Popen(
        [*command, str(tmp_path / "copy")], stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        wait_until(part.exists, "it writes")
        process.send_signal(number)
        _nothing, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (128 + number, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [[], ["--resume"], ["--in-place"], ["--format", "qcow2"], ["--on-damage", "zero", "--map-file"]],
)
def test_a_name_that_the_system_refuses_is_named(
    stocked: Stocked, tmp_path: Path, options: list[str]
) -> None:
    name = tmp_path / ("x" * 300)
    dest: list[str | Path] = [name, IMAGE, tmp_path / "copy"] if "--map-file" in options else [IMAGE, name]
    text = refused(stocked, 8, *options, *dest)
    assert text == f"cannot write {name}: File name too long; give it a shorter name"
    assert list(tmp_path.iterdir()) == []


def test_nohup_lets_it_go_on_when_the_terminal_is_closed(large: Path, tmp_path: Path) -> None:
    part = tmp_path / "copy.part"
    command = ["nohup", PBSFS, "export", "--datastore-dir", str(large), "vm/100/latest/drive-scsi0.img"]
    with subprocess.Popen(
        [*command, str(tmp_path / "copy")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        wait_until(part.exists, "it writes")
        status = Path(f"/proc/{process.pid}/status").read_text()
        ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
        assert ignored & 1 << signal.SIGHUP - 1
        process.send_signal(signal.SIGTERM)
        _output, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (128 + signal.SIGTERM, b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_while_nobody_reads_its_pipe(large: Path, number: signal.Signals) -> None:
    command = [PBSFS, "export", "--datastore-dir", str(large), "vm/100/latest/drive-scsi0.img", "-"]
    reading, writing = os.pipe()
    with (
        open(reading, "rb") as pipe,
        subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, env=environment()) as process,
    ):
        os.close(writing)
        pipe.read(1)
        process.send_signal(number)
        _nothing, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (128 + number, b"")


def test_progress_is_shown_on_a_terminal_or_when_asked(stocked: Stocked, tmp_path: Path) -> None:
    done = pbsfs("export", "--progress", "--datastore-dir", stocked.path, IMAGE, tmp_path / "copy")
    assert done.returncode == 0
    assert "drive-scsi0.img" in done.stderr
    assert "513.5/513.5 KiB" in done.stderr
    terminal, other_end = os.openpty()
    command = [PBSFS, "export", "--datastore-dir", str(stocked.path), IMAGE, str(tmp_path / "copy2")]
    with open(terminal, "rb", buffering=0) as shown:
        try:
            subprocess.run(command, stderr=other_end, timeout=60, check=True, env=environment(TERM="xterm"))
        finally:
            os.set_blocking(terminal, False)
            text = shown.read(1 << 16)
            os.close(other_end)
    assert text is not None
    assert b"drive-scsi0.img" in text


@pytest.mark.root
def test_a_block_device_is_overwritten_holes_and_all_when_told(stocked: Stocked, device: Path) -> None:
    content = stocked.contents[IMAGE]
    assert "use --force to overwrite" in refused(stocked, 8, IMAGE, device)
    assert device.read_bytes() == b"\xff" * (2 << 20)
    export(stocked, "--force", IMAGE, device)
    with device.open("rb") as file:
        assert file.read(len(content)) == content
        assert file.read() == b"\xff" * ((2 << 20) - len(content))


@pytest.mark.root
def test_a_block_device_that_is_too_small_is_refused(large: Path, device: Path) -> None:
    command = ("export", "--force", "--datastore-dir", large, "vm/100/latest/drive-scsi0.img", device)
    assert f"has {2 << 20} bytes, the image needs {100 << 22}" in error_of(pbsfs(*command), 8)
    assert device.read_bytes() == b"\xff" * (2 << 20)


def test_a_rate_is_not_zero(stocked: Stocked, tmp_path: Path) -> None:
    export(stocked, "--limit-rate", "100M", IMAGE, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == stocked.contents[IMAGE]
    assert "a rate of 0 is too small: reading would never end" in refused(
        stocked, 2, "--limit-rate", "0", IMAGE, tmp_path / "other"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
