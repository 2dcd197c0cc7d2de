"""The extension that setup.py builds from `_decoder.c`."""

Given = tuple[bytes | memoryview, bytes, int, bytes | None, bytes | None]

def decode(
    raw: bytes | memoryview, digest: bytes, length: int, key: bytes | None, id_key: bytes | None
) -> bytes | None: ...
def decode_pair(first: Given, second: Given) -> tuple[bytes | None, bytes | None]: ...
