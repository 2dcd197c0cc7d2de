"""Stored chunks, in order, mutated and made up, and what the decoders have to say about each."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import zstandard
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from pbsfs.base.errors import DamageError, KeyRequiredError
from pbsfs.formats import blob
from pbsfs.formats.blob import MAX_CHUNK_SIZE, BlobKind
from pbsfs.formats.keys import Key
from tests.support import byhand
from tests.support.made import KEY, OTHER_KEY


@dataclass(frozen=True, slots=True)
class Case:
    """A stored chunk, and what an index says about it."""

    name: str
    raw: bytes
    digest: bytes
    length: int
    encrypted: bool
    key: Key | None

    @property
    def keys(self) -> tuple[bytes, bytes] | tuple[None, None]:
        """The keys as the extension takes them."""
        return self.key.reveal_all() if self.key is not None and self.encrypted else (None, None)

    @property
    def given(self) -> tuple[bytes, bytes, int, bytes | None, bytes | None]:
        return self.raw, self.digest, self.length, *self.keys


def verified(case: Case) -> bytes | str:
    """The content by the reference, or the error with which it refuses the chunk."""
    try:
        return blob.decode_chunk(
            case.raw, digest=case.digest, length=case.length, encrypted=case.encrypted, key=case.key
        )
    except (DamageError, KeyRequiredError) as error:
        return str(error)


STRICTER = "zstd: decompression error: Data corruption detected"
"""How the reference refuses a frame that no writer makes: it refers to what its window lacks, or has a larger
block than allowed. The extension may accept it: it needs no window, and its zstd may be older."""


def compare(extension: ModuleType, case: Case) -> str:
    """Whether the chunk is "verified" or "refused". Fails unless the extension and the reference agree. The
    extension must not read beyond what it was given: that ends the process.

    If the extension alone accepts a frame (see `STRICTER`), the content has to be the right one. That is
    "stricter".
    """
    expected = verified(case)
    assert case.key is not None or not case.encrypted, "the extension is not called then"
    got = extension.decode(case.raw, case.digest, case.length, *case.keys)
    assert extension.decode(guarded(case.raw), case.digest, case.length, *case.keys) == got, case.name
    if got is None:
        assert isinstance(expected, str), f"{case.name}: refused by the extension alone"
        return "refused"
    key = case.key if case.encrypted else None
    assert (len(got), blob.chunk_digest(got, key)) == (case.length, case.digest), case.name
    if expected == STRICTER:
        return "stricter"
    assert got == expected, f"{case.name}: {expected!r:.200}, but accepted by the extension"
    return "verified"


def guarded(data: bytes) -> memoryview:
    """A copy of `data` that ends where memory begins that nobody may touch."""
    size = -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    memory[size - len(data) : size] = data
    view = memoryview(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    return view[size - len(data) : size]


# --- chunks in order


def contents() -> Iterator[bytes]:
    """What compresses well, badly, and both, of lengths at edges of blocks, buffers and formats."""
    some = random.Random(1)
    for length in (0, 1, 2, 31, 32, 255, 256, 65_791, 65_792, 131_071, 131_072, 131_073, 1 << 20):
        yield some.randbytes(length)
        yield (b"%d scsi0: local:100/disk.raw,size=4G\n" % length * (length // 30 + 1))[:length]
    yield bytes(300_000)
    yield b"".join(mixed(some) * 10 for _ in range(60))


def mixed(some: random.Random) -> bytes:
    return some.choice((bytes(900), some.randbytes(70), b"text " * 99))


def of(data: bytes, magic: str, packed: bytes | None = None) -> Case:
    """The stored chunk of `data`. `packed`: what it holds instead of `data`, before encryption."""
    sealed = magic in (byhand.ENCRYPTED, byhand.ENCRYPTED_COMPRESSED)
    key = KEY if sealed else None
    name = f"{BlobKind(bytes.fromhex(magic)).name} of {len(data)} bytes"
    raw = byhand.blob(magic, data) if packed is None else around(magic, packed)
    return Case(name, raw, blob.chunk_digest(data, key), len(data), sealed, key)


def around(magic: str, packed: bytes) -> bytes:
    """A blob with `packed` in it as it stands, encrypted where the kind says so."""
    if magic in (byhand.PLAIN, byhand.COMPRESSED):
        return byhand.unsealed(magic, packed)
    encryptor = Cipher(AES(byhand.KEY), GCM(byhand.IV)).encryptor()
    sealed = encryptor.update(packed) + encryptor.finalize()
    return byhand.with_crc(bytes.fromhex(magic) + bytes(4) + byhand.IV + encryptor.tag + sealed)


COMPRESSORS = [
    zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=announce)
    for level in (-5, 1, 3, 9, 19)
    for checksum in (False, True)
    for announce in (False, True)
]
"""What packs frames in all the ways that a client may choose."""

COMPRESSED = (byhand.COMPRESSED, byhand.ENCRYPTED_COMPRESSED)


def good() -> Iterator[Case]:
    """Chunks that have to be accepted."""
    for data in contents():
        for magic in (byhand.PLAIN, byhand.ENCRYPTED):
            yield of(data, magic)
        packers = COMPRESSORS if len(data) < 200_000 else COMPRESSORS[:8]
        for frame in sorted({packer.compress(data) for packer in packers}):
            for magic in COMPRESSED:
                yield of(data, magic, frame)


def frames_beyond_one(frame: bytes) -> dict[str, bytes]:
    """What is no single frame, or not all of one, though it begins or ends with one."""
    skippable = bytes.fromhex("502a4d18 03000000") + b"abc"
    return {
        "two frames": frame + byhand.frame(b""),
        "a frame twice": frame + frame,
        "an empty frame first": byhand.frame(b"", announce=True) + frame,
        "a skippable frame first": skippable + frame,
        "a skippable frame last": frame + skippable,
        "a skippable frame": skippable,
        "a byte more": frame + b"\0",
        "a byte less": frame[:-1],
        "half": frame[: len(frame) // 2],
        "the magic number": frame[:4],
        "five bytes": frame[:5],
        "nothing": b"",
        "the first version's magic number": bytes.fromhex("1eb52ffd") + frame[4:],
        "version 0.7's magic number": bytes.fromhex("27b52ffd") + frame[4:],
        "no magic number": frame[4:],
    }


def bad() -> Iterator[Case]:
    """Chunks that have to be refused."""
    for data in (b"", b"a", b"scsi0: local:100/disk.raw,size=4G\n" * 20, bytes(300_000)):
        for announce in (False, True):
            for what, packed in frames_beyond_one(byhand.frame(data, announce=announce)).items():
                for magic in COMPRESSED:
                    yield replace(of(data, magic, packed), name=what)
        for magic in byhand.KINDS:
            yield from _wrong(of(data, magic))
    # A window of 256 MiB, then one last raw block of three bytes.
    for magic in COMPRESSED:
        yield of(b"abc", magic, bytes.fromhex("28b52ffd 0090 190000") + b"abc")


def _wrong(case: Case) -> Iterator[Case]:
    """A chunk in order where an index says something else."""
    other = hashlib.sha256(b"other").digest()
    size = case.length
    lengths = {size // 2, size - 1, size + 1, size + 4096, MAX_CHUNK_SIZE, MAX_CHUNK_SIZE + 1} - {size, -1}
    for length in sorted(lengths):
        yield replace(case, name=f"{case.name} for {length}", length=length)
    yield replace(case, name="digest", digest=other)
    yield replace(case, name="a bit of the digest", digest=byhand.flipped(case.digest, 255))
    yield replace(case, name="the other kind", encrypted=not case.encrypted, key=KEY)
    if case.encrypted:
        yield replace(case, name="another key", key=OTHER_KEY)
        content = verified(case)
        assert isinstance(content, bytes)
        yield replace(case, name="the plain digest", digest=hashlib.sha256(content).digest())
    for size in {0, 1, 7, 8, 11, 12, 13, 28, 43, 44, 45, len(case.raw) - 1} - {len(case.raw)}:
        if size < len(case.raw):
            yield replace(case, name=f"{size} bytes", raw=case.raw[:size])


# --- mutated


def mutated(seed: int) -> Case:
    """A chunk with something changed: its blob as it is, with a CRC that fits, or what is in it before it is
    encrypted. The digest and length are those of what the reference decodes then, if it does."""
    some = random.Random(seed)
    data = some.choice(
        (
            b"scsi0: local:100/disk.raw,size=4G\n" * some.randrange(1, 900),
            some.randbytes(some.randrange(1, 300)),
            b"".join(mixed(some) for _ in range(some.randrange(90))),
        )
    )
    magic = some.choice(byhand.KINDS)
    packed = some.choice(COMPRESSORS).compress(data) if magic in COMPRESSED else data
    case = of(data, magic, packed)
    way = some.choice(("raw", "crc", "inside", "inside", "inside"))
    if way == "inside":
        raw = around(magic, change(packed, some))
    else:
        raw = change(case.raw, some)
        raw = byhand.with_crc(raw) if way == "crc" and len(raw) >= 12 else raw
    changed = replace(case, name=f"{case.name}, {way}, seed {seed}", raw=raw)
    try:
        content = blob.decode(raw, max_size=1 << 20, key=case.key, encrypted=case.encrypted)
    except DamageError:
        return changed
    return replace(changed, digest=blob.chunk_digest(content, case.key), length=len(content))


def change(data: bytes, some: random.Random) -> bytes:
    """`data` with one to three changes, half of them in its first bytes."""
    new = bytearray(data)
    for _ in range(some.choice((1, 1, 1, 2, 3))):
        if not new:
            break
        at = some.randrange(min(len(new), 24) if some.random() < 0.5 else len(new))
        match some.randrange(8):
            case 0:
                del new[at:]
            case 1:
                del new[at : at + some.randrange(1, 9)]
            case 2:
                new[at:at] = some.randbytes(some.randrange(1, 9))
            case 3:
                new += some.randbytes(some.randrange(1, 9))
            case 4:
                new[at] = some.choice((0, 1, 127, 128, 255))
            case 5:
                new[at : at + 4] = some.randbytes(4)
            case _:
                new[at] ^= 1 << some.randrange(8)
    return bytes(new)


def compare_all(extension: ModuleType, seeds: range) -> Counter[str]:
    """Compares all good and bad chunks, and the mutated ones of these seeds; then pairs of them. Returns how
    many had which result."""
    found: Counter[str] = Counter()
    for case in good():
        assert compare(extension, case) == "verified", case.name
        found["good"] += 1
    for case in bad():
        assert compare(extension, case) == "refused", case.name
        found["bad"] += 1
    found.update(compare(extension, mutated(seed)) for seed in seeds)
    some = random.Random(len(seeds))
    cases = [*good(), *bad(), *map(mutated, seeds)]
    for _ in cases:
        pair = some.choice(cases), some.choice(cases)
        found["pairs verified"] += None not in compare_pair(extension, *pair)
    return found


def compare_pair(extension: ModuleType, first: Case, second: Case) -> tuple[bytes | None, bytes | None]:
    """What two chunks give at once: the same as each by itself."""
    alone = tuple(extension.decode(c.raw, c.digest, c.length, *c.keys) for c in (first, second))
    got: tuple[bytes | None, bytes | None] = extension.decode_pair(first.given, second.given)
    assert got == alone, f"{first.name} and {second.name}"
    return got
