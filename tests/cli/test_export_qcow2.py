"""`pbsfs export --format qcow2`, by the real qemu-img and nbdkit."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support import damage
from tests.support.needs import need
from tests.support.program import PBSFS, TIMEOUT, environment, error_of, output_of, pbsfs
from tests.support.server.faults import Hold
from tests.support.serving import access, serving
from tests.support.stocked import CHUNK, CONFIGURATION, IMAGE, NEWER_IMAGE, Stocked, stock


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Stocked:
    """A datastore that no test changes."""
    need("qemu-img", "nbdkit")
    return stock(tmp_path_factory.mktemp("stocked") / "datastore")


def export(stocked: Stocked, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return pbsfs("export", "--format", "qcow2", "--datastore-dir", stocked.path, *arguments)


def content_of(qcow2: Path, raw: Path) -> bytes:
    subprocess.run(["qemu-img", "check", "-q", qcow2], check=True, timeout=TIMEOUT)
    subprocess.run(
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", qcow2, raw], check=True, timeout=TIMEOUT
    )
    return raw.read_bytes()


def test_a_qcow2_file_has_the_content_and_no_more_than_the_data(stocked: Stocked, tmp_path: Path) -> None:
    (out := tmp_path / "a: b").mkdir()
    content = stocked.contents[IMAGE]
    done = export(stocked, IMAGE, out)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in out.iterdir()] == ["drive-scsi0.qcow2"]
    qcow2 = out / "drive-scsi0.qcow2"
    assert qcow2.stat().st_mode & 0o777 == 0o600
    shown = json.loads(output_of("qemu-img", "info", "--output=json", str(qcow2)))
    assert shown["format"] == "qcow2"
    read = content_of(qcow2, tmp_path / "raw")
    assert read[: len(content)] == content
    assert not any(read[len(content) :])
    assert "exists; remove it" in error_of(export(stocked, IMAGE, qcow2), 8)
    assert export(stocked, "--force", "--progress", NEWER_IMAGE, qcow2).returncode == 0
    assert content_of(qcow2, tmp_path / "raw").startswith(stocked.contents[NEWER_IMAGE])


def test_what_is_not_one_image_and_one_file_is_refused(stocked: Stocked, tmp_path: Path) -> None:
    dest = tmp_path / "disk.qcow2"
    assert "--format qcow2 is for one image" in error_of(export(stocked, CONFIGURATION, dest), 2)
    assert "not several" in error_of(export(stocked, IMAGE, NEWER_IMAGE, dest), 2)
    assert "not --in-place" in error_of(export(stocked, "--in-place", IMAGE, dest), 2)
    assert "not --on-damage" in error_of(export(stocked, "--on-damage", "zero", IMAGE, dest), 2)
    assert "requires a file" in error_of(export(stocked, IMAGE, "-"), 2)
    assert "requires a file" in error_of(export(stocked, IMAGE, "/dev/null"), 2)
    no_tools = environment(PATH=str(tmp_path))
    command = ("export", "--format", "qcow2", "--datastore-dir", stocked.path, IMAGE, dest)
    assert "qemu-img is not installed" in error_of(pbsfs(*command, env=no_tools), 9)
    assert list(tmp_path.iterdir()) == []


def test_damage_leaves_no_file(tmp_path: Path) -> None:
    need("qemu-img", "nbdkit")
    own = stock(tmp_path / "datastore")
    digest = hashlib.sha256(own.contents[IMAGE][5 * CHUNK : 6 * CHUNK]).digest()
    damage.flip_bit(own.writer.chunk_path(digest), 8 * 500)
    (out := tmp_path / "out").mkdir()
    done = export(own, IMAGE, out)
    assert done.returncode == 9
    assert digest.hex() in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"pbsfs: cannot write {out / 'drive-scsi0.qcow2'}: ")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_leaves_no_part(
    stocked: Stocked, tmp_path: Path, number: signal.Signals
) -> None:
    held = hashlib.sha256(stocked.contents[IMAGE][5 * CHUNK : 6 * CHUNK]).hexdigest()
    with serving(stocked.path) as server:
        hold = server.faults.add(Hold(match=held, times=None))
        command = [PBSFS, "export", "--format", "qcow2", IMAGE, str(tmp_path)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=access(server)) as process:
            try:
                hold.wait()
                assert (tmp_path / "drive-scsi0.qcow2.part").exists()
                other = export(stocked, "--force", IMAGE, tmp_path)
                assert "another export is writing it" in error_of(other, 8)
                process.send_signal(number)
                _output, errors = process.communicate(timeout=TIMEOUT)
            finally:
                process.kill()
        hold.release()
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
