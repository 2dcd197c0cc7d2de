"""Keys: what is derived from them is what the vendor derives, and they show nothing of themselves."""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.base.errors import DamageError
from pbsfs.formats.keys import Key
from tests.support import byhand, golden
from tests.support.made import KEY, OTHER_KEY

ID_KEY = bytes.fromhex("7c2c013efd07f3b25717a485263343cd4d292a4b65c200bb3b18ea227abe225c")
"""PBKDF2-HMAC-SHA256 of 00…1f with the salt `_id_key`, 10 iterations."""

FINGERPRINT = (
    "0e:ab:d4:46:0b:6e:b9:ca:34:50:23:de:e2:b7:78:c7:90:e5:4a:16:83:b9:65:9c:0a:57:ae:19:90:90:15:9b"
)


def test_a_digest_is_the_sha256_of_data_and_id_key() -> None:
    for data in (b"", b"abc", bytes(1 << 16)):
        assert KEY.digest(data) == hashlib.sha256(data + ID_KEY).digest()


def test_the_fingerprint_is_32_hex_pairs_with_colons() -> None:
    assert KEY.fingerprint == FINGERPRINT
    assert OTHER_KEY.fingerprint != FINGERPRINT


@pytest.mark.golden
def test_the_fingerprint_is_the_one_that_the_vendor_wrote_beside_the_key() -> None:
    stored = json.loads((golden.ROOT / "keys" / "plain.json").read_text())
    assert Key(b64decode(stored["data"])).fingerprint == stored["fingerprint"]


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(DamageError, match="32 bytes"):
        Key(bytes(length))


@given(st.binary(max_size=200))
def test_what_is_sealed_opens_to_the_same(data: bytes) -> None:
    iv, tag, sealed = KEY.encrypt(data)

    assert (len(iv), len(tag), len(sealed)) == (16, 16, len(data))
    assert KEY.decrypt(iv, tag, sealed) == data


def test_no_other_key_iv_tag_or_data_opens_it() -> None:
    iv, tag, sealed = KEY.encrypt(b"some data")

    attempts = [
        (OTHER_KEY, iv, tag, sealed),
        (KEY, byhand.flipped(iv, 127), tag, sealed),
        (KEY, iv, byhand.flipped(tag, 0), sealed),
        (KEY, iv, tag, byhand.flipped(sealed, 71)),
        (KEY, iv, tag, sealed[:-1]),
        (KEY, iv, tag, b""),
    ]
    for key, *parts in attempts:
        with pytest.raises(DamageError, match="decryption failed"):
            key.decrypt(*parts)


def test_repr_names_the_key_and_shows_nothing_of_it() -> None:
    shown = f"{KEY!r} {KEY}"

    assert FINGERPRINT[:23] in shown
    for secret in (byhand.KEY, ID_KEY):
        assert secret.hex()[:8] not in shown.replace(":", "")
