"""What this machine can do at most, measured in the same run as what is held against it.

All of it in this process, on data that is in the page cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import zstandard

from bench.bare import firehose
from bench.data import CHUNK, KEY, PLAIN, Data
from bench.measures import BenchError, Sample, command
from bench.serving import Access
from pbsfs.base.names import Snapshot
from pbsfs.chunks.decoder import Decoding, decode_pair
from pbsfs.formats import blob
from pbsfs.formats.blob import BlobKind
from pbsfs.formats.keys import Key

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def cores() -> int:
    return len(os.sched_getaffinity(0))


def timed(work: Callable[[], object], *, size: int = 0, operations: int = 0) -> Sample:
    """`work` in this process."""
    cpu = time.process_time()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return Sample(seconds, size, operations, cpu=time.process_time() - cpu)


def key_of(snapshot: Snapshot) -> Key | None:
    return None if snapshot.group.id == PLAIN.group.id else KEY


def decode(data: Data, snapshot: Snapshot, threads: int) -> Sample:
    """Every chunk of data: read from the page cache, CRC, decryption, zstd, length and digest."""
    index = data.index(snapshot)
    digests = [index.digest(number) for number in data.data_chunks]
    chunks = [(data.chunk_path(digest), digest, CHUNK) for digest in digests]
    return decode_stored(chunks, threads, key_of(snapshot))


def decode_stored(chunks: Sequence[tuple[Path, bytes, int]], threads: int, key: Key | None = None) -> Sample:
    """Every one of these chunks (its file, digest and length) decoded and dropped, in the fastest known way:
    by the extension, two at once, into memory that was used before. `key`: where they are encrypted."""
    reuse_memory()
    pairs = [chunks[at : at + 2] for at in range(0, len(chunks), 2)]

    def decoding(path: Path, digest: bytes, length: int) -> Decoding:
        return Decoding(path.read_bytes(), digest, length, key is not None, key)

    def one(pair: Sequence[tuple[Path, bytes, int]]) -> None:
        works = [decoding(*chunk) for chunk in pair]
        contents = decode_pair(*works) if len(works) == 2 else (None,)
        for work, content in zip(works, contents, strict=True):
            if content is None:
                work()

    def all_of_them() -> None:
        with ThreadPoolExecutor(threads) as pool:
            for _done in pool.map(one, pairs):
                pass

    return timed(all_of_them, size=sum(length for _path, _digest, length in chunks))


def reuse_memory() -> None:
    """Makes this process keep what it frees, so that the next chunk needs no page faults."""
    libc = ctypes.CDLL(None)
    for option, size in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 512 << 20)):
        if libc.mallopt(option, size) != 1:
            raise BenchError("the C library cannot be made to keep memory")


def receive(access: Access, data: Data, *, connections: int = 1) -> Sample:
    """As many bytes as the chunks take as they are stored, over TLS, dropped."""
    share = data.stored // connections
    with ThreadPoolExecutor(connections) as pool:
        return timed(
            lambda: list(pool.map(lambda _: firehose(access, share), range(connections))), size=data.stored
        )


def read_stored(data: Data) -> Sample:
    """The stored chunks read one after the other, and dropped."""
    buffer = bytearray(CHUNK + 4096)
    index = data.index()
    paths = [data.chunk_path(index.digest(number)) for number in data.data_chunks]

    def work() -> None:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                file.readinto(buffer)

    return timed(work, size=data.stored)


def parts(data: Data) -> dict[str, Callable[[], Sample]]:
    """What decoding is made of, each by itself on one core, and a copy of the result."""
    index = data.index()

    def stored() -> Iterable[bytes]:
        for number in data.data_chunks:
            yield data.chunk_path(index.digest(number)).read_bytes()

    def over(items: Iterable[bytes], work: Callable[[bytes], object], size: int) -> Sample:
        """Only `work` is timed."""
        seconds = cpu = 0.0
        for item in items:
            before, started = time.process_time(), time.perf_counter()
            work(item)
            seconds += time.perf_counter() - started
            cpu += time.process_time() - before
        return Sample(seconds, size, cpu=cpu)

    unpack = zstandard.ZstdDecompressor()
    target = bytearray(CHUNK)

    def zstd(raw: bytes) -> None:
        kind = blob.kind_of(raw)
        if kind is BlobKind.COMPRESSED:
            unpack.decompress(memoryview(raw)[kind.header_size :], max_output_size=CHUNK)

    def decoded() -> Iterable[bytes]:
        with data.raw.open("rb") as file:
            for number in data.data_chunks:
                file.seek(number * CHUNK)
                yield file.read(CHUNK)

    def copy(content: bytes) -> None:
        target[:] = content

    return {
        "CRC": lambda: over(stored(), zlib.crc32, data.stored),
        "zstd": lambda: over(stored(), zstd, data.data_bytes),
        "SHA-256": lambda: over(decoded(), lambda content: hashlib.sha256(content).digest(), data.data_bytes),
        "copy": lambda: over(decoded(), copy, data.data_bytes),
    }


def copy_once(data: Data) -> Sample:
    """As many bytes as the image has, copied 1 MiB at a time: the least that a program's reads cost besides
    decoding. Data comes from more memory than the processor's cache has, zeros of holes from little."""
    step = 1 << 20
    decoded = memoryview(bytearray(os.urandom(step) * 64))
    zeros = memoryview(bytearray(step))
    target = memoryview(bytearray(step))
    holds_data = set(data.data_chunks)

    def work() -> None:
        place = 0
        for number in range(data.image_bytes // CHUNK):
            for _ in range(CHUNK // step):
                if number in holds_data:
                    target[:] = decoded[place : place + step]
                    place = (place + step) % len(decoded)
                else:
                    target[:] = zeros

    return timed(work, size=data.data_bytes)


def fresh_memory(size: int) -> Sample:
    """So many bytes of memory that this process did not have before, touched page by page."""

    def work() -> None:
        with mmap.mmap(-1, size) as memory:
            for page in range(0, size, mmap.PAGESIZE):
                memory[page] = 1

    return timed(work, size=size)


def fill_page_cache(data: Data) -> Sample:
    """dd of a file as large as the image that is one hole, and that the kernel has nothing of: what a read
    through its page cache costs, whoever answers it."""
    path = data.directory / "hole.img"
    path.unlink(missing_ok=True)
    try:
        with path.open("wb") as file:
            file.truncate(data.image_bytes)
        return command(["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none"], size=data.data_bytes)
    finally:
        path.unlink(missing_ok=True)


def drop_page_cache(data: Data) -> str:
    """Drops what the kernel has of the stored chunks; says how."""
    os.sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("1")
        return "dropped"
    except OSError:
        for directory, _names, files in os.walk(data.datastore / ".chunks"):
            for name in files:
                fd = os.open(f"{directory}/{name}", os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
        return "chunk files dropped one by one: not root"
