"""The decoder: from a stored chunk to its verified content, by the C extension where there is one.

The extension `pbsfs.formats._decoder` makes every check of `blob.decode_chunk`, without Python's lock, and
says only whether all of them passed. Where one did not, `blob.decode_chunk` decides: it is the reference, and
raises the errors. Any thread may call this.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pbsfs.formats import blob
from pbsfs.formats.blob import Stored
from pbsfs.formats.keys import Key

PURE_VARIABLE = "PBSFS_PURE_DECODER"

Given = tuple[Stored, bytes, int, bytes | None, bytes | None]


class Extension(NamedTuple):
    """The functions of the extension; they return None for a chunk that they have not verified."""

    decode: Callable[[Stored, bytes, int, bytes | None, bytes | None], bytes | None]
    decode_pair: Callable[[Given, Given], tuple[bytes | None, bytes | None]]


def find_extension() -> Extension | None:
    """The extension; None where it is missing, or the environment has PURE_VARIABLE."""
    if os.environ.get(PURE_VARIABLE):
        return None
    try:
        from pbsfs.formats._decoder import decode, decode_pair  # noqa: PLC0415
    except ImportError:  # it was not built, or before a change; or a library is missing
        return None
    return Extension(decode, decode_pair)


_extension = find_extension()


def is_pure() -> bool:
    """Whether Python's own code decodes, which takes longer."""
    return _extension is None


def decode_chunk(
    raw: Stored, *, digest: bytes, length: int, encrypted: bool, key: Key | None = None
) -> bytes:
    """The same as `blob.decode_chunk`."""
    if _extension is not None and (key is not None or not encrypted):
        content = _extension.decode(raw, digest, length, *_keys(encrypted, key))
        if content is not None:
            return content
    return blob.decode_chunk(raw, digest=digest, length=length, encrypted=encrypted, key=key)


@dataclass(frozen=True, slots=True)
class Decoding:
    """One call of `decode_chunk`."""

    raw: Stored
    digest: bytes
    length: int
    encrypted: bool
    key: Key | None

    def __call__(self) -> bytes:
        return decode_chunk(
            self.raw, digest=self.digest, length=self.length, encrypted=self.encrypted, key=self.key
        )


def decode_pair(first: Decoding, second: Decoding) -> tuple[bytes | None, bytes | None]:
    """The contents of two chunks, in less time than both take one after the other.

    None for one that was not verified in this way: calling it gives its content or its error.
    """
    if _extension is None or any(work.encrypted and work.key is None for work in (first, second)):
        return None, None
    return _extension.decode_pair(_given(first), _given(second))


def _given(work: Decoding) -> Given:
    return work.raw, work.digest, work.length, *_keys(work.encrypted, work.key)


def _keys(encrypted: bool, key: Key | None) -> tuple[bytes, bytes] | tuple[None, None]:
    return key.reveal_all() if encrypted and key is not None else (None, None)
