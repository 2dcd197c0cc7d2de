"""The decoder: from a stored chunk to its verified content, by the C extension where there is one.

The extension `pbsfs.formats._decoder` makes every check of `blob.decode_chunk`, without Python's lock, and
says only whether all of them passed. Where one did not, `blob.decode_chunk` decides: it is the reference, and
raises the errors. Any thread may call this.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from pbsfs.formats import blob
from pbsfs.formats.blob import Stored
from pbsfs.formats.keys import Key

PURE_VARIABLE = "PBSFS_PURE_DECODER"

Verify = Callable[[Stored, bytes, int, bytes | None, bytes | None], bytes | None]


def find_extension() -> Verify | None:
    """The extension's `decode`; None where it is missing, or the environment has PURE_VARIABLE."""
    if os.environ.get(PURE_VARIABLE):
        return None
    try:
        from pbsfs.formats._decoder import decode  # noqa: PLC0415
    except ImportError:  # of a checkout that is not set up, or a library is missing
        return None
    return decode


_verify = find_extension()


def is_pure() -> bool:
    """Whether Python's own code decodes, which takes longer."""
    return _verify is None


def decode_chunk(
    raw: Stored, *, digest: bytes, length: int, encrypted: bool, key: Key | None = None
) -> bytes:
    """The same as `blob.decode_chunk`."""
    if _verify is not None and (key is not None or not encrypted):
        keys = key.reveal_all() if key is not None and encrypted else (None, None)
        content = _verify(raw, digest, length, *keys)
        if content is not None:
            return content
    return blob.decode_chunk(raw, digest=digest, length=length, encrypted=encrypted, key=key)
