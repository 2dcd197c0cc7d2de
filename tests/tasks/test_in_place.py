"""Restoring in place: only what differs is fetched and written, and what was written is checked."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.base.errors import DamageError, OutputError, SourceError, UsageError
from pbsfs.chunks.store import Chunk
from pbsfs.formats.blob import chunk_digest
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode
from pbsfs.reader.buffers import Buffer, is_zero
from pbsfs.reader.damage import ZeroedRanges
from pbsfs.reader.image import Image
from pbsfs.reader.reader import open_reader
from pbsfs.sources.rate import Rate
from pbsfs.tasks.image.compared import ComparedTarget, ExistingFile
from pbsfs.tasks.image.copy import Pieces, copy_image
from pbsfs.tasks.image.in_place import Amounts, Restore, Step, steps_of
from pbsfs.tasks.image.opening import open_existing, open_resumed, open_target
from tests.support import made
from tests.support.run import in_trio, run, until
from tests.support.sources import CHUNK_SIZE, MemorySource, TimedSource, file_of

NAME = "disk.img"
SNAPSHOT = made.snapshot()
CONTENT = made.image(1, "0rr00t0r", tail=512)


def chunks_of(content: bytes) -> list[bytes]:
    return [content[at : at + CHUNK_SIZE] for at in range(0, len(content), CHUNK_SIZE)]


def padded(data: bytes, length: int) -> bytes:
    """What a file with `data` reads as, in the first `length` bytes: zeros behind its end."""
    return data[:length].ljust(length, b"\0")


@asynccontextmanager
async def an_image(
    content: bytes,
    source: MemorySource,
    *,
    filename: str = f"{NAME}.fidx",
    key: Key | None = None,
    zeroed: ZeroedRanges | None = None,
) -> AsyncIterator[Image]:
    mode = CryptMode.NONE if key is None else CryptMode.ENCRYPT
    info = source.add(SNAPSHOT, {filename: content}, crypt_mode=mode, key=key)
    keys = {} if key is None else {key.fingerprint: key}
    async with open_reader(source, keys=keys, zeroed=zeroed) as reader:
        yield await reader.open_image(info, file_of(info, filename))


async def restore(image: Image, dest: Path, *, dry_run: bool = False) -> Amounts:
    """Turns `dest` into `image`; checks that the progress gets every byte once."""
    done: list[int] = []
    with open_existing(dest, NAME, image.size) as target:
        run = Restore(image, target, done.append, dry_run=dry_run)
        await run.run()
    assert sum(done) == image.size
    return run.amounts


# --- what differs


@in_trio
async def test_an_image_is_cut_into_chunks_and_parts_of_holes() -> None:
    async with an_image(CONTENT, MemorySource()) as image:
        size = CHUNK_SIZE
        assert list(steps_of(image, hole_step=size)) == [
            Step(0, size, None),
            Step(size, size, 1),
            Step(2 * size, size, 2),
            Step(3 * size, size, None),
            Step(4 * size, size, None),
            Step(5 * size, size, 5),
            Step(6 * size, size, None),
            Step(7 * size, size, 7),
            Step(8 * size, 512, 8),
        ]
        assert [step.length for step in steps_of(image) if step.chunk is None] == [size, 2 * size, size]


@pytest.mark.parametrize("key", [None, made.KEY], ids=["plain", "encrypted"])
def test_a_chunk_is_known_by_its_digest_and_length(key: Key | None) -> None:
    data = made.image(5, "r")
    image = made.snapshot(), file_of(MemorySource().add(SNAPSHOT, {"x.img.fidx": data}), "x.img.fidx").archive
    chunk = Chunk(*image, chunk_digest(data, key), len(data), key is not None, key)
    assert chunk.matches(data)
    assert chunk.matches(memoryview(bytearray(data)))
    assert not chunk.matches(data[:-1])
    assert not chunk.matches(data[:-1] + bytes([data[-1] ^ 1]))
    other = Chunk(*image, chunk_digest(data, made.OTHER_KEY), len(data), key is not None, key)
    assert not other.matches(data)


@given(length=st.integers(0, 70), at=st.integers(0, 69))
def test_zeros_are_told_from_data(length: int, at: int) -> None:
    data = bytearray(length)
    assert is_zero(memoryview(data))
    if at < length:
        data[at] = 1
        assert not is_zero(memoryview(data))


@given(
    old=st.text("rt0x", max_size=8),
    new=st.text("rt0", min_size=1, max_size=8),
    tails=st.tuples(st.sampled_from([0, 1, 512, 4096]), st.sampled_from([0, 1, 512, 4096])),
    key=st.sampled_from([None, made.KEY]),
)
def test_only_chunks_that_differ_are_fetched_and_the_file_becomes_the_image(
    tmp_path_factory: pytest.TempPathFactory, old: str, new: str, tails: tuple[int, int], key: Key | None
) -> None:
    source = MemorySource()
    content = made.image(1, new, tail=tails[0])
    dest = tmp_path_factory.mktemp("in_place") / "disk"
    # The same seed: as long as the letters are the same, so are the chunks; `x` is what none has.
    before = made.image(1, old.replace("x", "r"), tail=tails[1])
    for number, kind in enumerate(old):
        if kind == "x":
            before = before[: number * CHUNK_SIZE] + b"\xaa" + before[number * CHUNK_SIZE + 1 :]
    dest.write_bytes(before)
    theirs, ours = chunks_of(content), chunks_of(before)
    differ = [
        number
        for number, chunk in enumerate(theirs)
        if any(chunk) and (number >= len(ours) or padded(ours[number], len(chunk)) != chunk)
    ]

    async def work() -> None:
        async with an_image(content, source, key=key) as image:
            plan = await restore(image, dest, dry_run=True)
            assert source.fetched == []
            assert dest.read_bytes() == before
            assert plan.chunks == len(differ)
            assert plan.differing == sum(len(theirs[number]) for number in differ)
            assert plan.reused + plan.differing + plan.empty + plan.discarded == len(content)
            amounts = await restore(image, dest)
            assert dest.read_bytes() == content
            assert set(source.fetched) == {chunk_digest(theirs[number], key) for number in differ}
            assert amounts.chunks == len(differ)
            assert amounts.written == amounts.differing == plan.differing
            assert (amounts.reused, amounts.discarded) == (plan.reused, plan.discarded)
            fetched = len(source.fetched)
            again = await restore(image, dest)
            assert (again.differing, again.discarded, len(source.fetched)) == (0, 0, fetched)

    run(work)


@in_trio
async def test_where_the_backup_has_holes_the_file_gets_holes(tmp_path: Path) -> None:
    (dest := tmp_path / "disk").write_bytes(b"\xff" * len(CONTENT))
    async with an_image(CONTENT, MemorySource()) as image:
        amounts = await restore(image, dest)
    assert dest.read_bytes() == CONTENT
    assert amounts.discarded == 4 * CHUNK_SIZE
    assert dest.stat().st_blocks * 512 <= 5 * CHUNK_SIZE


@in_trio
async def test_zeros_of_the_file_in_holes_of_the_backup_stay_allocated(tmp_path: Path) -> None:
    (dest := tmp_path / "disk").write_bytes(CONTENT)
    before = dest.stat().st_blocks
    async with an_image(CONTENT, MemorySource()) as image:
        amounts = await restore(image, dest)
    assert (amounts.discarded, amounts.empty) == (0, 4 * CHUNK_SIZE)
    assert dest.stat().st_blocks == before


@in_trio
async def test_a_stream_with_chunks_of_zeros_is_restored_into_an_empty_file(tmp_path: Path) -> None:
    content = made.image(3, "r00t", tail=9)
    (dest := tmp_path / "disk").write_bytes(b"")
    async with an_image(content, MemorySource(), filename="root.pxar.didx") as image:
        await restore(image, dest)
        assert dest.read_bytes() == content
        assert (await restore(image, dest)).differing == 0


# --- what goes wrong


@in_trio
async def test_damage_that_the_file_does_not_need_is_never_met(tmp_path: Path) -> None:
    source = MemorySource()
    (dest := tmp_path / "disk").write_bytes(CONTENT[: 3 * CHUNK_SIZE])
    async with an_image(CONTENT, source) as image:
        source.damage(hashlib.sha256(chunks_of(CONTENT)[1]).digest(), 500)
        await restore(image, dest)
    assert dest.read_bytes() == CONTENT


@in_trio
async def test_damage_ends_it_and_leaves_the_old_bytes_there(tmp_path: Path) -> None:
    source = MemorySource()
    (dest := tmp_path / "disk").write_bytes(b"\xff" * len(CONTENT))
    async with an_image(CONTENT, source) as image:
        source.damage(hashlib.sha256(chunks_of(CONTENT)[7]).digest(), 500)
        with pytest.raises(DamageError, match=rf"bytes {7 * CHUNK_SIZE} to {8 * CHUNK_SIZE - 1}"):
            await restore(image, dest)
    assert dest.read_bytes()[7 * CHUNK_SIZE : 8 * CHUNK_SIZE] == b"\xff" * CHUNK_SIZE


@in_trio
async def test_damage_becomes_zeros_where_asked_and_is_checked_as_such(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, zeroed = MemorySource(), ZeroedRanges()
    (dest := tmp_path / "disk").write_bytes(b"\xff" * len(CONTENT))
    async with an_image(CONTENT, source, zeroed=zeroed) as image:
        source.damage(hashlib.sha256(chunks_of(CONTENT)[7]).digest(), 500)
        with open_existing(dest, NAME, image.size) as target:
            await Restore(image, target, lambda _count: None).run()
        ranges = zeroed.of(str(image))
    assert [(found.offset, found.length) for found in ranges] == [(7 * CHUNK_SIZE, CHUNK_SIZE)]
    wanted = bytearray(CONTENT)
    wanted[7 * CHUNK_SIZE : 8 * CHUNK_SIZE] = bytes(CHUNK_SIZE)
    assert dest.read_bytes() == wanted
    caplog.clear()


@in_trio
async def test_a_source_that_fails_ends_it(tmp_path: Path) -> None:
    source = MemorySource()
    (dest := tmp_path / "disk").write_bytes(b"")
    async with an_image(CONTENT, source) as image:
        source.fail("fetch_chunk", SourceError("away"))
        with pytest.raises(SourceError, match="away"):
            await restore(image, dest)


class _Forgetful(ExistingFile):
    """A file on a disk that says it wrote, and lost a sector."""

    def settle(self) -> None:
        super().settle()
        os.pwrite(self._fd, b"\x55" * 512, 5 * CHUNK_SIZE + 1024)


class _Undiscarding(ExistingFile):
    """A file on a disk that takes a discard and does nothing."""

    def hole(self, offset: int, length: int) -> None:
        pass


@pytest.mark.parametrize(("disk", "at"), [(_Forgetful, 5), (_Undiscarding, 6)])
@in_trio
async def test_what_does_not_read_as_it_was_written_is_an_error(
    tmp_path: Path, disk: type[ExistingFile], at: int
) -> None:
    (dest := tmp_path / "disk").write_bytes(CONTENT[: 5 * CHUNK_SIZE] + b"\xff" * (2 * CHUNK_SIZE))
    async with an_image(CONTENT, MemorySource()) as image:
        target = disk(dest, image.size)
        try:
            where = (
                rf"bytes {at * CHUNK_SIZE} to {(at + 1) * CHUNK_SIZE - 1} do not read as they were written"
            )
            with pytest.raises(OutputError, match=where):
                await Restore(image, target, lambda _count: None).run()
        finally:
            target.close()


class _Spying(ExistingFile):
    """Counts what is written."""

    written = 0

    def write(self, offset: int, data: Buffer) -> None:
        self.written += len(data)
        super().write(offset, data)


@in_trio
async def test_it_is_interrupted_and_repeated_without_writing_anything_twice(tmp_path: Path) -> None:
    source = MemorySource()
    (dest := tmp_path / "disk").write_bytes(b"\xff" * len(CONTENT))
    theirs = chunks_of(CONTENT)
    async with an_image(CONTENT, source) as image:
        source.hold(hashlib.sha256(theirs[5]).digest())
        target = _Spying(dest, image.size)
        first = Restore(image, target, lambda _count: None)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first.run)
                await until(lambda: first.amounts.written == 3 * CHUNK_SIZE + 512)
                scope.cancel()
        target.close()
        assert first.began
    assert target.written == 3 * CHUNK_SIZE + 512
    mixed = dest.read_bytes()
    assert mixed[5 * CHUNK_SIZE : 6 * CHUNK_SIZE] == b"\xff" * CHUNK_SIZE
    assert mixed[CHUNK_SIZE : 3 * CHUNK_SIZE] == CONTENT[CHUNK_SIZE : 3 * CHUNK_SIZE]
    async with an_image(CONTENT, MemorySource()) as image:
        target = _Spying(dest, image.size)
        await Restore(image, target, lambda _count: None).run()
        target.close()
    assert target.written == CHUNK_SIZE
    assert dest.read_bytes() == CONTENT


# --- what is refused


@in_trio
async def test_what_is_missing_or_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "qcow2").write_bytes(b"QFI\xfb" + bytes(600))
    for dest, error, text in [
        (tmp_path / "none", OutputError, "none does not exist, and --in-place changes what exists"),
        (tmp_path, OutputError, f"{NAME} does not exist"),
        (tmp_path / "qcow2", OutputError, "qcow2: it is a qcow2 image, and would become a raw one"),
        (tmp_path / "pipe", OutputError, "pipe: --in-place requires a file or block device"),
        (Path("/dev/null"), OutputError, "/dev/null: --in-place requires a file or block device"),
        (Path("-"), UsageError, "standard output: --in-place requires a file or block device"),
    ]:
        with pytest.raises(error, match=text), open_existing(dest, NAME, 1):
            pytest.fail("it was opened")


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"QFI\xfb", "qcow2"),
        (b"KDMV", "VMDK"),
        (b"COWD", "VMDK"),
        (b"# Disk DescriptorFile\n", "VMDK"),
        (b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe", "VDI"),
        (b"vhdxfile", "VHDX"),
        (b"conectix", "VHD"),
        (b"QED\0", "QED"),
        (b"LUKS\xba\xbe\0\2", "LUKS"),
    ],
)
def test_an_image_of_another_form_becomes_a_raw_one_only_by_force(
    tmp_path: Path, head: bytes, name: str
) -> None:
    (dest := tmp_path / "disk").write_bytes(head + bytes(600))
    with pytest.raises(OutputError, match=f"it is a {name} image, and would"), open_existing(dest, NAME, 1):
        pytest.fail("it was opened")
    for options in ({"force": True}, {"only_compared": True}):
        with open_existing(dest, NAME, 1, **options):
            pass


def test_a_raw_image_is_not_taken_for_another_form(tmp_path: Path) -> None:
    for content in (b"", b"Q", b"\0" + b"QFI\xfb" * 200, bytes(63) + b"\x7f\x10\xda\xbe"):
        (dest := tmp_path / "disk").write_bytes(content)
        with open_existing(dest, NAME, 1):
            pass


def test_a_part_that_another_export_writes_is_refused(tmp_path: Path) -> None:
    with (
        open_resumed(tmp_path / "disk", NAME, 1, force=False) as target,
        pytest.raises(OutputError, match=r"disk\.part: another program has locked it"),
        open_existing(target.part, NAME, 1),
    ):
        pytest.fail("it was opened")


def test_an_export_does_not_continue_a_part_that_is_changed_in_place(tmp_path: Path) -> None:
    (part := tmp_path / "disk.part").write_bytes(b"x")
    with (
        open_existing(part, NAME, 1),
        pytest.raises(OutputError, match=r"disk\.part: another export is writing it"),
        open_resumed(tmp_path / "disk", NAME, 1, force=False),
    ):
        pytest.fail("it was opened")


def test_a_file_that_is_only_compared_need_not_be_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dest := tmp_path / "disk").write_bytes(b"x")
    modes: list[int] = []
    real = os.open

    def noting(path: Path, flags: int, *more: int) -> int:
        modes.append(flags & os.O_ACCMODE)
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", noting)
    with open_existing(dest, NAME, 1, only_compared=True):
        pass
    assert modes == [os.O_RDONLY]


def test_a_file_that_another_program_has_locked_is_refused(tmp_path: Path) -> None:
    (dest := tmp_path / "disk").write_bytes(b"precious")
    code = "import fcntl,sys; f=open(sys.argv[1]); fcntl.lockf(f, fcntl.LOCK_SH); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, dest], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with (
            pytest.raises(OutputError, match="another program has locked it"),
            open_existing(dest, NAME, 1),
        ):
            pytest.fail("it was opened")
        other.communicate(b"\n")
    with open_existing(dest, NAME, 8) as target:
        assert isinstance(target, ComparedTarget)


# --- the rate


@pytest.mark.parametrize("resumed", [False, True], ids=["copied", "compared"])
@in_trio
async def test_no_more_is_fetched_in_a_second_than_the_rate_allows(tmp_path: Path, resumed: bool) -> None:
    source, content = TimedSource(), made.image(1, "rr0rrrr0rrr")
    source.rate = Rate(4 * CHUNK_SIZE)
    (dest := tmp_path / "disk").write_bytes(b"")
    async with an_image(content, source) as image:
        before = trio.current_time()
        if resumed:
            with open_existing(dest, NAME, image.size) as target:
                await Restore(image, target, lambda _count: None).run()
        else:
            with open_target(dest, NAME, image.size, force=True) as copy:
                await copy_image(image, copy, lambda _count: None, Pieces(size=CHUNK_SIZE))
    assert dest.read_bytes() == content
    expected = [0, 0, 0, 0, 0, 1 / 4, 2 / 4, 3 / 4, 4 / 4]  # at first, what comes in a second
    assert [at - before for at in source.asked] == pytest.approx(expected, abs=0.1)
