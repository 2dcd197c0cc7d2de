"""What docs/semantics.md promises of restores in place: a test for each promise, by its name."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.in_place import VERIFIED, a_device, changed, in_place
from tests.support.program import PBSFS, TIMEOUT, error_of, pbsfs
from tests.support.server.faults import Hold
from tests.support.serving import access, serving
from tests.support.stocked import CHUNK, IMAGE, Stocked
from tests.support.waiting import wait_until


@pytest.fixture
def content(stocked: Stocked) -> bytes:
    return stocked.contents[IMAGE]


@pytest.mark.parametrize("numbers", [(), (4,), (0, 2, 7, 8), tuple(range(8))], ids=str)
def test_only_what_differs_is_fetched_and_written(
    stocked: Stocked, content: bytes, tmp_path: Path, numbers: tuple[int, ...]
) -> None:
    dest = tmp_path / "disk"
    dest.write_bytes(changed(content, *numbers))
    dest.chmod(0o640)
    holes = {2, 3, 6} & set(numbers)
    counts = (
        f"{sum(min(CHUNK, len(content) - n * CHUNK) for n in numbers if n not in holes)} bytes in "
        f"{len(numbers) - len(holes)} {'chunk that differs' if len(numbers) == 1 else 'chunks that differ'}"
    )
    plan = in_place(stocked, "--dry-run", IMAGE, dest)
    assert (plan.returncode, plan.stderr) == (0, "")
    assert f"{dest}: would fetch {counts}, reuse " in plan.stdout
    assert f"discard {len(holes) * CHUNK} bytes" in plan.stdout
    assert plan.stdout.endswith("nothing was written\n")
    assert dest.read_bytes() == changed(content, *numbers)
    done = in_place(stocked, IMAGE, dest)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{dest}: fetched {counts}, reused " in done.stdout
    assert done.stdout.endswith(VERIFIED + "\n")
    assert dest.read_bytes() == content
    assert dest.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


@pytest.mark.root
def test_a_device_keeps_what_is_behind_the_image(stocked: Stocked, content: bytes, tmp_path: Path) -> None:
    rest = random.Random(9).randbytes((1 << 20) - len(content))
    with a_device(tmp_path / "backing", changed(content, 0, 2, 4, 6) + rest) as device:
        plan = in_place(stocked, "--dry-run", IMAGE, device).stdout
        assert f"would fetch {2 * CHUNK} bytes in 2 chunks" in plan
        assert device.read_bytes() == changed(content, 0, 2, 4, 6) + rest
        done = in_place(stocked, IMAGE, device)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"fetched {2 * CHUNK} bytes in 2 chunks" in done.stdout
        assert f"discarded {2 * CHUNK} bytes" in done.stdout
        assert f"the last {len(rest)} bytes, after the image, stay" in done.stdout
        assert device.read_bytes() == content + rest
        assert "fetched 0 bytes in 0 chunks" in in_place(stocked, IMAGE, device).stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_restore_in_place_can_be_interrupted_and_repeated(
    stocked: Stocked, content: bytes, tmp_path: Path, number: signal.Signals
) -> None:
    (dest := tmp_path / "disk").write_bytes(before := changed(content, 0, 1, 4, 5, 7))
    held = hashlib.sha256(content[5 * CHUNK : 6 * CHUNK]).hexdigest()
    first = content[:CHUNK]
    with serving(stocked.path) as own:
        hold = own.faults.add(Hold(match=held, times=None))
        command = [PBSFS, "export", "--in-place", IMAGE, str(dest)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=access(own)
        ) as process:
            hold.wait()
            wait_until(lambda: dest.read_bytes()[:CHUNK] == first, "the first chunk is written")
            process.send_signal(number)
            output, errors = process.communicate(timeout=TIMEOUT)
        hold.release()
        assert process.returncode == 128 + number
        assert output == ""
        assert errors == (
            f"pbsfs: interrupted: {dest} is now partly the backup and partly what it was before; "
            "run the same command again to finish it\n"
        )
        assert dest.read_bytes() not in (before, content)
        done = pbsfs(*command[1:], env=access(own))
    assert done.returncode == 0
    assert dest.read_bytes() == content


@pytest.mark.root
def test_what_is_in_use_is_not_restored_in_place(stocked: Stocked, tmp_path: Path) -> None:
    (backing := tmp_path / "backing").write_bytes(b"")
    subprocess.run(["truncate", "--size", "8M", backing], check=True)
    subprocess.run(["mkfs.ext4", "-q", backing], check=True, timeout=60)
    before = backing.read_bytes()
    (mountpoint := tmp_path / "mnt").mkdir()
    with a_device(backing, before) as device:
        assert f"the loop device {device} uses it" in error_of(in_place(stocked, IMAGE, backing), 8)
        subprocess.run(["mount", device, mountpoint], check=True, timeout=30)
        try:
            for options in ((), ("--dry-run",)):
                error = error_of(in_place(stocked, *options, IMAGE, device), 8)
                assert f"cannot write {device}: Device or resource busy; unmount it first" in error
        finally:
            subprocess.run(["umount", mountpoint], check=True, timeout=30)
        assert in_place(stocked, IMAGE, device).returncode == 0
