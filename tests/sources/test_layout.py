"""The names in a datastore."""

from __future__ import annotations

import pytest

from pbsfs.base.names import Archive, Namespace
from pbsfs.sources.layout import (
    chunk_steps,
    file_steps,
    group_steps,
    is_bad_copy,
    is_chunk_name,
    namespace_steps,
    snapshot_steps,
)
from tests.support import made

DIGEST = bytes.fromhex("56fe" + "0a" * 30)


def test_metadata_lies_where_the_server_puts_it() -> None:
    snapshot = made.snapshot(namespace=Namespace(("prod", "db")))
    below = ("ns", "prod", "ns", "db")
    assert namespace_steps(snapshot.group.namespace) == below
    assert group_steps(snapshot.group) == (*below, "vm", "100")
    assert snapshot_steps(snapshot) == (*below, "vm", "100", "2023-11-14T22:13:20Z")
    assert file_steps(snapshot, Archive("a.blob")) == (*snapshot_steps(snapshot), "a.blob")


def test_what_is_in_no_namespace_lies_at_the_root() -> None:
    assert namespace_steps(Namespace()) == ()
    assert group_steps(made.snapshot().group) == ("vm", "100")


def test_a_chunk_lies_in_a_directory_of_its_first_two_bytes() -> None:
    assert chunk_steps(DIGEST) == ("56fe", DIGEST.hex())


@pytest.mark.parametrize("end", [".0.bad", ".using", "\n", "0", ".tmp"])
def test_only_a_digest_is_the_name_of_a_chunk(end: str) -> None:
    assert is_chunk_name(DIGEST.hex())
    assert not is_chunk_name(DIGEST.hex() + end)
    assert not is_chunk_name(DIGEST.hex().upper())


def test_a_bad_copy_is_one_of_the_same_chunk() -> None:
    assert is_bad_copy(f"{DIGEST.hex()}.0.bad", DIGEST)
    assert not is_bad_copy(f"{DIGEST.hex()}.0.bad", bytes(32))
    assert not is_bad_copy(f"{DIGEST.hex()}.10.bad", DIGEST)
    assert not is_bad_copy(DIGEST.hex(), DIGEST)
