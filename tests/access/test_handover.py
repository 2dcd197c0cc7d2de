"""What a child process gets: it never waits for a reader, and it is whole."""

from __future__ import annotations

import os

from pbsfs.access.config import SourceOptions
from pbsfs.access.handover import Handover
from pbsfs.access.keyring import MAX_KEYS, KeyRing
from pbsfs.base.secret import Secret
from pbsfs.formats.keys import Key


def test_more_than_a_pipe_holds_is_handed_over_before_anybody_reads() -> None:
    keys = KeyRing(Key(number.to_bytes(32)) for number in range(MAX_KEYS))
    password = Secret("x" * (1 << 20))
    with Handover(SourceOptions(), password, keys).descriptors() as (keys_fd, password_fd):
        assert password_fd is not None
        with open(keys_fd, "rb", closefd=False) as file:
            assert KeyRing.load(file.read()).keys() == keys.keys()
        with open(password_fd, "rb", closefd=False) as file:
            assert file.read() == b"x" * (1 << 20) + b"\n"
        kept = (keys_fd, password_fd)
    for fd in kept:
        try:
            os.fstat(fd)
        except OSError:
            continue
        raise AssertionError(f"descriptor {fd} is still open")
