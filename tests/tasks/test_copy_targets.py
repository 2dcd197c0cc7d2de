"""Copies into pipes and onto block devices."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import select
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from pbsfs.base.errors import OutputError
from pbsfs.reader.buffers import Buffer
from pbsfs.tasks.image.copy import copy_image
from pbsfs.tasks.image.opening import open_target
from tests.support import made
from tests.support.needs import need_loop
from tests.support.run import run, until
from tests.support.sources import CHUNK_SIZE
from tests.tasks.copies import (
    CONTENT,
    NAME,
    an_image,
    export,
    is_clean,
    nobody_asks,
)


@contextmanager
def fifo_reader(path: Path, size: int) -> Iterator[list[bytes]]:
    """A reader in a thread of its own, which reads `size` bytes and goes away."""
    os.mkfifo(path)
    got: list[bytes] = []
    # Open before anybody writes, who would be told else that nobody reads.
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reading, True)

    def read() -> None:
        with open(reading, "rb", buffering=0) as file:
            writer = select.poll()
            writer.register(file, select.POLLIN)
            writer.poll()  # without one, reading finds the end at once
            left = size
            while left and (data := file.read(min(left, 1 << 16))):
                got.append(data)
                left -= len(data)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield got
    finally:
        thread.join()


@contextmanager
def descriptors_restored() -> Iterator[None]:
    """Closes what a stream target leaves open for a write that may still be stuck."""
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    yield
    for path in list(Path("/proc/self/fd").iterdir()):
        if path.name not in before and path.exists():
            os.close(int(path.name))


def test_a_pipe_gets_every_byte_in_order_holes_as_zeros(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    with descriptors_restored(), fifo_reader(pipe, len(CONTENT)) as got:
        run(lambda: export(CONTENT, pipe))
    assert b"".join(got) == CONTENT
    assert is_clean(tmp_path, "pipe")


@pytest.mark.parametrize("kinds", ["r" * 12, "0" * 12])
def test_a_pipe_whose_reader_goes_away_ends_the_copy(tmp_path: Path, kinds: str) -> None:
    pipe = tmp_path / "pipe"
    with descriptors_restored(), fifo_reader(pipe, 1000) as got, pytest.raises(BrokenPipeError):
        run(lambda: export(made.image(1, kinds), pipe))
    assert len(b"".join(got)) == 1000


def test_a_copy_into_a_pipe_that_nobody_reads_can_be_cancelled(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    started, ended = threading.Event(), threading.Event()
    chunk_size = 1 << 20  # more than the pipe takes

    async def main() -> None:
        content = made.image(1, "rr", chunk_size=chunk_size)
        async with an_image(content, chunk_size=chunk_size) as image, trio.open_nursery() as nursery:
            with open_target(pipe, NAME, image.size, force=False) as target:
                real = target.write

                def write(offset: int, data: Buffer) -> None:
                    started.set()
                    try:
                        real(offset, data)
                    finally:
                        ended.set()

                monkey.setattr(target, "write", write)
                nursery.start_soon(copy_image, image, target, nobody_asks)
                await until(started.is_set)
                nursery.cancel_scope.cancel()

    with descriptors_restored(), pytest.MonkeyPatch.context() as monkey:
        run(main)
        assert not ended.is_set()  # the write is still stuck, and nobody waited for it
        os.close(reader)
        assert ended.wait(30)


def test_standard_output_may_be_the_target(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    run(lambda: export(CONTENT, Path("-")))
    assert capfdbinary.readouterr().out == CONTENT
    os.fstat(1)  # and stays open


def test_a_terminal_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "isatty", lambda _fd: True)
    with pytest.raises(OutputError, match="standard output is a terminal"):
        run(lambda: export(CONTENT, Path("-")))


# --- block devices


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 16 chunks that holds other data already."""
    need_loop()
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xa5" * (16 * CHUNK_SIZE))
    found = subprocess.run(
        ["losetup", "--find", "--show", backing], check=True, capture_output=True, text=True
    )
    path = Path(found.stdout.strip())
    yield path
    subprocess.run(["losetup", "--detach", path], check=True)


@pytest.mark.root
@pytest.mark.parametrize("by_ioctl", [True, False])
@pytest.mark.parametrize("tail", [0, 512, 700])
def test_a_device_reads_as_the_image_stale_data_in_holes_is_gone(
    device: Path, monkeypatch: pytest.MonkeyPatch, by_ioctl: bool, tail: int
) -> None:
    if not by_ioctl:

        def ioctl(*_arguments: object) -> int:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(fcntl, "ioctl", ioctl)
    content = made.image(1, "0r00rt0") + bytes(tail)
    run(lambda: export(content, device, force=True))
    after = device.read_bytes()
    assert after[: len(content)] == content
    assert after[len(content) :] == b"\xa5" * (16 * CHUNK_SIZE - len(content))


@pytest.mark.root
def test_a_device_is_not_touched_without_force(device: Path) -> None:
    before = hashlib.sha256(device.read_bytes()).digest()
    with pytest.raises(OutputError, match="is a block device; use --force to overwrite"):
        run(lambda: export(CONTENT, device))
    assert hashlib.sha256(device.read_bytes()).digest() == before


@pytest.mark.root
def test_a_device_that_is_too_small_is_not_touched(device: Path) -> None:
    before = hashlib.sha256(device.read_bytes()).digest()
    content = made.image(1, "r" * 16, tail=1)
    with pytest.raises(OutputError, match=f"has {16 * CHUNK_SIZE} bytes, the image needs {len(content)}"):
        run(lambda: export(content, device, force=True))
    assert hashlib.sha256(device.read_bytes()).digest() == before


@pytest.mark.root
def test_a_device_in_use_is_refused(device: Path) -> None:
    holder = os.open(device, os.O_RDONLY | os.O_EXCL)  # as a mount or a volume group holds it
    try:
        with pytest.raises(OutputError, match="Device or resource busy"):
            run(lambda: export(CONTENT, device, force=True))
    finally:
        os.close(holder)


def test_force_writes_to_the_device_that_a_link_points_to(device: Path, tmp_path: Path) -> None:
    (link := tmp_path / "link").symlink_to(device)
    run(lambda: export(CONTENT, link, force=True))
    assert link.is_symlink()
    with device.open("rb") as file:
        assert file.read(len(CONTENT)) == CONTENT
