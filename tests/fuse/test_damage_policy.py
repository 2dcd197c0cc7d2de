"""Mounts with `--on-damage zero`: zeros for damage, told once; and what a mount's process keeps to itself."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pbsfs.fuse.mountpoint import mounted_at
from tests.support import damage, made
from tests.support.keyfiles import key_file
from tests.support.mounts import Mounted, cleaned_up, fails_with, mounted, read_at
from tests.support.needs import need, need_root
from tests.support.program import PBSFS, environment, run
from tests.support.serving import access, serving
from tests.support.stocked import CHUNK, CONFIGURATION, ENCRYPTED, IMAGE, IN_NAMESPACE, Stocked, stock
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount

ZERO = ("--on-damage", "zero")
ATTRIBUTE = "user.pbs.damaged_ranges"
BAD = range(CHUNK, 2 * CHUNK)
"""The bytes of `IMAGE`, and of `IN_NAMESPACE`, that are damaged here."""


@pytest.fixture
def stocked(tmp_path: Path) -> Stocked:
    return stock(tmp_path / "datastore")


def digest_of(stocked: Stocked) -> bytes:
    return hashlib.sha256(stocked.contents[IMAGE][BAD.start : BAD.stop]).digest()


def chunk_of(stocked: Stocked) -> Path:
    return stocked.writer.chunk_path(digest_of(stocked))


def with_zeros(stocked: Stocked) -> bytes:
    content = bytearray(stocked.contents[IMAGE])
    content[BAD.start : BAD.stop] = bytes(len(BAD))
    return bytes(content)


def ranges_of(mount: Mounted, path: str = IMAGE) -> str:
    return os.getxattr(mount / path, ATTRIBUTE).decode()


# --- zeros


@pytest.mark.parametrize("way", damage.CHUNK_DAMAGE)
def test_reads_give_zeros_just_for_what_is_damaged(stocked: Stocked, tmp_path: Path, way: str) -> None:
    damage.CHUNK_DAMAGE[way](chunk_of(stocked), b"other")
    expected = with_zeros(stocked)
    with mounted(stocked.path, tmp_path / "m", *ZERO) as mount:
        for offset in range(0, len(expected), CHUNK // 2):
            assert read_at(mount / IMAGE, offset, CHUNK // 2) == expected[offset : offset + CHUNK // 2]
        assert (mount / IMAGE).read_bytes() == expected
        (line,) = mount.log_lines()
        assert f"{IMAGE}: bytes {BAD.start} to {BAD.stop - 1}: chunk {digest_of(stocked).hex()}: " in line
        assert f"these {CHUNK} bytes are shown as zeros" in line


def test_each_range_is_logged_once_and_all_are_told_at_the_end(stocked: Stocked, tmp_path: Path) -> None:
    damage.flip_bit(chunk_of(stocked), 8 * 500)
    with mounted(stocked.path, tmp_path / "m", *ZERO) as mount:
        for _ in range(3):
            assert read_at(mount / IMAGE, BAD.start, 10) == bytes(10)
            assert (
                read_at(mount / IN_NAMESPACE, BAD.stop - 1, 2)
                == b"\0" + stocked.contents[IMAGE][BAD.stop : BAD.stop + 1]
            )
        assert len(mount.log_lines()) == 2
    *_read, summary, first, second = mount.log_lines()
    assert len(_read) == 2
    assert f"2 damaged ranges, {2 * CHUNK} bytes in all, were shown as zeros:" in summary
    assert first.endswith(f"{IMAGE}: {BAD.start}+{CHUNK}")
    assert second.endswith(f"{IN_NAMESPACE}: {BAD.start}+{CHUNK}")


def test_nothing_is_told_at_the_end_where_nothing_was_damaged(stocked: Stocked, tmp_path: Path) -> None:
    with mounted(stocked.path, tmp_path / "m", *ZERO) as mount:
        assert (mount / IMAGE).read_bytes() == stocked.contents[IMAGE]
        assert ranges_of(mount) == ""
    assert mount.log_lines() == []


def test_an_attribute_lists_what_was_shown_as_zeros_so_far(stocked: Stocked, tmp_path: Path) -> None:
    damage.flip_bit(chunk_of(stocked), 8 * 500)
    last = stocked.contents[IMAGE][7 * CHUNK : 8 * CHUNK]
    damage.truncate(stocked.writer.chunk_path(hashlib.sha256(last).digest()), 100)
    with mounted(stocked.path, tmp_path / "m", *ZERO) as mount:
        assert ranges_of(mount) == ""
        read_at(mount / IMAGE, BAD.start, 10)
        assert ranges_of(mount) == f"{BAD.start}+{CHUNK}"
        (mount / IMAGE).read_bytes()
        assert ranges_of(mount) == f"{BAD.start}+{CHUNK},{7 * CHUNK}+{CHUNK}"
        assert ranges_of(mount, IN_NAMESPACE) == ""  # where nobody has read yet
        assert ATTRIBUTE in os.listxattr(mount / IMAGE)
        assert fails_with(errno.ENODATA, lambda: ranges_of(mount, CONFIGURATION))
        assert len(mount.log_lines()) == 2


def test_a_chunk_that_was_repaired_is_seen_when_the_file_is_opened_again(
    stocked: Stocked, tmp_path: Path
) -> None:
    whole = chunk_of(stocked).read_bytes()
    damage.flip_bit(chunk_of(stocked), 8 * 500)
    with mounted(stocked.path, tmp_path / "m", *ZERO) as mount:
        with (mount / IMAGE).open("rb") as file:
            assert file.read() == with_zeros(stocked)
            damage.replace(chunk_of(stocked), whole)
            file.seek(0)
            assert file.read() == with_zeros(stocked)
        # The kernel tells of the last closing a moment after it.
        wait_until(
            lambda: (mount / IMAGE).read_bytes() == stocked.contents[IMAGE], "what was repaired is seen"
        )
        assert ranges_of(mount) == f"{BAD.start}+{CHUNK}"
        assert len(mount.log_lines()) == 1


def test_through_a_server_it_is_the_same(stocked: Stocked, tmp_path: Path) -> None:
    chunk_of(stocked).unlink()
    with serving(stocked.path) as server, mounted(access(server), tmp_path / "m", *ZERO) as mount:
        assert (mount / IMAGE).read_bytes() == with_zeros(stocked)
        assert ranges_of(mount) == f"{BAD.start}+{CHUNK}"
        (line,) = mount.log_lines()
        assert digest_of(stocked).hex() in line


def test_tools_copy_with_zeros_where_others_would_fail(stocked: Stocked, tmp_path: Path) -> None:
    damage.flip_bit(chunk_of(stocked), 8 * 500)
    for options, status in ((ZERO, 0), (("--on-damage", "fail"), 1), ((), 1)):
        with mounted(stocked.path, tmp_path / "m", *options) as mount:
            copy = tmp_path / f"copy{len(options)}"
            assert run(["cp", mount / IMAGE, copy]).returncode == status
            assert mount.log_lines()
            if status == 0:
                assert copy.read_bytes() == with_zeros(stocked)


def test_by_default_damage_is_an_error_and_there_is_no_list_of_it(stocked: Stocked, tmp_path: Path) -> None:
    damage.flip_bit(chunk_of(stocked), 8 * 500)
    with mounted(stocked.path, tmp_path / "m") as mount:
        assert fails_with(errno.EIO, lambda: read_at(mount / IMAGE, BAD.start, 10))
        assert fails_with(errno.ENODATA, lambda: ranges_of(mount))
        assert len(mount.log_lines()) == 1
    assert len(mount.log_lines()) == 1


def test_keys_signatures_and_indexes_that_fail_are_errors_and_never_zeros(
    stocked: Stocked, tmp_path: Path
) -> None:
    damage.flip_bit(stocked.path / f"{IMAGE}.fidx", 8 * 4100)
    (wrong := tmp_path / "wrong.json").write_bytes(key_file(key=made.OTHER_KEY.reveal()))
    with mounted(stocked.path, tmp_path / "m", *ZERO, "--keyfile", str(wrong)) as mount:
        assert fails_with(errno.EACCES, lambda: (mount / ENCRYPTED).open("rb"))
        assert fails_with(errno.EIO, lambda: (mount / IMAGE).open("rb"))
        assert len(mount.log_lines()) == 2


# --- what the process keeps to itself


@pytest.fixture
def key(tmp_path: Path) -> Path:
    (path := tmp_path / "key.json").write_bytes(key_file())
    return path


def test_the_process_writes_no_core_dump(stocked: Stocked, tmp_path: Path, key: Path) -> None:
    # Where the tests may not dump either, this could not fail.
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        with mounted(stocked.path, tmp_path / "m", "--keyfile", str(key)) as mount:
            lines = Path(f"/proc/{mount.pid}/limits").read_text().splitlines()
            (line,) = [line for line in lines if line.startswith("Max core file size")]
            assert line.split()[4:6] == ["0", "0"]
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


PEEK = "import sys; open(f'/proc/{sys.argv[1]}/mem', 'rb')"

NO_TRACER = ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace")
"""Makes root one who may look into processes of its own only as any user may."""


def test_no_other_process_of_its_user_can_look_into_its_memory(
    stocked: Stocked, tmp_path: Path, key: Path
) -> None:
    need_root("give up the right to look into any process")
    need("setpriv")
    (place := tmp_path / "m").mkdir()

    def peek(pid: int) -> subprocess.CompletedProcess[str]:
        return run([*NO_TRACER, sys.executable, "-c", PEEK, str(pid)])

    options = [f"--keyfile={key}", f"--datastore-dir={stocked.path}", str(place)]
    command = [*NO_TRACER, PBSFS, "mount", "--foreground", *options]
    with cleaned_up(place), subprocess.Popen(command, env=environment()) as process:
        try:
            wait_until(lambda: mounted_at(place), "it is mounted")
            assert (place / ENCRYPTED).read_bytes() == made.image(4, "r0", tail=5)
            assert "Permission denied" in peek(process.pid).stderr
            with subprocess.Popen([*NO_TRACER, "sleep", "60"]) as other:
                try:
                    wait_until(lambda: peek(other.pid).returncode == 0, "that is due to the mount alone")
                finally:
                    other.kill()
        finally:
            process.terminate()
    assert process.returncode == 0
