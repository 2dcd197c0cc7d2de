"""The extension that setup.py builds from `_decoder.c`."""

def decode(
    raw: bytes | memoryview, digest: bytes, length: int, key: bytes | None, id_key: bytes | None
) -> bytes | None: ...
def decode_into(
    raw: bytes | memoryview,
    digest: bytes,
    room: bytearray | memoryview,
    key: bytes | None,
    id_key: bytes | None,
) -> bool: ...
